"""rANS streams of bytes: by the C++ core (csrc/rans.h, which describes them), or slowly by plain Python.

Frequencies are counts of a whole array, scaled to a sum of 4096; every byte that occurs has at least 1. Where
bytes belong to classes, each class has its own frequencies: classes `(n,)` u8 has the row of a table `(t,
256)`.
"""

from __future__ import annotations

import struct

import torch

from .. import core

BITS, STATES, LOW = 12, 32, 1 << 16
TOTAL = 1 << BITS
STREAM = 4 * STATES + 2  # bytes that a stream takes besides its symbols


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
        found[best] += step
    return found.to(torch.int16)


def coded_bits(counts: torch.Tensor, frequency: torch.Tensor) -> float:
    """Bits that symbols of these counts take, besides the states of a stream."""
    used = counts > 0
    return float((counts[used].double() * (BITS - frequency[used].double().log2())).sum())


def encode(
    symbols: torch.Tensor, frequency: torch.Tensor, classes: torch.Tensor | None = None
) -> torch.Tensor:
    """Bytes `(n,)` u8 -> their stream, u8."""
    if core.available():
        return core.rans_encode(symbols, frequency, classes)
    return encode_reference(symbols, frequency, classes)


def decode(
    stream: torch.Tensor, frequency: torch.Tensor, count: int, classes: torch.Tensor | None = None
) -> torch.Tensor | None:
    """A stream u8 -> its `count` bytes; None if it is none of so many."""
    if not core.available():
        return decode_reference(stream, frequency, count, classes)
    out = torch.empty(count, dtype=torch.uint8)
    return out if core.rans_decode(stream, frequency, out, classes) else None


def encode_reference(
    symbols: torch.Tensor, frequency: torch.Tensor, classes: torch.Tensor | None = None
) -> torch.Tensor:
    """`encode` in plain Python."""
    wide = frequency.reshape(-1, 256).to(torch.int64)
    starts, shares = (wide.cumsum(1) - wide).tolist(), wide.tolist()
    states, words = [LOW] * STATES, []
    values, of = symbols.tolist(), [0] * len(symbols) if classes is None else classes.tolist()
    for i in range(len(values) - 1, -1, -1):
        share, x = shares[of[i]][values[i]], states[i % STATES]
        if x >= share << 20:
            words.append(x & 0xFFFF)
            x >>= 16
        states[i % STATES] = (x // share << BITS) + x % share + starts[of[i]][values[i]]
    raw = struct.pack(f"<{STATES}I{len(words)}H", *states, *reversed(words))
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def decode_reference(
    stream: torch.Tensor, frequency: torch.Tensor, count: int, classes: torch.Tensor | None = None
) -> torch.Tensor | None:
    """`decode` in plain Python."""
    raw, tables = stream.numpy().tobytes(), frequency.reshape(-1, 256)
    fine = int(tables.min()) >= 0 and bool((tables.sum(1) == TOTAL).all())
    if len(raw) < 4 * STATES or len(raw) % 2 or not fine:
        return None
    states = list(struct.unpack(f"<{STATES}I", raw[: 4 * STATES]))
    words = struct.unpack(f"<{(len(raw) - 4 * STATES) // 2}H", raw[4 * STATES :])
    wide = tables.to(torch.int64)
    starts, shares = (wide.cumsum(1) - wide).tolist(), wide.tolist()
    symbols = [torch.arange(256).repeat_interleave(table).tolist() for table in wide]
    of = [0] * count if classes is None else classes.tolist()
    found, used = bytearray(count), 0
    for i in range(count):
        x, t = states[i % STATES], of[i]
        symbol = symbols[t][x % TOTAL]
        x = shares[t][symbol] * (x >> BITS) + x % TOTAL - starts[t][symbol]
        if x < LOW:
            if used == len(words):
                return None
            x, used = x << 16 | words[used], used + 1
        states[i % STATES], found[i] = x, symbol
    if used != len(words) or any(x != LOW for x in states):
        return None
    return torch.frombuffer(found, dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
