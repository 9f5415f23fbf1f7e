"""Packed files: a GGUF or safetensors file, its tensors entropy-coded; the same bytes come back.

A packed file is a safetensors file with arrays of bytes:

    contents  JSON, compressed by zlib (below)
    tables    those of the classes (spread.py) that occur in the file, compressed by zlib
    outside   what is not in a tensor (header, padding), compressed by zlib
    data      for each coded stream of each tensor in turn: its table, then its pieces

and metadata `fewbits_pack`, the version. The contents:

    name, nbytes, sha256     of the file that was packed
    coder                    of all streams: rans, huffman (coders.py)
    classes                  those that have a table, rising
    escape                   a byte that stands for codes without a place in their table; null for none
    tensors                  {name, offset and nbytes in it, digest, layout, streams (streams.py)}, by offset
    a stream                 {"coded": bytes of each piece}, or {"raw": bytes} where coding shortens nothing

The codes of a matrix, layout spread:COLUMNS or signed:COLUMNS, have three streams: the classes of its
rows and columns, compressed by zlib, {"deflated": bytes}; the codes, whose tables are those of the file,
{"classed": bytes of each piece}; and the codes that are escaped there, in their order, {"rare": bytes}.

A piece holds PIECE symbols, so that tensors are coded in parallel. A tensor is decoded alone, and checked by
its digest: 16 bytes of BLAKE2b.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, file_digest
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .. import core
from ..errors import FileError
from ..storage.atomic import as_bytes, write_file_atomic
from ..storage.json import regular_size
from ..storage.mapped import map_bytes, read_bytes
from ..storage.safetensors import lay_out
from . import spread
from .coders import Coder
from .streams import block_of, split

KEY, VERSION = "fewbits_pack", "2"
PIECE = 2**20  # symbols
AT_ONCE = 2**24  # bytes of a tensor that are split at once
LEAST = 4096  # bytes: a shorter tensor is not coded, its tables would be as long
WORTH = 0.995  # of the bytes: what is not shorter than that is not coded
RARE = 2**14  # a code that is less often than one in so many is escaped: shorter than a table's least share
SPREAD, SIGNED = "spread:", "signed:"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Place:
    """A tensor in the file to pack, and its layout; columns: of a matrix of bytes, whose codes may have
    classes, around 0 if signed, else around 128."""

    name: str
    layout: str
    offset: int
    nbytes: int
    columns: int = 0
    signed: bool = False

    @property
    def spread(self) -> str:
        """The layout with classes."""
        return f"{SIGNED if self.signed else SPREAD}{self.columns}"


def pack(
    source: Path, places: Sequence[Place], out: Path, coder: Coder, progress: Progress | None = None
) -> None:
    """A file, of which these are the tensors in order -> its packed file."""
    size = regular_size(source)
    writer = _Writer(source, coder, _spreads(source, places, coder))
    try:
        with tempfile.TemporaryFile(dir=out.parent) as data:  # the header, which is first, has its lengths
            rows = []
            for place in places:
                rows.append(writer.tensor(place, data))
                if progress:
                    progress(place.name, place.offset + place.nbytes, size)
            about = {
                "name": source.name, "nbytes": size, "sha256": _digest(source), "coder": coder.name,
                "classes": writer.used, "escape": writer.escape, "tensors": rows,
            }  # fmt: skip
            small = [
                ("contents", json.dumps(about, separators=(",", ":")).encode()),
                ("tables", as_bytes(writer.tables).tobytes()),
                ("outside", b"".join(_outside(source, places, size))),
            ]
            parts = [(name, zlib.compress(raw, 9)) for name, raw in small]
            arrays = [*((name, "u8", (len(raw),)) for name, raw in parts), ("data", "u8", (data.tell(),))]
            header, _ = lay_out(arrays, {KEY: VERSION})
            data.seek(0)
            pieces = iter(partial(data.read, 2**22), b"")
            write_file_atomic(out, chain([header], (raw for _, raw in parts), pieces))
    except OSError as error:
        raise FileError(f"{out}: cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class _Spread:
    """The rows and columns of a matrix, u8, and how often each code of each class occurs, `(64, 256)`."""

    rows: torch.Tensor
    columns: torch.Tensor
    counts: torch.Tensor


def _spreads(source: Path, places: Sequence[Place], coder: Coder) -> dict[str, _Spread]:
    """The matrices that are shorter by classes."""
    found = {}
    for place in places:
        if not place.columns or place.nbytes < LEAST:
            continue
        codes = map_bytes(source, place.offset, place.nbytes, place.name).view(-1, place.columns)
        codes = codes ^ 128 if place.signed else codes
        rows, columns = spread.fitted(codes)
        table = spread.counted(codes, rows, columns)
        plain = coder.bits(table.sum(0), coder.table(table.sum(0))) / 8 + coder.table_bytes
        size = sum(coder.bits(each, coder.table(each)) for each in table if bool(each.any())) / 8
        if size + spread.SIDE / 8 * (len(rows) + len(columns)) < min(WORTH * plain, place.nbytes):
            found[place.name] = _Spread(rows, columns, table)
    return found


class _Writer:
    """Codes the tensors of a file. used: the classes that occur; tables: of each of them."""

    def __init__(self, source: Path, coder: Coder, spreads: dict[str, _Spread]):
        self.source, self.coder, self.spreads = source, coder, spreads
        counts = sum((each.counts for each in spreads.values()), torch.zeros(spread.CLASSES, 256).long())
        self.used = torch.where(counts.any(1))[0].tolist()
        free = torch.where(counts.sum(0) == 0)[0].tolist()
        self.escape = free[0] if free else None
        if self.escape is not None:
            rare = torch.where(counts * RARE < counts.sum(1, keepdim=True), counts, 0)
            counts = counts - rare
            counts[:, self.escape] = rare.sum(1)
        tables = [coder.table(counts[i]) for i in self.used]
        self.tables = torch.stack(tables) if tables else torch.empty(0, 256, dtype=coder.dtype)

    def tensor(self, place: Place, data: BinaryIO) -> dict[str, Any]:
        """Code a tensor into `data` -> its row."""
        whole = map_bytes(self.source, place.offset, place.nbytes, place.name)
        layout = place.layout
        if place.nbytes < LEAST or place.nbytes % block_of(layout):
            layout = "bytes"
        if place.name in self.spreads:
            layout = place.spread
            codes = whole.view(-1, place.columns)
            rows = self._matrix(codes ^ 128 if place.signed else codes, self.spreads[place.name], data)
        else:
            rows = [self._stream(stream, data) for stream in _split(layout, whole)]
        return {
            "name": place.name, "offset": place.offset, "nbytes": place.nbytes, "digest": digest_of(whole),
            "layout": layout, "streams": rows,
        }  # fmt: skip

    def _stream(self, stream: torch.Tensor, data: BinaryIO) -> dict[str, Any]:
        counts = torch.zeros(256, dtype=torch.int64)
        for piece in stream.split(PIECE):
            counts += torch.bincount(piece.int(), minlength=256)
        table, coder = self.coder.table(counts), self.coder
        size = coder.bits(counts, table) / 8 + coder.table_bytes
        if size + coder.overhead * -(-stream.numel() // PIECE) >= WORTH * stream.numel():
            data.write(stream.numpy().data)
            return {"raw": stream.numel()}
        data.write(as_bytes(table))
        coded = parallel(lambda piece: coder.encode(piece.contiguous(), table, None), stream.split(PIECE))
        return {"coded": [data.write(as_bytes(piece)) for piece in coded]}

    def _matrix(self, codes: torch.Tensor, found: _Spread, data: BinaryIO) -> list[dict[str, Any]]:
        sides = zlib.compress(as_bytes(torch.cat([found.rows, found.columns])).tobytes(), 9)
        data.write(sides)
        numbers = numbers_of(self.used)

        def coded(part: tuple[slice, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            here, classes = part
            symbols = codes[here].flatten()
            tables, of = with_tables(classes, numbers, self.tables)
            rare = tables.flatten()[of.int() * 256 + symbols] == 0
            left = symbols[rare]
            if self.escape is not None:
                symbols = symbols.masked_fill(rare, self.escape)
            return self.coder.encode(symbols, tables, of), left

        pieces, nbytes, rare = parallel(coded, classed(found.rows, found.columns)), [], []
        for piece, left in pieces:
            nbytes.append(data.write(as_bytes(piece)))
            rare.append(left)
        left = torch.cat(rare)
        data.write(as_bytes(left))
        return [{"deflated": len(sides)}, {"classed": nbytes}, {"rare": len(left)}]


def numbers_of(used: Sequence[int]) -> torch.Tensor:
    """The classes that have a table -> the number of it for each class, `(64,)` u8; 255 for no table."""
    numbers = torch.full((spread.CLASSES,), 255, dtype=torch.uint8)
    numbers[list(used)] = torch.arange(len(used), dtype=torch.uint8)
    return numbers


def classed(rows: torch.Tensor, columns: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Whole rows of about PIECE codes, and their classes."""
    step = max(1, PIECE // max(1, len(columns)))
    for start in range(0, len(rows), step):
        here = slice(start, start + step)
        yield here, spread.classes(rows[here], columns)


def with_tables(
    classes: torch.Tensor, numbers: torch.Tensor, tables: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes `(n, k)` -> the tables from the first to the last that they need, and the one of each code."""
    found = numbers[classes.flatten().int()]
    low, high = int(found.min()), int(found.max())
    return tables[low : high + 1], found - low


def digest_of(tensor: torch.Tensor) -> str:
    return blake2b(as_bytes(tensor), digest_size=16).hexdigest()


def parallel(work: Callable[[Any], Any], items: Any) -> Iterator[Any]:
    with ThreadPoolExecutor(core.threads()) as pool:
        yield from pool.map(work, items)


def _split(layout: str, whole: torch.Tensor) -> list[torch.Tensor]:
    if not whole.numel():
        return []
    step = max(1, AT_ONCE // block_of(layout)) * block_of(layout)
    parts = [split(layout, part) for part in whole.split(step)]
    return [torch.cat([part[i] for part in parts]) for i in range(len(parts[0]))]


def _outside(source: Path, places: Sequence[Place], size: int) -> Iterator[bytes]:
    """What is before, between and after the tensors."""
    at = 0
    for place in [*places, Place("", "bytes", size, 0)]:
        yield read_bytes(source, at, place.offset - at)
        at = place.offset + place.nbytes


def _digest(source: Path) -> str:
    with source.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
