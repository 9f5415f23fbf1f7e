"""Small pieces of safe writing: whole files by rename, directories, one error for a disk that refuses."""

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
    """Make `path` and its parents unless they are there; FileError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"{path}: this directory cannot be made: {error.strerror}; choose another output"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file so that `path` holds either what it held before or all of `data`."""
    write_file_atomic(path, [data])


def write_file_atomic(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file, given in parts, so that `path` holds either what it held before or all of them."""
    path = Path(path)
    temporary = None
    try:
        # A name that nobody can foresee, made by this process or not at all: no link is followed.
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
    """The mode bits that this process leaves out of new files; read by setting, as there is no other way."""
    current = os.umask(0o077)
    os.umask(current)
    return current


def as_bytes(chunk: Chunk) -> memoryview:
    """A chunk's bytes as they lie in memory, in C order."""
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
    """For a file that the disk refuses; of a streamed one the unfinished part stays, if it came so far."""
    partial = f"{path.name}.partial"
    there = os.path.exists(path.parent / partial)  # Path.exists raises for a name that is too long
    kept, resume = (f"what is done stays in {partial}: ", " to resume") if there else ("", "")
    return FileError(
        f"{path}: cannot be written: {error.strerror or error}; {kept}see to the cause (space, permission, "
        f"limits) and run again{resume}"
    )
