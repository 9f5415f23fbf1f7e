"""Canonical Huffman codes of bytes, as in Deep Compression (Han et al., arXiv 1510.00149), of at most 12
bits.

The lengths are the best of that limit (package-merge: Larmore, Hirschberg 1990). csrc/huffman.h describes the
streams and decodes them; encoding is numpy's, and decoding without the core plain Python.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

from .. import core

BITS, STREAMS = 12, 8
STREAM = 5 * STREAMS  # bytes that a piece takes besides its symbols


def lengths(counts: torch.Tensor) -> torch.Tensor:
    """Counts of each byte `(256,)` int64 -> lengths of their codes `(256,)` u8, 0 where it does not occur."""
    found = torch.zeros(256, dtype=torch.uint8)
    used = [(count, (symbol,)) for symbol, count in enumerate(counts.tolist()) if count]
    used.sort()
    if len(used) < 2:
        found[[symbol for _, (symbol,) in used]] = 1
        return found
    coins: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(BITS):
        pairs = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(coins[::2], coins[1::2], strict=False)]
        coins = sorted(used + pairs, key=lambda coin: coin[0])
    for _, symbols in coins[: 2 * len(used) - 2]:
        for symbol in symbols:
            found[symbol] += 1
    return found


def coded_bits(counts: torch.Tensor, table: torch.Tensor) -> float:
    """Bits that symbols of these counts take."""
    return float((counts * table).sum())


def codes(table: torch.Tensor) -> np.ndarray:
    """Lengths `(256,)` -> the canonical code of each symbol, in its low bits."""
    found, code = np.zeros(256, dtype=np.int64), 0
    for length in range(1, BITS + 1):
        for symbol in np.flatnonzero(table.numpy() == length):
            found[symbol], code = code, code + 1
        code <<= 1
    return found


def encode(symbols: torch.Tensor, table: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
    """Bytes `(n,)` u8 -> their piece, u8. table: lengths `(256,)`, or `(t, 256)` with classes `(n,)`."""
    tables = table.reshape(-1, 256)
    of = np.zeros(len(symbols), dtype=np.int64) if classes is None else classes.numpy().astype(np.int64)
    place = of * 256 + symbols.numpy()
    size = tables.numpy().reshape(-1)[place].astype(np.int64)
    code = np.concatenate([codes(each) for each in tables])[place]
    parts = [_bits(code[j::STREAMS], size[j::STREAMS]) for j in range(STREAMS)]
    head = struct.pack(f"<{STREAMS}I", *(len(part) for part in parts))
    raw = head + b"".join(np.packbits(part).tobytes() for part in parts)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _bits(code: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Codes one after the other, a number for each bit."""
    end = size.cumsum()
    out = np.zeros(int(end[-1]) if len(end) else 0, dtype=np.uint8)
    for bit in range(BITS):  # the lowest first
        here = size > bit
        out[end[here] - 1 - bit] = code[here] >> bit & 1
    return out


def decode(
    piece: torch.Tensor, table: torch.Tensor, count: int, classes: torch.Tensor | None = None
) -> torch.Tensor | None:
    """A piece u8 -> its `count` bytes; None if it is none of so many."""
    if not core.available():
        return decode_reference(piece, table, count, classes)
    out = torch.empty(count, dtype=torch.uint8)
    return out if core.huffman_decode(piece, table, out, classes) else None


def decode_reference(
    piece: torch.Tensor, table: torch.Tensor, count: int, classes: torch.Tensor | None = None
) -> torch.Tensor | None:
    """`decode` in plain Python."""
    tables, raw = table.reshape(-1, 256), piece.numpy()
    kraft = torch.where(tables > 0, 2.0**BITS / 2 ** tables.double(), 0.0).sum(1)
    if len(raw) < 4 * STREAMS or int(tables.max()) > BITS or bool((kraft > 2**BITS).any()):
        return None
    books = [{(int(t[s]), int(c)): s for s, c in enumerate(codes(t)) if t[s]} for t in tables]
    of = [0] * count if classes is None else classes.tolist()
    sizes = struct.unpack(f"<{STREAMS}I", raw[: 4 * STREAMS].tobytes())
    out, at = bytearray(count), 4 * STREAMS
    for j, size in enumerate(sizes):
        bits = np.unpackbits(raw[at : at + -(-size // 8)]).tolist()[:size]
        at, used = at + -(-size // 8), 0
        if len(bits) < size:
            return None
        for i in range(j, count, STREAMS):
            code = length = 0
            while (length, code) not in books[of[i]]:
                if used == size or length == BITS:
                    return None
                code, length, used = code << 1 | bits[used], length + 1, used + 1
            out[i] = books[of[i]][length, code]
        if used != size:
            return None
    if at != len(raw):
        return None
    return torch.frombuffer(out, dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
