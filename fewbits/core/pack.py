"""The bit packer: low-bit codes <-> machine words.

The codes of a row form one little-endian bit stream: code i occupies bits `i * bits` to
`(i + 1) * bits - 1`, and bit b of the stream is bit `b % wordbits` of word `b // wordbits`.
Four bits in bytes put the first code in the low nibble; three bits straddle bytes:

    code     |0    |1    |2      |3    |4    |5      |6    |7    |
    bit       0 1 2 3 4 5 6 7|0 1 2 3 4 5 6 7|0 1 2 3 4 5 6 7
    byte      0              |1              |2

A *cell* is the fewest codes that fill whole words: 8 codes in 3 bytes here, 2 codes in 1 byte for
four bits, 32 codes in 3 words for three bits in int32. A row is padded with zero codes to a whole
cell. `order` permutes the codes of each cell: the one stored at position i is code `order[i]`, so
`(1, 0)` puts the first of two nibbles high (bitsandbytes) and `(0, 2, 4, 6, 1, 3, 5, 7)` in int32 is
the interleave of AWQ. A layout packed along the rows (GPTQ) is this one of the transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from ..errors import FormatError
from ..lazy import torch


def cell(bits: int, word: torch.dtype | None = None) -> tuple[int, int]:
    """(codes, words) of the smallest whole cell of `bits`-bit codes. word: bytes by default."""
    if not 1 <= bits <= 8:
        raise FormatError(f"pack: codes have 1 to 8 bits, not {bits}")
    if word is not None and word not in (torch.uint8, torch.int32):
        raise FormatError(f"pack: words are torch.uint8 or torch.int32, not {word}")
    wordbits = 8 if word is None else 8 * word.itemsize
    common = gcd(bits, wordbits)
    return wordbits // common, bits // common


def pack(
    codes: torch.Tensor, bits: int, word: torch.dtype | None = None, order: Sequence[int] | None = None
) -> torch.Tensor:
    """`(..., k)` uint8 codes below 2^bits -> `(..., ceil(k / cell) * words)` words."""
    count, words = cell(bits, word)
    word = word or torch.uint8
    permutation = _permutation(order, count)
    k = codes.shape[-1]
    if bits == 4 and order is None and word == torch.uint8 and k % 2 == 0:
        flat = codes.reshape(-1)
        flat = flat.clone() if flat.storage_offset() % 2 else flat
        pairs = flat.view(torch.int16)  # little-endian: the first code is the low byte
        return (pairs >> 4 | pairs).to(torch.uint8).reshape(*codes.shape[:-1], k // 2)
    padded = codes.new_zeros(*codes.shape[:-1], -(-k // count) * count)
    padded[..., :k] = codes
    cells = padded.reshape(*codes.shape[:-1], -1, count).to(word)
    wordbits = 8 * word.itemsize
    out = torch.zeros(*cells.shape[:-1], words, dtype=word, device=codes.device)
    for position, source in enumerate(permutation):
        index, offset = divmod(position * bits, wordbits)
        out[..., index] |= cells[..., source] << offset
        if offset + bits > wordbits:
            out[..., index + 1] |= cells[..., source] >> (wordbits - offset)
    return out.flatten(-2)


def unpack(packed: torch.Tensor, bits: int, k: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """`(..., words)` -> `(..., k)` uint8 codes: the first k of each row."""
    count, words = cell(bits, packed.dtype)
    permutation = _permutation(order, count)
    if packed.shape[-1] != -(-k // count) * words:
        raise FormatError(
            f"unpack: {k} codes of {bits} bits take {-(-k // count) * words} words of {packed.dtype}, "
            f"not {packed.shape[-1]}"
        )
    if bits == 4 and order is None and packed.dtype == torch.uint8:
        pairs = packed.to(torch.int16, memory_format=torch.contiguous_format)
        return (pairs << 4 | pairs).bitwise_and_(0x0F0F).view(torch.uint8)[..., :k]
    cells = packed.reshape(*packed.shape[:-1], -1, words)
    wordbits, mask = 8 * packed.dtype.itemsize, (1 << bits) - 1
    out = torch.empty(*cells.shape[:-1], count, dtype=torch.uint8, device=packed.device)
    for position, source in enumerate(permutation):
        index, offset = divmod(position * bits, wordbits)
        # A right shift of int32 is arithmetic: the mask removes the sign bits.
        code = (cells[..., index] >> offset) & min(mask, (1 << (wordbits - offset)) - 1)
        if offset + bits > wordbits:
            code = code | ((cells[..., index + 1] << (wordbits - offset)) & mask)
        out[..., source] = code.to(torch.uint8)
    return out.flatten(-2)[..., :k]


def _permutation(order: Sequence[int] | None, count: int) -> Sequence[int]:
    if order is None:
        return range(count)
    if sorted(order) != list(range(count)):
        raise FormatError(f"pack: order {tuple(order)} is not a permutation of the {count} codes of a cell")
    return order
