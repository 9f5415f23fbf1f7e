"""Safe writing: whole files by rename, directories, one error for a failing disk."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from ..errors import FileError
from ..lazy import torch

Chunk: TypeAlias = "bytes | bytearray | memoryview | torch.Tensor"


def make_directory(path: Path) -> None:
    """Make `path` and its parents if missing; FileError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"{path}: this directory cannot be made: {error.strerror}; choose another output"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file so that `path` has either its old content or all of `data`."""
    write_file_atomic(path, [data])


def write_file_atomic(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file, given in parts, so that `path` has either its old content or all of them."""
    path = Path(path)
    temporary = None
    try:
        # An unpredictable name, created exclusively: no link is followed.
        descriptor, name = tempfile.mkstemp(".tmp", f".{path.name[:64]}.", path.parent)
        temporary = Path(name)
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o666 & ~_umask())
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if temporary is not None:
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise failed(path, error) from error
        raise


def _umask() -> int:
    """The umask of this process; it can only be read by setting it."""
    current = os.umask(0o077)
    os.umask(current)
    return current


def as_bytes(chunk: Chunk) -> memoryview:
    """The bytes of a chunk in C order."""
    if isinstance(chunk, torch.Tensor):
        chunk = chunk.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    view = memoryview(chunk)
    plain = view.format == "B" and view.ndim == 1 and view.contiguous
    return view if plain else memoryview(view.tobytes())


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def failed(path: Path, error: OSError) -> FileError:
    """The error for a failed write; the unfinished part of a streamed file is kept."""
    partial = f"{path.name}.partial"
    there = os.path.exists(path.parent / partial)  # Path.exists raises for a name that is too long
    kept, resume = (f"what is done stays in {partial}: ", " to resume") if there else ("", "")
    return FileError(
        f"{path}: cannot be written: {error.strerror or error}; {kept}see to the cause (space, permission, "
        f"limits) and run again{resume}"
    )
