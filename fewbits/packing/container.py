"""Packed files: a GGUF or safetensors file, its tensors entropy-coded; the same bytes come back.

A packed file is a safetensors file with two arrays of bytes:

    data      for each coded stream of each tensor in turn: its frequencies (256 x u16), then its pieces
    outside   what is not in a tensor (header, padding), compressed by zlib

and metadata `fewbits_pack`, JSON:

    name, nbytes, sha256     of the file that was packed
    tensors                  {offset and nbytes in it, layout (streams.py), streams}, by offset
    a stream                 {"coded": bytes of each piece}, or {"raw": bytes} where coding shortens nothing

A piece holds PIECE symbols, so that tensors are coded in parallel and opened in parts. It is smaller to store
and to send; when it is unpacked, memory and speed are those of the file it was.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import file_digest, sha256
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .. import core
from ..errors import FileError
from ..files.gguf.parse import read_part
from ..storage.atomic import as_bytes, write_file_atomic
from ..storage.json import regular_size
from ..storage.mapped import map_bytes, read_bytes
from ..storage.safetensors import lay_out, read_header, read_metadata
from .rans import coded_bits, decode, encode, frequencies
from .streams import block_of, joined, layout_of, sizes, split

KEY = "fewbits_pack"
SUFFIX = ".packed.safetensors"
PIECE = 2**20  # symbols
AT_ONCE = 2**24  # bytes of a tensor that are split at once
LEAST = 4096  # bytes: a shorter tensor is not coded, its tables would be as long
Progress = Callable[[str, int, int], None]


def pack_file(
    source: Path, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Path:
    """A .gguf or .safetensors file -> its packed file (default: beside it).

    FileError for another kind of file, one that is damaged, or an output that exists.
    """
    out = out or source.with_name(source.name + SUFFIX)
    _check_place(out, source, overwrite)
    size, places = regular_size(source), _places(source)
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryFile(dir=out.parent) as data:  # the header, which is first, has its lengths
            done = 0
            for name, kind, offset, nbytes in places:
                rows.append(_pack_tensor(source, layout_of(kind), offset, nbytes, data))
                done += nbytes
                if progress:
                    progress(name, done, size)
            outside = zlib.compress(b"".join(_outside(source, rows, size)), 9)
            about = {"name": source.name, "nbytes": size, "sha256": _digest(source), "tensors": rows}
            header, _ = lay_out(
                [("data", "u8", (data.tell(),)), ("outside", "u8", (len(outside),))],
                {KEY: json.dumps(about, separators=(",", ":"))},
            )
            data.seek(0)
            write_file_atomic(out, chain([header], iter(partial(data.read, 2**22), b""), [outside]))
    except OSError as error:
        raise FileError(f"{out}: cannot be written: {error.strerror}") from error
    return out


def unpack_file(
    source: Path, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Path:
    """A packed file -> the file that it was (default: under its name, beside it), checked by its digest.

    FileError for a file that is not packed, or is cut or altered: then nothing is left.
    """
    about = _about(source)
    name = about["name"]
    if Path(name).name != name or name in ("", ".", ".."):
        raise FileError(f"{source}: names its file {name!r}, which is no name of a file; it is not written")
    out = out or source.with_name(name)
    _check_place(out, source, overwrite)
    write_file_atomic(out, _whole(source, about, progress))
    return out


def _whole(source: Path, about: dict[str, Any], progress: Progress | None) -> Iterator[bytes | memoryview]:
    """The file that was packed, part by part; at the end FileError if its digest is another."""
    entries = read_header(source)
    data, outside = entries["data"], entries["outside"]
    try:
        rest = zlib.decompress(read_bytes(source, outside.offset, outside.nbytes))
    except zlib.error as error:
        raise FileError(f"{source}: damaged: {error}; fetch it again") from error
    digest, at, used, done = sha256(), data.offset, 0, 0
    for row in about["tensors"]:
        gap = row["offset"] - done
        tensor = as_bytes(_unpacked(source, row, at, data.offset + data.nbytes))
        parts: tuple[bytes | memoryview, ...] = (rest[used : used + gap], tensor)
        used, done, at = used + gap, row["offset"] + row["nbytes"], at + _length(row)
        for part in parts:
            digest.update(part)
            yield part
        if progress:
            progress(about["name"], done, about["nbytes"])
    digest.update(rest[used:])
    yield rest[used:]
    if digest.hexdigest() != about["sha256"]:
        raise FileError(
            f"{source}: its digest is not {about['name']}'s: it was cut or altered; fetch it again"
        )


def _check_place(out: Path, source: Path, overwrite: bool) -> None:
    if out.exists() and out.samefile(source):
        raise FileError(f"{out}: is the input itself; choose another output")
    if out.exists() and not overwrite:
        raise FileError(f"{out}: exists; choose another output or pass --overwrite")


def _places(source: Path) -> list[tuple[str, str, int, int]]:
    """Name, type, offset and bytes of each tensor of a file, by offset."""
    if source.suffix == ".gguf":
        part = read_part(source)
        found = [(name, t.type_name, t.offset, t.nbytes) for name, t in part.tensors.items()]
    elif source.suffix == ".safetensors":
        if KEY in read_metadata(source):
            raise FileError(f"{source}: is packed already")
        found = [(n, e.dtype.lower(), e.offset, e.nbytes) for n, e in read_header(source).items()]
    else:
        raise FileError(f"{source}: only .gguf and .safetensors files are packed")
    return sorted(found, key=lambda row: row[2])


def _pack_tensor(source: Path, layout: str, offset: int, nbytes: int, data: BinaryIO) -> dict[str, Any]:
    """Code a tensor into `data` -> its row."""
    if nbytes < LEAST or nbytes % block_of(layout):
        layout = "bytes"
    whole = map_bytes(source, offset, nbytes) if nbytes else torch.empty(0, dtype=torch.uint8)
    step = max(1, AT_ONCE // block_of(layout)) * block_of(layout)
    parts = [split(layout, part) for part in whole.split(step)] if nbytes else []
    streams = [torch.cat([part[i] for part in parts]) for i in range(len(parts[0]))] if parts else []
    rows: list[dict[str, Any]] = []
    for stream in streams:
        counts = sum(torch.bincount(piece.int(), minlength=256) for piece in stream.split(PIECE))
        assert isinstance(counts, torch.Tensor)
        table = frequencies(counts)
        pieces = -(-stream.numel() // PIECE)
        if coded_bits(counts, table) / 8 + 512 + 34 * pieces >= 0.995 * stream.numel():
            data.write(stream.numpy().data)
            rows.append({"raw": stream.numel()})
            continue
        data.write(table.numpy().astype("<i2").tobytes())
        coded = [piece.numpy() for piece in _parallel(partial(_encoded, table), stream.split(PIECE))]
        for piece in coded:
            data.write(piece.data)
        rows.append({"coded": [piece.nbytes for piece in coded]})
    return {"offset": offset, "nbytes": nbytes, "layout": layout, "streams": rows}


def _unpacked(source: Path, row: dict[str, Any], at: int, end: int) -> torch.Tensor:
    """The bytes of a tensor, whose streams begin at `at`."""
    if at + _length(row) > end:
        raise FileError(f"{source}: is cut; fetch it again")
    if not row["nbytes"]:
        return torch.empty(0, dtype=torch.uint8)
    streams = []
    for stream, count in zip(row["streams"], sizes(row["layout"], row["nbytes"]), strict=True):
        if "raw" in stream:
            if stream["raw"] != count:
                raise FileError(f"{source}: damaged: a stream of {stream['raw']} bytes where {count} belong")
            streams.append(map_bytes(source, at, count))
            at += count
            continue
        table = map_bytes(source, at, 512).clone().view(torch.int16)
        at += 512
        work = []
        for i, size in enumerate(stream["coded"]):
            work.append((map_bytes(source, at, size), min(PIECE, count - i * PIECE)))
            at += size
        if len(work) != -(-count // PIECE):
            raise FileError(f"{source}: damaged: {len(work)} pieces of a stream of {count}")
        found = list(_parallel(partial(_decoded, table), work))
        if any(part is None for part in found):
            raise FileError(f"{source}: damaged: a stream cannot be decoded; fetch it again")
        streams.append(torch.cat([part for part in found if part is not None]))
    return joined(row["layout"], streams)


def _encoded(table: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
    return encode(piece.contiguous(), table)


def _decoded(table: torch.Tensor, piece: tuple[torch.Tensor, int]) -> torch.Tensor | None:
    return decode(piece[0], table, piece[1])


def _length(row: dict[str, Any]) -> int:
    """Bytes of a tensor's streams in `data`."""
    return sum(s["raw"] if "raw" in s else 512 + sum(s["coded"]) for s in row["streams"])


