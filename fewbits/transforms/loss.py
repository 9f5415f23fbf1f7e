"""The output error from quantizing a pair's consumers with a scale s: the loss that searches minimize.

    E = Q(W s) / s - W                the error of a consumer's weight for the unscaled input
    sum over tokens |E x|^2 = count * tr(E H E^T)            H = mean x x^T of its input

A few rows of each consumer represent all: rows are independent in nearly every format, and the best scale
depends on the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..calibrate.stats import Stats
from ..errors import CalibrationError
from ..formats.base import Format
from ..qtensor import QTensor
from .pairs import Pair, rescaled

Quantizer = Callable[[torch.Tensor, Format, Stats], QTensor]
LEAST_ROWS = 16


def weighted(w: torch.Tensor, format: Format, stats: Stats) -> QTensor:
    """Round to nearest, with scales searched under mean x^2."""
    return format.encode(w, stats.mean_square)


@dataclass(frozen=True)
class Reader:
    """One consumer to be quantized: a sample of its rows `(r, k)`, out of `of` rows."""

    name: str
    w: torch.Tensor
    of: int
    format: Format
    stats: Stats

    @property
    def share(self) -> float:
        """Rows of the weight for each row of the sample, times the tokens that read it."""
        return self.of / self.w.shape[0] * self.stats.count


def readers_of(
    weights: Mapping[str, torch.Tensor],
    pair: Pair,
    stats: Mapping[str, Stats],
    formats: Mapping[str, Format | None],
    rows: int,
) -> list[Reader]:
    """The consumers that get a format and saw tokens; `rows` rows are distributed among them.

    Raises CalibrationError listing consumers without statistics.
    """
    names = [name for name in pair.consumers if formats.get(name) is not None]
    missing = [name for name in names if name not in stats]
    if missing:
        raise CalibrationError(
            f"{pair.name}: no statistics of the input of {', '.join(missing)}; capture them first"
        )
    names = [name for name in names if stats[name].count > 0]
    readers = []
    for name in names:
        w, format = weights[name], formats[name]
        assert format is not None
        take = min(w.shape[0], max(LEAST_ROWS, rows // len(names)))
        sample = torch.linspace(0, w.shape[0] - 1, take).long()
        readers.append(Reader(name, w[sample].float(), w.shape[0], format, stats[name]))
    return readers


def weight_loss(reader: Reader, pair: Pair, scale: torch.Tensor, quantize: Quantizer = weighted) -> float:
    """Expected squared output error of one consumer, summed over its outputs and tokens."""
    hessian = reader.stats.hessian
    if hessian is None:
        raise CalibrationError(f"{reader.name}: its statistics have no Hessian, which this search needs")
    s = pair.spread(scale)
    q = quantize(reader.w * s, reader.format, rescaled(reader.stats, pair, scale))
    error = q.decode() / s - reader.w
    return float(((error @ hessian) * error).sum(dtype=torch.float64)) * reader.share


def input_rms(pair: Pair, readers: list[Reader]) -> torch.Tensor:
    """Root mean square of the pair's activation, `(size,)`, over all tokens of all consumers."""
    count = sum(reader.stats.count for reader in readers)
    square = torch.stack([r.stats.mean_square * (r.stats.count / count) for r in readers]).sum(0)
    return pair.gathered(square, "mean").sqrt()


def input_absmax(pair: Pair, readers: list[Reader]) -> torch.Tensor:
    """Largest |x| of the pair's activation, `(size,)`, over all consumers."""
    return pair.gathered(torch.stack([absmax_of(reader) for reader in readers]).amax(0), "amax")


def absmax_of(reader: Reader) -> torch.Tensor:
    if reader.stats.absmax is None:
        raise CalibrationError(
            f"{reader.name}: its statistics have no largest magnitudes (an importance matrix has none), "
            "which smoothing needs; capture them from text"
        )
    return reader.stats.absmax


def column_sizes(pair: Pair, readers: list[Reader]) -> torch.Tensor:
    """Largest |w| of each column over all consumers' samples, `(size,)`."""
    return pair.gathered(torch.stack([reader.w.abs().amax(0) for reader in readers]).amax(0), "amax")


def column_rms(pair: Pair, readers: list[Reader]) -> torch.Tensor:
    """Root mean square of each column over all consumers' samples, `(size,)`."""
    square = torch.cat([reader.w for reader in readers]).square().mean(0)
    return pair.gathered(square, "mean").sqrt()


def ratio(top: torch.Tensor, power: float, below: torch.Tensor, power_below: float) -> torch.Tensor:
    """top^power / below^power_below; 1 for columns with a zero, which have no effect."""
    alive = (top > 0) & (below > 0)
    return torch.where(alive, top.pow(power) / below.pow(power_below), 1.0)
