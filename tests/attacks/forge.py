"""Build safetensors and GGUF files byte by byte, so that any field can lie."""

import json
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9  # GGUF value types
F32, Q8_0 = 0, 8  # ggml types


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """`header`: JSON value, or bytes as they are; `length`: what the file claims of it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def row(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + u32(kind) + value


def tensor(name: str, ne: list[int], kind: int, offset: int, dims: int | None = None) -> bytes:
    sizes = b"".join(u64(size) for size in ne)
    return string(name) + u32(len(ne) if dims is None else dims) + sizes + u32(kind) + u64(offset)


def gguf(
    keys: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
) -> bytes:
    counts = u64(len(tensors) if tensor_count is None else tensor_count)
    counts += u64(len(keys) if key_count is None else key_count)
    header = b"GGUF" + u32(version) + counts + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@contextmanager
def allocates_below(nbytes: int) -> Iterator[None]:
    """Fails where Python allocates more inside: what a header claims is never taken at its word."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < nbytes
