"""Measures for about a second how fast this machine encodes a format, multiplies matrices and hashes.

Random matrices have the model's most common shape, reduced to a fraction of a second. Each step doubles the
rows until the time is long enough.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..algorithms import ALGORITHMS, NEEDS
from ..calibrate.stats import Stats
from ..errors import FewbitsError
from ..formats.base import Format, kind_of
from ..formats.plain import as_format

ENOUGH = 0.08  # seconds: least duration of a measurement
AGAIN = 0.5  # seconds: shorter measurements are repeated
WIDEST = 1024  # columns of a measured matrix with a Hessian; the cost of wider ones is scaled
MOST_ROWS = 4096  # of a measured matrix
DIGESTED = 8 * 2**20  # bytes


@dataclass(frozen=True)
class Encoding:
    """Seconds to choose the codes of a weight of `columns` columns and to measure the error: `fixed`, and
    `a_row` for each row. factor: of factoring one Hessian; None if none is needed."""

    columns: int
    fixed: float
    a_row: float
    factor: float | None = None

    def seconds(self, n: int, k: int) -> float:
        """Of an (n, k) weight. Error feedback costs n k^2, all else n k."""
        wider = k / self.columns
        return wider * (self.fixed + n * self.a_row * (1.0 if self.factor is None else max(1.0, wider)))

    def factoring(self, k: int) -> float:
        return (self.factor or 0.0) * (k / self.columns) ** 3


def encoding(
    format: Format, algorithm: str, options: Mapping[str, Any], shape: tuple[int, int], mismatch: bool = False
) -> Encoding:
    """Measure an algorithm on a format for weights like `shape`. mismatch: whether the float model's input is
    used."""
    n, k = shape
    hessian = NEEDS[algorithm] == "hessian"
    stats = None
    if NEEDS[algorithm] != "nothing":
        k = _columns(format, k)
        x = torch.randn(2 * k, k)
        stats = Stats.of(x, hessian, x * 1.01 if mismatch else None)
    weights = torch.randn(min(n, MOST_ROWS), k)

    def run(rows: int) -> float:
        start = time.perf_counter()
        q = ALGORITHMS.get(algorithm)(weights[:rows], format, stats, **options)
        format.distortion(weights[:rows], q)
        return time.perf_counter() - start

    few = rows = min(n, 32)
    first = run(few)
    base = spent = min(run(few), run(few))
    while (spent < ENOUGH and rows < len(weights)) or rows == few < len(weights):
        rows = min(len(weights), 8 * rows)
        spent = run(rows)
    if spent < AGAIN:  # other work on this machine only adds time
        spent = min(spent, run(rows))
    a_row = max(0.0, spent - base) / (rows - few) if rows > few else spent / rows
    fixed = max(0.0, base - few * a_row)
    return Encoding(k, fixed, a_row, max(0.0, first - base) if hessian else None)


def _columns(format: Format, k: int) -> int:
    """The widest row of at most WIDEST columns that the format supports."""
    if k <= WIDEST:
        return k
    for columns in range(WIDEST, 0, -1):
        try:
            format.check_shape(1, columns)
        except FewbitsError:
            continue
        return columns
    return k


def multiplying(shape: tuple[int, int], rows: int, dtype: torch.dtype = torch.float32) -> float:
    """Floating point operations per second of a linear layer `(n, k)` on `rows` tokens."""
    n, k = min(shape[0], 4096), min(shape[1], 4096)
    x, w = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
    torch.nn.functional.linear(x, w)
    spent, runs = 0.0, 0
    while spent < ENOUGH and runs < 100:
        spent += _timed(lambda: torch.nn.functional.linear(x, w))
        runs += 1
    return 2 * rows * n * k * runs / spent


def digesting() -> float:
    """Bytes per second of SHA-256."""
    data = bytes(DIGESTED)
    return DIGESTED / _timed(lambda: hashlib.sha256(data))


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def encodings(
    wanted: Mapping[tuple[str, str], tuple[tuple[int, int], Mapping[str, Any]]], mismatch: bool
) -> dict[tuple[str, str], Encoding]:
    """(format, algorithm) -> (shape, options) to (format, algorithm) -> its measurement."""
    return {
        (kind, algorithm): encoding(as_format(kind_of(kind)), algorithm, options, shape, mismatch)
        for (kind, algorithm), (shape, options) in wanted.items()
    }
