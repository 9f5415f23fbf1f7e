"""Maps one byte range of a file as a tensor.

    file    |------------|####################|---------------|
                      ^  offset               offset + nbytes
            |---------|  page boundary: the map starts here     (MAP_PRIVATE: copy on write)

A map of the whole file keeps every page that was read resident until the file is closed. Here each tensor has
a map of its own range, which is released with the last tensor that shares it, so resident memory depends on
the tensors in use, not on the size of the file. The map is made through the C library because Python's `mmap`
keeps a file descriptor open for each map (before 3.13), and a checkpoint has more tensors than a process may
have descriptors. Small ranges are read instead: they share pages with their neighbours, and the number of
maps is limited, too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

from ..errors import FileError
from ..lazy import torch
from .json import regular_size
from .packed import contents, is_packed

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAP_FROM = 64 * 2**10  # bytes; shorter ranges are read
_MAP_FAILED = ctypes.c_void_p(-1).value


def first_bytes(path: Path, count: int) -> bytes:
    """Up to `count` bytes from the start of a regular file; FileError for anything else."""
    regular_size(path)
    if is_packed(path):
        inner = contents(path)
        return inner.part(0, min(count, inner.nbytes), "its start").numpy().tobytes()
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


@contextmanager
def _opened(path: Path, end: int, name: str) -> Iterator[int]:
    """A descriptor of a file that has at least `end` bytes; FileError otherwise."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise FileError(f"{path}: {name!r} cannot be read: {error.strerror}") from error
    try:
        size = os.fstat(descriptor).st_size
        if end > size:
            raise FileError(
                f"{path}: {name!r} ends at byte {end}, the file has {size}; it changed since it "
                "was opened: open it again, or fetch it again"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def read_bytes(path: Path, offset: int, nbytes: int, name: str = "range") -> bytes:
    """Bytes `offset : offset + nbytes` of `path`, read; raises FileError like `map_bytes`."""
    if is_packed(path):
        return contents(path).part(offset, nbytes, name).numpy().tobytes()
    return _read(path, offset, nbytes, name)


def _read(path: Path, offset: int, nbytes: int, name: str) -> bytes:
    with _opened(path, offset + nbytes, name) as descriptor:
        return os.pread(descriptor, nbytes, offset)


def map_bytes(path: Path, offset: int, nbytes: int, name: str = "range") -> torch.Tensor:
    """Bytes `offset : offset + nbytes` of `path` -> `(nbytes,)` u8, private and writable; of a packed file,
    of what it packs.

    Raises FileError when the file cannot be opened or has become shorter than that.
    """
    if is_packed(path):
        return contents(path).part(offset, nbytes, name).clone()
    return map_raw(path, offset, nbytes, name)


def map_raw(path: Path, offset: int, nbytes: int, name: str = "range") -> torch.Tensor:
    """The same of the file as it is on disk."""
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    if nbytes < MAP_FROM:
        return torch.frombuffer(bytearray(_read(path, offset, nbytes, name)), dtype=torch.uint8)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset + nbytes - start
    with _opened(path, offset + nbytes, name) as descriptor:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(None, length, protection, mmap.MAP_PRIVATE, descriptor, start)
    if address == _MAP_FAILED or address is None:
        reason = os.strerror(ctypes.get_errno())
        raise FileError(f"{path}: {name!r}: mapping {length} bytes failed: {reason}; free memory and retry")
    pages = (ctypes.c_ubyte * length).from_address(address)
    # At interpreter exit tensors may outlive finalizers; the system unmaps them then.
    weakref.finalize(pages, _libc.munmap, address, length).atexit = False
    return torch.frombuffer(pages, dtype=torch.uint8, count=nbytes, offset=offset - start)


def absurd(shape: Sequence[int]) -> bool:
    """Whether an empty tensor has other sizes that torch does not support."""
    return prod(max(1, size) for size in shape) > 2**56


def view_as(raw: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """`(nbytes,)` u8 -> `shape` of `dtype`; shares the bytes, copies only if they are not aligned."""
    if raw.numel() == 0:
        return torch.empty(shape, dtype=dtype)
    if raw.data_ptr() % dtype.itemsize or raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)
