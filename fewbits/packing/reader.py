"""Reads packed files (container.py): whole, or a tensor when a range of it is asked for."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ..errors import FileError
from ..storage.atomic import as_bytes, write_file_atomic
from ..storage.json import parse_json_object
from ..storage.mapped import map_raw
from ..storage.safetensors import read_raw_header
from . import spread
from .coders import coder_named
from .container import (
    KEY,
    PIECE,
    SIGNED,
    SPREAD,
    VERSION,
    Progress,
    classed,
    digest_of,
    numbers_of,
    parallel,
    with_tables,
)
from .streams import block_of, joined, sizes

LARGEST = 2**30  # bytes that contents or outside may take, unpacked


class Packed:
    """An open packed file. Its table of contents is read, no tensor.

    FileError for a file that is not packed, or whose contents are damaged."""

    def __init__(self, path: Path):
        self.path = path
        self._entries, metadata = read_raw_header(path)
        if KEY not in metadata:
            raise FileError(f"{path}: is not packed by `fewbits pack`")
        if metadata[KEY] != VERSION or {*self._entries} != {"contents", "tables", "outside", "data"}:
            raise FileError(f"{path}: was packed by another version of fewbits; unpack it with that")
        about = parse_json_object(self._inflated("contents"), f"{path}: contents")
        self._outside = self._inflated("outside")
        try:
            self._check(about, bytearray(self._inflated("tables")))
        except FileError as error:
            raise FileError(f"{path}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise FileError(f"{path}: its table of contents is damaged; fetch it again") from error
        self._kept: tuple[int, torch.Tensor] | None = None

    def _inflated(self, name: str) -> bytes:
        entry = self._entries[name]
        try:
            work = zlib.decompressobj()
            found = work.decompress(as_bytes(map_raw(self.path, entry.offset, entry.nbytes)), LARGEST)
        except zlib.error as error:
            raise FileError(f"{self.path}: its {name} is damaged: {error}; fetch it again") from error
        if not work.eof:
            raise FileError(f"{self.path}: its {name} is damaged; fetch it again")
        return found

    def _check(self, about: dict[str, Any], tables: bytearray) -> None:
        self.name, self.nbytes, self.sha256 = about["name"], about["nbytes"], about["sha256"]
        self.rows: list[dict[str, Any]] = about["tensors"]
        assert isinstance(self.name, str) and isinstance(self.sha256, str)
        self.coder = coder_named(about["coder"])
        assert all(type(each) is int and 0 <= each < spread.CLASSES for each in about["classes"])
        self.numbers, self.escape = numbers_of(about["classes"]), about["escape"]
        assert self.escape is None or (type(self.escape) is int and 0 <= self.escape < 256)
        assert len(tables) == len(about["classes"]) * self.coder.table_bytes
        self.tables = torch.frombuffer(tables or bytearray(2), dtype=self.coder.dtype)
        self.tables = self.tables[: len(tables)].view(len(about["classes"]), 256)
        self._segments: list[tuple[int, int, int]] = []  # start, tensor or -1, its place in data or outside
        end, at, gaps = 0, 0, 0
        for index, row in enumerate([*self.rows, {"offset": self.nbytes, "nbytes": 0}]):
            assert all(type(row[key]) is int and row[key] >= 0 for key in ("offset", "nbytes"))
            assert end <= row["offset"]
            if row["offset"] > end:
                self._segments.append((end, -1, gaps))
                gaps += row["offset"] - end
            end = row["offset"] + row["nbytes"]
            if index == len(self.rows):
                break
            assert isinstance(row["name"], str) and isinstance(row["digest"], str)
            if row["nbytes"]:
                self._segments.append((row["offset"], index, at))
            at += coded_bytes(row, self.coder.table_bytes)
        assert at == self._entries["data"].nbytes and gaps == len(self._outside) and end == self.nbytes
        first = next((start for start, index, _ in self._segments if index >= 0), self.nbytes)
        self.head = self._outside[:first]

    def part(self, offset: int, nbytes: int, what: str = "range") -> torch.Tensor:
        """Bytes `offset : offset + nbytes` of the file that was packed, u8."""
        stop = offset + nbytes
        if not 0 <= offset <= stop <= self.nbytes:
            raise FileError(f"{self.path}: {what!r} ends at byte {stop}, the file has {self.nbytes}")
        found = []
        at = bisect_right(self._segments, (offset, len(self.rows), 0)) - 1
        while offset < stop:
            start, index, place = self._segments[at]
            end = self._segments[at + 1][0] if at + 1 < len(self._segments) else self.nbytes
            inner = slice(offset - start, min(stop, end) - start)
            if index < 0:
                piece = self._outside[place + inner.start : place + inner.stop]
                found.append(torch.frombuffer(bytearray(piece), dtype=torch.uint8))
            else:
                found.append(self.tensor(index, place)[inner])
            offset, at = end, at + 1
        return found[0] if len(found) == 1 else torch.cat([torch.empty(0, dtype=torch.uint8), *found])

    def tensor(self, index: int, place: int) -> torch.Tensor:
        """The bytes of a tensor, whose streams are at `place` in data, checked by their digest. The last one
        is kept: it may be read in parts."""
        kept = self._kept
        if kept is not None and kept[0] == index:
            return kept[1]
        row = self.rows[index]
        at = self._entries["data"].offset + place
        try:
            whole = (
                self._matrix(row, at)
                if row["layout"].startswith((SPREAD, SIGNED))
                else self._streams(row, at)
            )
        except _Damaged:
            whole = None
        if whole is None or len(whole) != row["nbytes"] or digest_of(whole) != row["digest"]:
            raise FileError(f"{self.path}: tensor {row['name']!r} is damaged; fetch the file again")
        self._kept = index, whole
        return whole

    def _streams(self, row: dict[str, Any], at: int) -> torch.Tensor:
        streams = []
        for stream, count in zip(row["streams"], sizes(row["layout"], row["nbytes"]), strict=True):
            if "raw" in stream:
                streams.append(map_raw(self.path, at, stream["raw"]))
                at += stream["raw"]
                continue
            table = map_raw(self.path, at, self.coder.table_bytes).clone().view(self.coder.dtype)
            counts = [min(PIECE, count - start) for start in range(0, count, PIECE)]
            work = [(table, size, None) for size in counts]
            streams.append(self._pieces(stream["coded"], at + self.coder.table_bytes, work))
            at += self.coder.table_bytes + sum(stream["coded"])
        return joined(row["layout"], streams) if streams else torch.empty(0, dtype=torch.uint8)

    def _matrix(self, row: dict[str, Any], at: int) -> torch.Tensor:
        k = int(row["layout"].partition(":")[2])
        n, (sides, codes, rare) = row["nbytes"] // k, row["streams"]
        raw = map_raw(self.path, at, sides["deflated"])
        try:
            inflated = bytearray(zlib.decompressobj().decompress(as_bytes(raw), n + k + 1))
        except zlib.error as error:
            raise _Damaged from error
        both = torch.frombuffer(inflated or bytearray(1), dtype=torch.uint8)
        if len(both) != n + k or int(both.max()) >= spread.CLASSES:
            raise _Damaged
        work = []
        for _, classes in classed(both[:n], both[n:]):
            if int(self.numbers[classes.flatten().int()].max()) == 255:
                raise _Damaged
            tables, numbers = with_tables(classes, self.numbers, self.tables)
            work.append((tables, classes.numel(), numbers))
        at += sides["deflated"]
        whole = self._pieces(codes["classed"], at, work)
        left = map_raw(self.path, at + sum(codes["classed"]), rare["rare"])
        if self.escape is not None:
            escaped = whole == self.escape
            if int(escaped.sum()) != len(left):
                raise _Damaged
            whole[escaped] = left
        return whole ^ 128 if row["layout"].startswith(SIGNED) else whole

    def _pieces(self, nbytes: list[int], at: int, work: list[tuple[torch.Tensor, int, Any]]) -> torch.Tensor:
        """Pieces of so many bytes from `at` on, with the table, count and classes of each."""
        if len(nbytes) != len(work):
            raise _Damaged
        jobs = []
        for size, (table, count, classes) in zip(nbytes, work, strict=True):
            jobs.append((map_raw(self.path, at, size), table.contiguous(), count, classes))
            at += size
        found = list(parallel(lambda job: self.coder.decode(*job), jobs))
        if any(piece is None for piece in found):
            raise _Damaged
        return found[0] if len(found) == 1 else torch.cat([torch.empty(0, dtype=torch.uint8), *found])


class _Damaged(Exception):
    """Of a tensor; `tensor` says which."""


def coded_bytes(row: dict[str, Any], table_bytes: int) -> int:
    """The bytes of a tensor's streams in `data`; AssertionError where its row is not what it must be."""
    layout, streams = row["layout"], row["streams"]
    if layout.startswith((SPREAD, SIGNED)):
        columns = int(layout.partition(":")[2])
        assert columns > 0 and row["nbytes"] > 0 and row["nbytes"] % columns == 0
        assert [[*each] for each in streams] == [["deflated"], ["classed"], ["rare"]]
    else:
        counts = sizes(layout, row["nbytes"]) if row["nbytes"] else []
        assert row["nbytes"] % block_of(layout) == 0 and len(streams) == len(counts)
        assert all(each.get("raw", count) == count for each, count in zip(streams, counts, strict=True))
        assert all("raw" in each or "coded" in each for each in streams)
    total = 0
    for stream in streams:
        [(kind, value)] = stream.items()
        assert isinstance(value, list) == (kind in ("coded", "classed"))
        lengths = value if isinstance(value, list) else [value]
        assert all(type(n) is int and n >= 0 for n in lengths)
        total += sum(lengths) + (table_bytes if kind == "coded" else 0)
    return total


