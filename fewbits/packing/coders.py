"""The entropy coders: what makes bytes shorter by how often each of them occurs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import FileError
from . import huffman, rans


@dataclass(frozen=True)
class Coder:
    """table: counts `(256,)` int64 -> what a file stores of them, `(256,)` of dtype. bits: of so many symbols
    by a table. overhead: bytes of a stream besides them. encode, decode: see rans.py."""

    name: str
    dtype: torch.dtype
    overhead: int
    table: Callable[[torch.Tensor], torch.Tensor]
    bits: Callable[[torch.Tensor, torch.Tensor], float]
    encode: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    decode: Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor | None], torch.Tensor | None]

    @property
    def table_bytes(self) -> int:
        return 256 * self.dtype.itemsize


RANS = Coder("rans", torch.int16, rans.STREAM, rans.frequencies, rans.coded_bits, rans.encode, rans.decode)
HUFFMAN = Coder(
    "huffman",
    torch.uint8,
    huffman.STREAM,
    huffman.lengths,
    huffman.coded_bits,
    huffman.encode,
    huffman.decode,
)
CODERS = {coder.name: coder for coder in (RANS, HUFFMAN)}


def coder_named(name: str) -> Coder:
    if name not in CODERS:
        raise FileError(f"no coder {name!r} is known; there are {', '.join(CODERS)}")
    return CODERS[name]
