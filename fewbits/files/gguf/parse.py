"""GGUF v2 and v3, little endian: a bounded parser of the header of one file.

    "GGUF" | u32 version | u64 tensors | u64 keys |
        keys     x ( string name | u32 type | value )        array value: u32 item type | u64 count | items
        tensors  x ( string name | u32 dims | u64 ne[dims] | u32 ggml type | u64 offset )
    zeros up to a multiple of `general.alignment` (32 if absent)
    tensor data, each at its offset from here, a multiple of the alignment

A string is u64 length and UTF-8. `ne` counts the fastest dimension first: a weight (out, in) is
ne = [in, out], so shapes here, in torch's order, are ne reversed: (n, k), or (experts, n, k).
Every count is checked against the size of the file before memory is allocated.
Spec: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any

from ...errors import FileError, raise_all
from ...formats.ggml_types import GGML_TYPES
from ...storage.json import regular_size
from ...storage.mapped import absurd, first_bytes
from ...storage.packed import contents, is_packed

DEFAULT_ALIGNMENT = 32
HEADER_LIMIT = 2**27  # bytes of keys and tensor infos; a tokenizer of 262,144 tokens takes about 2**24
MAX_NESTING = 2  # depth of nested arrays; the spec allows them, llama.cpp reads none
MAX_DIMS = 4
_SMALLEST_KEY = 8 + 4 + 1  # bytes: empty name, type, one u8
_SMALLEST_TENSOR = 8 + 4 + 4 + 8  # bytes: empty name, no dimensions, type, offset


class GGUFValueType(IntEnum):
    """The type of a value, by the number before it."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}

BLOCK_SIZES = {name: (kind.block, kind.nbytes) for name, kind in GGML_TYPES.items()}
"""ggml type name -> (weights of a block, bytes of a block)."""
_NAMES = {kind.number: name for name, kind in GGML_TYPES.items()}


@dataclass(frozen=True)
class GGUFValue:
    """A typed metadata value. For an ARRAY, `item` is the type of its items (GGUFValues if arrays)."""

    type: GGUFValueType
    value: Any
    item: GGUFValueType | None = None

    def plain(self) -> Any:
        """The value without its types: a number, a string, or a list of them."""
        if self.item == GGUFValueType.ARRAY:
            return [inner.plain() for inner in self.value]
        return self.value


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: shape in torch's order, ggml type in lower case, `offset` from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    nbytes: int
    file: Path


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF model; of all its parts if it is split. `path` is the first part."""

    path: Path
    version: int
    values: Mapping[str, GGUFValue]
    tensors: Mapping[str, GGUFTensor]
    alignment: int
    files: tuple[Path, ...]

    @property
    def metadata(self) -> dict[str, Any]:
        """Keys -> plain values; `values` has them with their types."""
        return {key: value.plain() for key, value in self.values.items()}


def gguf_nbytes(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this ggml type; FileError if the row length is no multiple of its block."""
    if type_name.lower() not in BLOCK_SIZES:
        raise FileError(f"unknown ggml type {type_name!r}; known: {', '.join(BLOCK_SIZES)}")
    block, block_bytes = BLOCK_SIZES[type_name.lower()]
    row = shape[-1] if shape else 1
    if row % block:
        raise FileError(f"row length {row} is not a multiple of {block}, the block of {type_name}")
    return prod(shape) // block * block_bytes


def read_part(path: Path) -> GGUFFile:
    """The header of one GGUF file, part of a split model or not; FileError for any fault."""
    regular_size(path)
    start = first_bytes(path, 24)
    if len(start) < 24 or start[:4] != b"GGUF":
        raise FileError(f"{path}: not a GGUF file (begins {start[:4]!r}); wrong or truncated file?")
    if is_packed(path):
        inner = contents(path)
        return _parse(path, _Cursor(path, inner.head, inner.nbytes))
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            return _parse(path, _Cursor(path, buffer, len(buffer)))
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