@lru_cache(16)
def _opened(path: Path, size: int, changed: int) -> Packed:
    return Packed(path)


def open_packed(path: Path) -> Packed:
    """A packed file; the same one as long as it does not change."""
    try:
        status = path.stat()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    return _opened(path, status.st_size, status.st_mtime_ns)


def unpack(source: Path, out: Callable[[str], Path], progress: Progress | None = None) -> Path:
    """A packed file -> the file that it was, at out(its name). FileError for one that is cut or altered: then
    nothing is left."""
    packed = Packed(source)
    if Path(packed.name).name != packed.name or packed.name in ("", ".", ".."):
        raise FileError(f"{source}: names its file {packed.name!r}, no name of a file; it is not written")
    place = out(packed.name)
    write_file_atomic(place, _whole(packed, progress))
    return place


def _whole(packed: Packed, progress: Progress | None) -> Iterator[memoryview]:
    digest, at = sha256(), 0
    stops = [row["offset"] for row in packed.rows] + [row["offset"] + row["nbytes"] for row in packed.rows]
    for stop in [*sorted(stops), packed.nbytes]:
        part = as_bytes(packed.part(at, stop - at))
        digest.update(part)
        yield part
        at = stop
        if progress:
            progress(packed.name, at, packed.nbytes)
    if digest.hexdigest() != packed.sha256:
        raise FileError(
            f"{packed.path}: its digest is not {packed.name}'s: it was cut or altered; fetch it again"
        )
