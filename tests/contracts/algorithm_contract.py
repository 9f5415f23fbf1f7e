"""What every algorithm promises on every format, as functions that take both and assert.

A new algorithm is registered and passes all of it: see `PROMISES`, and test_algorithms.py, which crosses
them with the registry of formats. METRICS says what each minimizes, and so what it must not do worse
than rounding to nearest.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fewbits.algorithms import ALGORITHMS, NEEDS
from fewbits.algorithms.hessian import loss
from fewbits.calibrate.stats import Stats
from fewbits.errors import CalibrationError, FormatError
from fewbits.formats import Format
from fewbits.qtensor import QTensor

Metric = Callable[[torch.Tensor, torch.Tensor, Stats], float]


def squares(q: torch.Tensor, w: torch.Tensor, stats: Stats) -> float:
    return float((q - w).double().square().sum())


def weighted_squares(q: torch.Tensor, w: torch.Tensor, stats: Stats) -> float:
    return float(((q - w).double().square() * stats.mean_square).sum())


def robust(q: torch.Tensor, w: torch.Tensor, stats: Stats) -> float:
    return float((q - w).double().abs().pow(0.7).sum())


def output_error(q: torch.Tensor, w: torch.Tensor, stats: Stats) -> float:
    assert stats.hessian is not None
    return float(loss(q, w, stats.hessian).sum())


# A metric sums a few hundred terms of values that f32 rounds.
SUM_ERROR = 512 * 2**-24
# Where internal block sizes stand, and a small one: columns, or numbers at once of rows that stand alone.
BLOCK_SIZES = (
    ("fewbits.algorithms.gptq", "UNIT", 16),
    ("fewbits.algorithms.descent", "UNIT", 16),
    ("fewbits.algorithms.ecsq", "UNIT", 16),
    ("fewbits.algorithms.ecsq", "PIECE", 512),
    ("fewbits.algorithms.gptq", "PIECE", 512),
    ("fewbits.formats.base", "CHUNK", 512),
)
METRICS: dict[str, Metric] = {
    "rtn": squares,
    "hqq": robust,
    "weighted": weighted_squares,
    "gptq": output_error,
    "ecsq": output_error,
}
# How far the loss may differ for another internal block size (columns.UNIT, gptq.PIECE, formats.base.CHUNK):
# none changes a bit, but in gptq, where products of matrices sum in another order and a weight that lies
# between two codes may take the other one. Measured: 10 of 74 formats differ at all, int7_g128 by 2.4 %.
BLOCK_TOLERANCE = {"gptq": 0.03, "ecsq": 0.03}  # 0 for all others


def columns_of(format: Format) -> int:
    return 256 if format.block == 256 else 64


def sample(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, Stats]:
    """A weight and the statistics of correlated inputs whose columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * 0.1
    w *= torch.where(torch.rand(n, k, generator=generator) < 0.02, 4.0, 1.0)
    mix = torch.randn(k, k, generator=generator) * torch.rand(k, generator=generator)
    return w, Stats.of(torch.randn(4 * k, k, generator=generator) @ mix)


def same(a: QTensor, b: QTensor) -> bool:
    return a.shape == b.shape and all(torch.equal(a.planes[name], b.planes[name]) for name in a.planes)


def no_worse_than_rounding(name: str, format: Format) -> None:
    """By its own measure."""
    w, stats = sample(6, columns_of(format))
    q = ALGORITHMS.get(name)(w, format, stats)
    assert q.format == format and q.shape == tuple(w.shape)
    ours, plain = (METRICS[name](x.decode(), w, stats) for x in (q, format.encode(w)))
    assert ours <= plain * (1 + SUM_ERROR)


def the_same_every_time(name: str, format: Format) -> None:
    """And from statistics made anew, or none where none are needed; the weight stays as it was."""
    w, stats = sample(3, columns_of(format), 1)
    before = w.clone()
    once = ALGORITHMS.get(name)(w, format, stats)
    anew = None if NEEDS[name] == "nothing" else sample(3, columns_of(format), 1)[1]
    again = ALGORITHMS.get(name)(before.clone(), format, anew)
    assert same(once, again) and torch.equal(w, before)


def hard_weights_survive(name: str, format: Format) -> None:
    """One row, dead columns, a zero weight: finite, and zero stays zero."""
    k = columns_of(format)
    w, stats = sample(1, k, 2)
    assert stats.hessian is not None
    alive = (torch.arange(k) % 3 > 0).float()
    dead = Stats(
        stats.count, stats.absmax * alive, stats.mean_square * alive, stats.hessian * alive * alive[:, None]
    )
    decoded = ALGORITHMS.get(name)(w, format, dead).decode()
    assert bool(decoded.isfinite().all())
    assert (decoded - w).abs().max() <= 2 * w.abs().max()
    assert not ALGORITHMS.get(name)(torch.zeros(2, k), format, stats).decode().any()


def one_column_works_or_raises(name: str, format: Format) -> None:
    for k in (1, 37):
        w, stats = sample(2, k, 3)
        if k % format.block:
            with pytest.raises(FormatError, match=f"{k} is not a multiple of {format.block}"):
                ALGORITHMS.get(name)(w, format, stats)
        else:
            assert bool(ALGORITHMS.get(name)(w, format, stats).decode().isfinite().all())


def bad_statistics_raise(name: str, format: Format) -> None:
    """Each says so, where statistics are needed."""
    if NEEDS[name] == "nothing":
        return
    k = columns_of(format)
    w, stats = sample(2, k)
    bad: list[tuple[Any, str]] = [(None, "calibrate"), (sample(2, 2 * k)[1], f"{k} columns, .* {2 * k}")]
    for value in (torch.nan, torch.inf):
        spoilt = sample(2, k)[1]
        (spoilt.mean_square if NEEDS[name] == "mean_square" else spoilt.hessian).view(-1)[3] = value
        bad.append((spoilt, "1 entries that are NaN or infinite"))
    if NEEDS[name] == "hessian":
        bad.append((Stats(stats.count, stats.absmax, stats.mean_square), "needs the Hessian"))
    for wrong, message in bad:
        with pytest.raises(CalibrationError, match=message):
            ALGORITHMS.get(name)(w, format, wrong)


def any_block_size_gives_the_same(name: str, format: Format) -> None:
    """Bit for bit, or where the algorithm states a tolerance, within it by its own measure."""
    w, stats = sample(6, 256 if 256 % format.block == 0 else columns_of(format))
    algorithm = ALGORITHMS.get(name)
    whole = algorithm(w, format, stats)
    for module, constant, size in BLOCK_SIZES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.import_module(module), constant, size)
            cut = algorithm(w, format, stats)
        if not same(cut, whole):
            assert BLOCK_TOLERANCE.get(name, 0.0) > 0, constant
            losses = [METRICS[name](q.decode(), w, stats) for q in (cut, whole)]
            assert losses[0] == pytest.approx(losses[1], rel=BLOCK_TOLERANCE.get(name, 0.0), abs=0), constant


PROMISES = (
    any_block_size_gives_the_same,
    no_worse_than_rounding,
    the_same_every_time,
    hard_weights_survive,
    one_column_works_or_raises,
    bad_statistics_raise,
)
