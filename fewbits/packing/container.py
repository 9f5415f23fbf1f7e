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
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .. import core
from ..errors import FileError
from ..files.gguf.parse import read_part
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
    temporary = [out.with_name(out.name + end) for end in (".data", ".partial")]
    try:
        with temporary[0].open("wb") as data:
            done = 0
            for name, kind, offset, nbytes in places:
                rows.append(_pack_tensor(source, layout_of(kind), offset, nbytes, data))
                done += nbytes
                if progress:
                    progress(name, done, size)
            length = data.tell()
        outside = zlib.compress(b"".join(_outside(source, rows, size)), 9)
        about = {"name": source.name, "nbytes": size, "sha256": _digest(source), "tensors": rows}
        header, _ = lay_out(
            [("data", "u8", (length,)), ("outside", "u8", (len(outside),))],
            {KEY: json.dumps(about, separators=(",", ":"))},
        )
        with temporary[1].open("wb") as file, temporary[0].open("rb") as data:
            file.write(header)
            shutil.copyfileobj(data, file, 2**22)
            file.write(outside)
        temporary[1].replace(out)
    except OSError as error:
        raise FileError(f"{out}: cannot be written: {error.strerror}") from error
    finally:
        for each in temporary:
            with suppress(OSError):
                each.unlink(missing_ok=True)
    return out


def unpack_file(
    source: Path, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Path:
    """A packed file -> the file that it was (default: under its name, beside it), checked by its digest.

    FileError for a file that is not packed, or is cut or altered: then nothing is left.
    """
    about, entries = _about(source), read_header(source)
    name = about["name"]
    if Path(name).name != name or name in ("", ".", ".."):
        raise FileError(f"{source}: names its file {name!r}, which is no name of a file; it is not written")
    out = out or source.with_name(name)
    _check_place(out, source, overwrite)
    data, outside = entries["data"], entries["outside"]
    temporary = out.with_name(out.name + ".partial")
    try:
        rest = zlib.decompress(read_bytes(source, outside.offset, outside.nbytes))
    except zlib.error as error:
        raise FileError(f"{source}: damaged: {error}; fetch it again") from error
    digest, at, used, done = sha256(), data.offset, 0, 0
    try:
        with temporary.open("wb") as file:

            def write(part: Any) -> None:
                digest.update(part)
                file.write(part)

            for row in about["tensors"]:
                gap = row["offset"] - done
                write(rest[used : used + gap])
                used, done = used + gap, row["offset"] + row["nbytes"]
                for part in _unpacked(source, row, at, data.offset + data.nbytes):
                    write(part.numpy().data)
                at += _length(row)
                if progress:
                    progress(name, done, about["nbytes"])
            write(rest[used:])
        if digest.hexdigest() != about["sha256"]:
            raise FileError(f"{source}: its digest is not {name}'s: it was cut or altered; fetch it again")
        temporary.replace(out)
    except OSError as error:
        raise FileError(f"{out}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return out


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
        counts = torch.bincount(stream.int(), minlength=256)
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


def _unpacked(source: Path, row: dict[str, Any], at: int, end: int) -> Iterator[torch.Tensor]:
    """The bytes of a tensor, whose streams begin at `at`."""
    if at + _length(row) > end:
        raise FileError(f"{source}: is cut; fetch it again")
    streams = []
    if not row["nbytes"]:
        return
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
    if streams:
        yield joined(row["layout"], streams)


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
            assert 0 <= end <= row["offset"] and row["nbytes"] >= 0
            assert row["nbytes"] % block_of(row["layout"]) == 0
            end = row["offset"] + row["nbytes"]
            for stream in row["streams"]:
                assert all(isinstance(n, int) and n >= 0 for n in stream.get("coded", [stream.get("raw")]))
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
    digest = sha256()
    with source.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()
