"""GGUF: models in one file or in parts, maps by range, and the header for writing.

The layout is described in parse.py. A model may be split into `name-00001-of-00003.gguf` ...: the
first part holds the metadata, and each part has `split.no` (from 0), `split.count` and
`split.tensors.count`. Written files are v3.
Spec: github.com/ggml-org/ggml, docs/gguf.md; parts: llama.cpp, tools/gguf-split.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from ...dtypes import DTYPES
from ...errors import FileError, raise_all
from ...formats.ggml_types import GGML_TYPES
from ...lazy import torch
from ...storage.mapped import map_bytes, view_as
from ...storage.packed import found_at, plain_name
from .parse import (
    BLOCK_SIZES,
    MAX_DIMS,
    SCALARS,
    GGUFFile,
    GGUFTensor,
    GGUFValue,
    GGUFValueType,
    alignment_of,
    gguf_nbytes,
    read_part,
)

__all__ = [
    "BLOCK_SIZES",
    "PLAIN_TYPES",
    "GGUFFile",
    "GGUFTensor",
    "GGUFValue",
    "GGUFValueType",
    "gguf_header",
    "gguf_nbytes",
    "map_gguf_tensor",
    "read_gguf",
]

MAX_NAME = 63  # bytes of a tensor name that llama.cpp accepts
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)

# ggml types that are plain numbers; every other type is blocks of bytes
PLAIN_TYPES = {name: DTYPES[name] for name in ("f64", "f32", "f16", "bf16", "i8", "i16", "i32", "i64")}


def read_gguf(path: Path) -> GGUFFile:
    """The header of a GGUF file, and of its sibling parts if it is split; FileError for any fault."""
    path = Path(path)
    opened = read_part(path)
    count = opened.metadata.get("split.count", 0)
    if type(count) is not int or count <= 1:
        return opened
    name = _SPLIT_NAME.fullmatch(plain_name(path))
    if not name or int(name[3]) != count:
        raise FileError(
            f"{path}: is one of {count} parts, so it must be named like "
            f"NAME-00001-of-{count:05d}.gguf for the others to be found; restore the names"
        )
    names = [f"{name[1]}-{number:05d}-of-{name[3]}.gguf" for number in range(1, count + 1)]
    paths = [path if each == plain_name(path) else found_at(path.with_name(each)) for each in names]
    missing = [f"{part.name} is missing; fetch it too" for part in paths if not part.is_file()]
    raise_all(FileError, str(path), missing)
    return _join([opened if part == path else read_part(part) for part in paths])


def _join(parts: list[GGUFFile]) -> GGUFFile:
    """The parts of a split model, in order, as one."""
    first, faults = parts[0], []
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(parts):
        says = part.metadata
        if says.get("split.no") != number or says.get("split.count") != len(parts):
            faults.append(
                f"{part.path.name}: says it is part {says.get('split.no')} of {says.get('split.count')} "
                f"(counted from 0), its name says {number} of {len(parts)}"
            )
        faults += [f"tensor {name!r} is in two parts" for name in part.tensors if name in tensors]
        tensors |= part.tensors
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        faults.append(f"the parts hold {len(tensors)} tensors, split.tensors.count says {total}")
    raise_all(FileError, f"{first.path}: the parts do not belong together", faults)
    files = tuple(part.path for part in parts)
    return GGUFFile(first.path, first.version, first.values, tensors, first.alignment, files)


def map_gguf_tensor(tensor: GGUFTensor, rows: slice | None = None) -> torch.Tensor:
    """The bytes of a tensor, mapped by range and unmapped when it dies.

    Block types -> `(rows, bytes per row)` u8; plain types (f32, bf16 ...) -> `tensor.shape`, or
    `(rows, k)` if `rows` is given. Rows are counted through all leading dimensions: row `n` of
    expert `e` is `e * N + n`. `rows` has step 1.
    """
    row_length = tensor.shape[-1] if tensor.shape else 1
    height = prod(tensor.shape[:-1])
    row_bytes = gguf_nbytes(tensor.type_name, (row_length,))
    start, stop, step = (rows or slice(None)).indices(height)
    if step != 1:
        raise FileError(f"{tensor.file}: {tensor.name!r}: rows are mapped with step 1, not {step}")
    n_rows = max(stop - start, 0)
    raw = map_bytes(tensor.file, tensor.offset + start * row_bytes, n_rows * row_bytes, tensor.name)
    if tensor.type_name not in PLAIN_TYPES:
        return raw.view(n_rows, row_bytes)
    shape = tensor.shape if rows is None else (n_rows, row_length)
    return view_as(raw, PLAIN_TYPES[tensor.type_name].torch, shape)


def gguf_header(
    metadata: Mapping[str, GGUFValue], tensors: Sequence[tuple[str, tuple[int, ...], str]]
) -> tuple[bytes, list[int]]:
    """Keys and `(name, shape, ggml type name)` -> the v3 header, padded, and each tensor's absolute offset.

    The tensors follow in the order given, each aligned to `general.alignment` (32 if absent); a
    reader also expects the file's end padded to it.
    """
    _check_rows(tensors)
    alignment = alignment_of(Path("GGUF header"), metadata)
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_pack_string(key), struct.pack("<I", value.type), _pack_value(key, value)]
    offsets, end = [], 0
    for name, shape, type_name in tensors:
        number = GGML_TYPES[type_name.lower()].number
        ne = tuple(reversed(shape))
        parts += [_pack_string(name), struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, number, end)]
        offsets.append(end)
        end += gguf_nbytes(type_name, shape)
        end += -end % alignment
    header = b"".join(parts)
    header += bytes(-len(header) % alignment)
    return header, [len(header) + offset for offset in offsets]


def _check_rows(tensors: Sequence[tuple[str, tuple[int, ...], str]]) -> None:
    faults: list[str] = []
    seen: set[str] = set()
    for name, shape, type_name in tensors:
        length = len(name.encode())
        if not 0 < length <= MAX_NAME:
            faults.append(
                f"tensor name {name!r} is {length} bytes long, 1 to {MAX_NAME} are allowed; rename it"
            )
        if name in seen:
            faults.append(f"two tensors are called {name!r}; rename one")
        seen.add(name)
        if not 1 <= len(shape) <= MAX_DIMS:
            faults.append(f"tensor {name!r}: shape {shape}: 1 to {MAX_DIMS} dimensions exist")
        try:
            gguf_nbytes(type_name, shape)
        except FileError as error:
            faults.append(f"tensor {name!r}: {error}")
    raise_all(FileError, "GGUF header", faults)


def _pack_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pack_value(key: str, value: GGUFValue) -> bytes:
    try:
        if value.type == GGUFValueType.STRING:
            return _pack_string(value.value)
        if value.type != GGUFValueType.ARRAY:
            return struct.pack("<" + SCALARS[value.type], value.value)
        if value.item is None:
            raise FileError(f"GGUF key {key!r}: an array needs the type of its items")
        start = struct.pack("<IQ", value.item, len(value.value))
        if value.item == GGUFValueType.STRING:
            return start + b"".join(_pack_string(text) for text in value.value)
        if value.item == GGUFValueType.ARRAY:
            return start + b"".join(_pack_value(key, inner) for inner in value.value)
        return start + struct.pack(f"<{len(value.value)}{SCALARS[value.item]}", *value.value)
    except (struct.error, AttributeError, OverflowError) as error:
        kind = (value.item or value.type).name
        raise FileError(f"GGUF key {key!r}: {str(value.value)[:60]} does not fit {kind} ({error})") from error
