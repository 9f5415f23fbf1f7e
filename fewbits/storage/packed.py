"""Packed files are read as the files that they pack.

A path that ends in SUFFIX is that of a packed file (packing/container.py). Everything here that reads ranges
of a file (`map_bytes`, `read_bytes`, the headers of safetensors and GGUF) reads what it packs; so whatever
opens models opens packed ones, by the path of the packed file. `READERS` has the reader, which files/open.py
adds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..errors import FileError
from ..lazy import torch

SUFFIX = ".packed.safetensors"


class Contents(Protocol):
    """The file that a packed one packs."""

    nbytes: int
    head: bytes  # what is before its first tensor

    def part(self, offset: int, nbytes: int, what: str) -> torch.Tensor:
        """Bytes `offset : offset + nbytes` of it, u8; FileError beyond its end, or where it is damaged."""


READERS: dict[str, Callable[[Path], Contents]] = {}


def is_packed(path: Path) -> bool:
    return path.name.endswith(SUFFIX)


def contents(path: Path) -> Contents:
    """Of a packed file; FileError for one that is none."""
    if SUFFIX not in READERS:
        raise FileError(f"{path}: is packed; open it with fewbits.open")
    return READERS[SUFFIX](path)


def plain_name(path: Path) -> str:
    """The name without SUFFIX."""
    return path.name.removesuffix(SUFFIX)


def found_at(path: Path) -> Path:
    """The file, or where it is not there its packed file, if that is."""
    packed = path.with_name(path.name + SUFFIX)
    return packed if not path.exists() and packed.is_file() else path
