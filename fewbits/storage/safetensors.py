"""safetensors, read by range and written by layout.

    | 8 bytes: N, u64 little endian | N bytes: JSON | tensor bytes ...                          |
                                      {"name": {"dtype": "BF16", "shape": [n, k],
                                                "data_offsets": [begin, end]}, ...}   from byte 8 + N

The tensors fill the file exactly: no gap, no overlap, nothing after the last. The header is at most
100 MB. It is checked here instead of by a library, because a file is untrusted and each fault must name the
tensor, and because a library's map of the whole file keeps every page that was read resident.
Spec: github.com/huggingface/safetensors, section Format.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from .. import dtypes
from ..dtypes import DType
from ..errors import FileError, raise_all
from ..lazy import torch
from .json import parse_json_object, regular_size
from .mapped import absurd, map_bytes, read_bytes, view_as
from .packed import contents, is_packed

HEADER_LIMIT = 100_000_000  # bytes, the spec's own limit
MAX_DIMS = 64  # torch's own limit

# By safetensors' names; fewbits uses them in lower case.
DTYPES: dict[str, DType] = {name.upper(): dtype for name, dtype in dtypes.DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: `offset` counts from the start of the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, in file order; every fault of the header in one FileError."""
    return _read(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; FileError like `read_header`."""
    return _read(path)[1]


def read_raw_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors and metadata of the file as it is on disk, packed or not."""
    size = regular_size(path)
    try:
        with path.open("rb") as file:
            return _parsed(path, file.read, size)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


def _read(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    if not is_packed(path):
        return read_raw_header(path)
    inner, at = contents(path), 0

    def read(count: int) -> bytes:
        nonlocal at
        at += (count := min(count, inner.nbytes - at))
        return inner.part(at - count, count, "header").numpy().tobytes()

    return _parsed(path, read, inner.nbytes)


def _parsed(path: Path, read: Callable[[int], bytes], size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """read: gives the next bytes."""
    length = _header_length(path, read(8), size)
    header = parse_json_object(read(length), f"{path}: header")
    metadata = header.pop("__metadata__", {})
    faults: list[str] = []
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        faults.append("__metadata__ is not a table of strings")
    data_start = 8 + length
    entries = [entry for name, row in header.items() if (entry := _entry(name, row, data_start, faults))]
    raise_all(FileError, str(path), faults)
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    raise_all(FileError, str(path), _layout_faults(entries, data_start, size))
    return {entry.name: entry for entry in entries}, metadata


def _header_length(path: Path, raw: bytes, size: int) -> int:
    if len(raw) < 8:
        raise FileError(f"{path}: {size} bytes are too few for a safetensors file; fetch it again")
    length = int.from_bytes(raw, "little")
    if length > HEADER_LIMIT:
        raise FileError(
            f"{path}: header of {length} bytes, the limit is {HEADER_LIMIT}; damaged, or not safetensors"
        )
    if length > size - 8:
        raise FileError(
            f"{path}: the header claims {length} bytes, the file has {size - 8} after its length; "
            "it is truncated: fetch it again"
        )
    return length


def _whole_numbers(value: Any, limit: int) -> bool:
    """Whether `value` is a list of at most `limit` integers in 0 .. 2**63 - 1 (not true or false)."""
    return (
        isinstance(value, list)
        and len(value) <= limit
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _entry(name: str, row: Any, data_start: int, faults: list[str]) -> Entry | None:
    """One row of the header -> Entry; or None, with the fault appended to `faults`."""
    if not isinstance(row, dict):
        faults.append(f"tensor {name!r}: expected a table, found {type(row).__name__}")
        return None
    dtype: Any = row.get("dtype")
    shape: Any = row.get("shape")
    offsets: Any = row.get("data_offsets")
    before = len(faults)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        faults.append(f"tensor {name!r}: unknown dtype {str(dtype)[:40]!r}; known: {', '.join(DTYPES)}")
    if not _whole_numbers(shape, MAX_DIMS):
        faults.append(f"tensor {name!r}: shape {str(shape)[:80]} is not a list of sizes")
    if not _whole_numbers(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        faults.append(f"tensor {name!r}: data_offsets {str(offsets)[:80]} are not [begin, end]")
    if len(faults) > before:
        return None
    nbytes, needed = offsets[1] - offsets[0], prod(shape) * DTYPES[dtype].itemsize
    if nbytes != needed:
        faults.append(f"tensor {name!r}: {dtype} {shape} needs {needed} bytes, data_offsets span {nbytes}")
        return None
    if not nbytes and absurd(shape):
        faults.append(f"tensor {name!r} is empty, and {shape}, which no tensor can have; damaged file")
        return None
    return Entry(name, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _layout_faults(entries: list[Entry], data_start: int, size: int) -> list[str]:
    """Entries in offset order: faults unless they fill `data_start : size` without a gap or an overlap."""
    faults, end = [], data_start
    for entry in entries:
        if entry.offset != end:
            fault = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            faults.append(f"tensor {entry.name!r} {fault}: begins at byte {entry.offset}, expected {end}")
        end = max(end, entry.offset + entry.nbytes)
    if end > size:
        faults.append(f"the tensors end at byte {end}, the file has {size}: it is truncated; fetch it again")
    elif end < size:
        faults.append(f"the tensors end at byte {end}, the file has {size}: {size - end} bytes are unclaimed")
    return faults


def map_tensor(path: Path, entry: Entry) -> torch.Tensor:
    """The bytes of one tensor, mapped: `entry.shape` of `entry.dtype`; unmapped when it dies."""
    raw = map_bytes(path, entry.offset, entry.nbytes, entry.name)
    return view_as(raw, DTYPES[entry.dtype].torch, entry.shape)


_WHOLE = {"I64": "q", "I32": "i", "I16": "h", "I8": "b", "U64": "Q", "U32": "I", "U16": "H", "U8": "B"}


def read_integers(path: Path, entry: Entry) -> tuple[int, ...]:
    """All numbers of an array of integers, in order; without torch, which takes a second or two to import."""
    if entry.dtype not in _WHOLE:
        raise FileError(f"{path}: tensor {entry.name!r} is {entry.dtype}, integers are needed; damaged file")
    count = prod(entry.shape)
    return struct.unpack(
        f"<{count}{_WHOLE[entry.dtype]}", read_bytes(path, entry.offset, entry.nbytes, entry.name)
    )


def read_floats(path: Path, entry: Entry) -> tuple[float, ...]:
    """The same of an array of f32."""
    if entry.dtype != "F32":
        raise FileError(f"{path}: tensor {entry.name!r} is {entry.dtype}, F32 is needed; damaged file")
    raw = read_bytes(path, entry.offset, entry.nbytes, entry.name)
    return struct.unpack(f"<{prod(entry.shape)}f", raw)


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[Entry]]:
    """`(name, dtype, shape)` in file order -> header bytes (a multiple of 8) and entries in place.

    `dtype` is a safetensors name in either case, `BF16` or `bf16`.
    """
    rows: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    placed, faults, end = [], [], 0
    for name, dtype, shape in tensors:
        dtype = dtype.upper()
        if dtype not in DTYPES:
            faults.append(f"tensor {name!r}: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
            continue
        if name in rows or name == "__metadata__":
            faults.append(f"two tensors want the name {name!r}; rename one")
            continue
        nbytes = prod(shape) * DTYPES[dtype].itemsize
        rows[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        placed.append((name, dtype, tuple(shape), end, nbytes))
        end += nbytes
    raise_all(FileError, "safetensors header", faults)
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise FileError(f"safetensors header of {len(text)} bytes, the limit is {HEADER_LIMIT}; use shards")
    data_start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [
        Entry(name, dtype, shape, data_start + begin, nbytes) for name, dtype, shape, begin, nbytes in placed
    ]