class _Cursor:
    """A position in the header that never exceeds its end. buffer: of a file of `size` bytes, all or what is
    before its tensors."""

    def __init__(self, path: Path, buffer: mmap.mmap | bytes, size: int):
        self.path = path
        self.buffer = buffer
        self.size = size
        self.end = min(len(buffer), HEADER_LIMIT)
        self.position = 4

    def advance(self, nbytes: int, what: str) -> int:
        """Skip `nbytes`; return their start."""
        start = self.position
        if nbytes > self.end - start:
            rule = "the file ends there" if self.end == self.size else "the limit of a header"
            raise FileError(
                f"{self.path}: {what} at byte {start} claims {nbytes} bytes, {self.end - start} are left "
                f"before byte {self.end} ({rule}); the file is truncated or damaged: fetch it again"
            )
        self.position = start + nbytes
        return start

    def number(self, code: str, what: str) -> Any:
        form = "<" + code
        return struct.unpack_from(form, self.buffer, self.advance(struct.calcsize(form), what))[0]

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        start = self.advance(length, what)
        try:
            return self.buffer[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileError(f"{self.path}: {what} at byte {start} is not UTF-8 ({error.reason})") from error

    def value_type(self, what: str) -> GGUFValueType:
        number = self.number("I", what)
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise FileError(
                f"{self.path}: {what} has unknown value type {number}; known: 0 to {max(GGUFValueType)}"
            ) from error

    def value(self, kind: GGUFValueType, what: str, depth: int = 0) -> GGUFValue:
        """The value of one key."""
        if kind == GGUFValueType.STRING:
            return GGUFValue(kind, self.string(what))
        if kind != GGUFValueType.ARRAY:
            return GGUFValue(kind, self.number(SCALARS[kind], what))
        if depth == MAX_NESTING:
            raise FileError(f"{self.path}: {what} nests arrays over {MAX_NESTING} deep; damaged or hostile")
        item = self.value_type(what)
        count = self.number("Q", what)
        if item == GGUFValueType.STRING:
            self.expect(count, 8, f"items of {what}")
            return GGUFValue(kind, [self.string(what) for _ in range(count)], item)
        if item == GGUFValueType.ARRAY:
            self.expect(count, 12, f"items of {what}")
            return GGUFValue(kind, [self.value(item, what, depth + 1) for _ in range(count)], item)
        start = self.advance(count * struct.calcsize("<" + SCALARS[item]), what)
        numbers = struct.unpack_from(f"<{count}{SCALARS[item]}", self.buffer, start)
        return GGUFValue(kind, list(numbers), item)

    def expect(self, count: int, smallest: int, what: str) -> None:
        """Refuse a count of items, of at least `smallest` bytes each, that exceeds the file."""
        left = self.end - self.position
        if count * smallest > left:
            raise FileError(
                f"{self.path}: claims {count} {what}, at least {count * smallest} bytes, {left} are left; "
                "the file is truncated or damaged: fetch it again"
            )


def _parse(path: Path, cursor: _Cursor) -> GGUFFile:
    """Walk the header."""
    version = cursor.number("I", "version")
    if version & 0xFFFF == 0:
        raise FileError(
            f"{path}: big-endian GGUF (version reads {version}); convert it on a big-endian machine"
        )
    if version not in (2, 3):
        raise FileError(f"{path}: GGUF version {version}; 2 and 3 are read: convert the model again")
    tensor_count = cursor.number("Q", "tensor count")
    key_count = cursor.number("Q", "key count")
    cursor.expect(key_count, _SMALLEST_KEY, "keys")
    values: dict[str, GGUFValue] = {}
    for _ in range(key_count):
        key = cursor.string("a key's name")
        if not key or key in values:
            fault = "appears twice" if key else "is empty"
            raise FileError(f"{path}: key {key!r} {fault}; the file is damaged")
        values[key] = cursor.value(cursor.value_type(f"key {key!r}"), f"key {key!r}")
    alignment = alignment_of(path, values)
    cursor.expect(tensor_count, _SMALLEST_TENSOR, "tensors")
    rows = [_tensor_row(cursor) for _ in range(tensor_count)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors = _place(path, rows, data_start, alignment, cursor.size)
    return GGUFFile(path, version, values, tensors, alignment, (path,))


def alignment_of(path: Path, values: Mapping[str, GGUFValue]) -> int:
    if "general.alignment" not in values:
        return DEFAULT_ALIGNMENT
    alignment = values["general.alignment"].value
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise FileError(f"{path}: general.alignment is {str(alignment)[:40]}, no power of two; damaged file")
    return alignment


_Row = tuple[str, tuple[int, ...], int, int]  # name, shape, ggml type number, offset in the data


def _tensor_row(cursor: _Cursor) -> _Row:
    name = cursor.string("a tensor's name")
    what = f"tensor {name!r}"
    dims = cursor.number("I", what)
    if dims > MAX_DIMS:
        raise FileError(f"{cursor.path}: {what} has {dims} dimensions, {MAX_DIMS} is the most; damaged file")
    ne = [cursor.number("Q", what) for _ in range(dims)]
    return name, tuple(reversed(ne)), cursor.number("I", what), cursor.number("Q", what)


def _place(path: Path, rows: list[_Row], data_start: int, alignment: int, size: int) -> dict[str, GGUFTensor]:
    """Check the tensor infos against the file; all faults at once."""
    faults: list[str] = []
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, number, offset in rows:
        what = f"tensor {name!r}"
        if not name or name in tensors:
            faults.append(f"{what} {'appears twice' if name else 'has no name'}")
            continue
        type_name = _NAMES.get(number)
        if type_name is None:
            faults.append(f"{what} has unknown ggml type {number}; a newer fewbits may know it")
            continue
        try:
            nbytes = gguf_nbytes(type_name, shape)
        except FileError as error:
            faults.append(f"{what}: {error}")
            continue
        if not nbytes and absurd(shape):
            faults.append(f"{what} is empty, and {shape}, which no tensor can have; damaged file")
            continue
        if offset % alignment:
            faults.append(f"{what}: offset {offset} is not a multiple of the alignment {alignment}")
        end = data_start + offset + nbytes
        if end > size:
            faults.append(f"{what} ({type_name} {shape}) ends at byte {end}, the file has {size}: truncated?")
        tensors[name] = GGUFTensor(name, shape, type_name, data_start + offset, nbytes, path)
    end, before = data_start, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            faults.append(
                f"tensor {tensor.name!r} at byte {tensor.offset} overlaps {before!r}, which ends at {end}"
            )
        if tensor.offset + tensor.nbytes >= end:
            end, before = tensor.offset + tensor.nbytes, tensor.name
    raise_all(FileError, str(path), faults)
    return tensors