def _outside(source: Path, rows: list[dict[str, Any]], size: int) -> Iterator[bytes]:
    """What is before, between and after the tensors."""
    at = 0
    for row in [*rows, {"offset": size, "nbytes": 0}]:
        yield read_bytes(source, at, row["offset"] - at)
        at = row["offset"] + row["nbytes"]


def _about(source: Path) -> dict[str, Any]:
    """The metadata of a packed file, checked."""
    raw = read_metadata(source).get(KEY)
    if raw is None:
        raise FileError(f"{source}: is not packed by `fewbits pack`")
    try:
        about: dict[str, Any] = json.loads(raw)
        assert isinstance(about["name"], str) and isinstance(about["sha256"], str)
        end = 0
        for row in about["tensors"]:
            assert all(type(row[key]) is int for key in ("offset", "nbytes"))
            assert 0 <= end <= row["offset"] and row["nbytes"] >= 0
            assert row["nbytes"] % block_of(row["layout"]) == 0
            assert not row["nbytes"] or len(row["streams"]) == len(sizes(row["layout"], row["nbytes"]))
            end = row["offset"] + row["nbytes"]
            for stream in row["streams"]:
                assert all(type(n) is int and n >= 0 for n in stream.get("coded", [stream.get("raw")]))
        assert end <= about["nbytes"]
    except FileError as error:
        raise FileError(f"{source}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise FileError(f"{source}: its table of contents is damaged; fetch it again") from error
    return about


def _parallel(work: Callable[[Any], Any], items: Any) -> Iterator[Any]:
    with ThreadPoolExecutor(core.threads()) as pool:
        yield from pool.map(work, items)


def _digest(source: Path) -> str:
    with source.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
