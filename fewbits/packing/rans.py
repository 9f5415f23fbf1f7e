"""rANS streams of bytes: by the C++ core (csrc/rans.h, which describes them), or slowly by plain Python.

Frequencies are counts of a whole array, scaled to a sum of 4096; every byte that occurs has at least 1.
"""

from __future__ import annotations

import struct

import torch

from .. import core

BITS, STATES, LOW = 12, 8, 1 << 16
TOTAL = 1 << BITS


def frequencies(counts: torch.Tensor) -> torch.Tensor:
    """Counts of each byte `(256,)` int64 -> frequencies `(256,)` int16 of sum 4096."""
    total = int(counts.sum())
    share = counts.double() * TOTAL / max(1, total)
    found = torch.where(counts > 0, share.round().clamp(min=1), 0.0)
    # What is over or missing is taken where a step changes the length of the code least.
    while (rest := TOTAL - int(found.sum())) != 0:
        step = 1 if rest > 0 else -1
        cost = -counts.double() * ((found + step).clamp(min=1e-9) / found.clamp(min=1e-9)).log2()
        cost = torch.where((counts > 0) & (found + step >= 1), cost, torch.inf)
        if not total:
            cost = torch.arange(256, dtype=torch.float64)
        best = cost.topk(min(abs(rest), int(cost.isfinite().sum())), largest=False).indices
        found[best[: abs(rest)]] += step
    return found.to(torch.int16)


def coded_bits(counts: torch.Tensor, frequency: torch.Tensor) -> float:
    """Bits that symbols of these counts take, besides the states of a stream."""
    used = counts > 0
    return float((counts[used].double() * (BITS - frequency[used].double().log2())).sum())


def encode(symbols: torch.Tensor, frequency: torch.Tensor) -> torch.Tensor:
    """Bytes `(n,)` u8 -> their stream, u8."""
    if core.available():
        return core.rans_encode(symbols, frequency)
    return encode_reference(symbols, frequency)


def decode(stream: torch.Tensor, frequency: torch.Tensor, count: int) -> torch.Tensor | None:
    """A stream u8 -> its `count` bytes; None if it is none of so many."""
    if not core.available():
        return decode_reference(stream, frequency, count)
    out = torch.empty(count, dtype=torch.uint8)
    return out if core.rans_decode(stream, frequency, out) else None


def encode_reference(symbols: torch.Tensor, frequency: torch.Tensor) -> torch.Tensor:
    """`encode` in plain Python."""
    wide = frequency.to(torch.int64)
    starts, shares = (wide.cumsum(0) - wide).tolist(), wide.tolist()
    states, words = [LOW] * STATES, []
    values = symbols.tolist()
    for i in range(len(values) - 1, -1, -1):
        share, x = shares[values[i]], states[i % STATES]
        if x >= share << 20:
            words.append(x & 0xFFFF)
            x >>= 16
        states[i % STATES] = (x // share << BITS) + x % share + starts[values[i]]
    raw = struct.pack(f"<{STATES}I{len(words)}H", *states, *reversed(words))
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def decode_reference(stream: torch.Tensor, frequency: torch.Tensor, count: int) -> torch.Tensor | None:
    """`decode` in plain Python."""
    raw = stream.numpy().tobytes()
    if len(raw) < 4 * STATES or len(raw) % 2 or int(frequency.min()) < 0 or int(frequency.sum()) != TOTAL:
        return None
    states = list(struct.unpack(f"<{STATES}I", raw[: 4 * STATES]))
    words = struct.unpack(f"<{(len(raw) - 4 * STATES) // 2}H", raw[4 * STATES :])
    wide = frequency.to(torch.int64)
    starts, shares = (wide.cumsum(0) - wide).tolist(), wide.tolist()
    symbol_of = torch.arange(256).repeat_interleave(wide).tolist()
    out, at = bytearray(count), 0
    for i in range(count):
        x = states[i % STATES]
        out[i] = symbol = symbol_of[x & (TOTAL - 1)]
        x = shares[symbol] * (x >> BITS) + (x & (TOTAL - 1)) - starts[symbol]
        if x < LOW:
            if at == len(words):
                return None
            x, at = x << 16 | words[at], at + 1
        states[i % STATES] = x
    if at != len(words) or any(x != LOW for x in states):
        return None
    return torch.frombuffer(out, dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
