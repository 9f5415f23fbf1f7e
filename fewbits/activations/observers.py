"""Observers: the range of an activation that a static scheme covers.

There is one histogram for each site, from which every rule derives its range:

    bins    |...|...|...|...|...|...|...|...|       2 x 8192 bins of equal width over -2^e ... 2^e,
          -2^e              0              2^e      e the smallest with every |x| < 2^e

For a larger value, e grows and pairs of bins are merged. Widths are powers of two, so merged bins equal the
bins of a larger range: any order, any split into batches and any merge gives the same histogram, bit for bit.

    rule         range
    minmax       smallest ... largest value seen
    percentile   the narrowest, in whole bins, that contains a given share of all values
    mse          least mean squared error of quantizing
    entropy      least KL divergence of the histogram from its quantized version

mse and entropy try the min-max range scaled by RATIOS, the first of which is 1, so their cost is never above
that of min-max. Entropy is the calibration of TensorRT (Migacz, 8-bit Inference with TensorRT, GTC 2017): P
is the histogram, with values outside the range counted in its last bins; Q distributes the mass of each code
equally over its non-empty bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import frexp

import torch

from ..errors import CalibrationError, PlanError
from ..registry import Registry
from .quantizers import Affine, Scheme, quantize

HALF = 8192  # bins on each side of 0: at int8, 64 to a code
LEAST = -100  # the smallest exponent of a range; all zeros have it
RATIOS = 0.96 ** torch.arange(128, dtype=torch.float64)  # 1 ... 0.0056
KEEP = 0.9999  # of the values, inside the range of `percentile`


@dataclass(frozen=True)
class Histogram:
    """The histogram of one activation: count, low and high f64, exponent, bins `(2 * HALF,)` int64."""

    count: int
    low: float
    high: float
    exponent: int
    bins: torch.Tensor

    @staticmethod
    def of(x: torch.Tensor) -> Histogram:
        """Any shape, float -> its histogram. Raises CalibrationError for values that are not finite."""
        x = x.detach().flatten().double()
        if not x.numel():
            return Histogram(0, 0.0, 0.0, LEAST, torch.zeros(2 * HALF, dtype=torch.int64))
        low, high = (float(edge) for edge in torch.aminmax(x))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            bad = int((~x.isfinite()).sum())
            raise CalibrationError(
                f"{bad} of {x.numel()} activations are NaN or infinite; the model is damaged"
            )
        largest = max(-low, high)
        exponent = max(LEAST, frexp(largest)[1]) if largest else LEAST  # frexp(0) is 0
        index = (x * (HALF / 2.0**exponent)).floor().long() + HALF
        return Histogram(x.numel(), low, high, exponent, torch.bincount(index.cpu(), minlength=2 * HALF))

    def __add__(self, other: Histogram) -> Histogram:
        if not self.count or not other.count:
            return self if self.count else other
        exponent = max(self.exponent, other.exponent)
        return Histogram(
            self.count + other.count,
            min(self.low, other.low),
            max(self.high, other.high),
            exponent,
            self._bins_of(exponent) + other._bins_of(exponent),
        )

    def _bins_of(self, exponent: int) -> torch.Tensor:
        """The counts in the bins of a larger exponent."""
        if exponent == self.exponent:
            return self.bins
        index = torch.arange(-HALF, HALF) >> min(exponent - self.exponent, 62)
        return torch.zeros_like(self.bins).index_add_(0, index + HALF, self.bins)

    @property
    def width(self) -> float:
        """Of one bin."""
        return 2.0**self.exponent / HALF

    @property
    def centres(self) -> torch.Tensor:
        """`(2 * HALF,)` f64."""
        return (torch.arange(-HALF, HALF, dtype=torch.float64) + 0.5) * self.width

    def range(self, scheme: Scheme, rule: str) -> tuple[float, float]:
        """low, high by a rule's name; CalibrationError if nothing was observed."""
        choose = OBSERVERS.get(rule)
        if not self.count:
            raise CalibrationError(
                "no activation was observed, so no range can be chosen; calibrate on more text"
            )
        return choose(self, scheme)

    def affine(self, scheme: Scheme, rule: str) -> Affine:
        """The scale and zero point for that range, scalars f32."""
        return _affine(scheme, *self.range(scheme, rule))


def _affine(scheme: Scheme, low: float, high: float) -> Affine:
    return scheme.affine(torch.tensor(low), torch.tensor(high))


def minmax(seen: Histogram, scheme: Scheme) -> tuple[float, float]:
    """The smallest and the largest value seen."""
    return seen.low, seen.high


def percentile(seen: Histogram, scheme: Scheme, keep: float = KEEP) -> tuple[float, float]:
    """The narrowest range in whole bins that holds at least `keep` of all values.

    Symmetric: of |x|. Asymmetric: at most half of the rest is cut off at either end.
    """
    if not 0 < keep <= 1:
        raise CalibrationError(f"keep is {keep}; a part of all values lies in 0 ... 1")
    if scheme.symmetric:
        needed = keep * seen.count
        magnitudes = seen.bins[HALF:] + seen.bins[:HALF].flip(0)
        edge = (_first(magnitudes.cumsum(0), needed) + 1) * seen.width
        edge = min(edge, max(-seen.low, seen.high))
        return -edge, edge
    needed = (1 + keep) / 2 * seen.count
    high = (_first(seen.bins.cumsum(0), needed) + 1 - HALF) * seen.width
    low = (HALF - 1 - _first(seen.bins.flip(0).cumsum(0), needed)) * seen.width
    return max(low, seen.low), min(high, seen.high)


def _first(cumulative: torch.Tensor, needed: float) -> int:
    """The first index at which a cumulative count reaches what is needed."""
    return min(int((cumulative < needed).sum()), len(cumulative) - 1)


def mse(seen: Histogram, scheme: Scheme) -> tuple[float, float]:
    """The range of least squared error, values taken at the centres of their bins."""
    return _best(seen, scheme, squared_error)


def entropy(seen: Histogram, scheme: Scheme) -> tuple[float, float]:
    """The range of least KL divergence between the histogram and its quantized self."""
    return _best(seen, scheme, divergence)


def _best(
    seen: Histogram, scheme: Scheme, cost: Callable[[Histogram, Scheme, float, float], float]
) -> tuple[float, float]:
    """The min-max range, scaled by one of RATIOS, of least cost; of equals the widest."""
    ranges = [(seen.low * ratio, seen.high * ratio) for ratio in RATIOS.tolist()]
    return min(ranges, key=lambda edges: cost(seen, scheme, *edges))


def squared_error(seen: Histogram, scheme: Scheme, low: float, high: float) -> float:
    """Mean squared error of the histogram's values under that range."""
    full = seen.bins > 0
    centres, affine = seen.centres[full], _affine(scheme, low, high)
    values = (quantize(centres, scheme, affine) - affine.zero).double() * affine.scale.double()
    return float(((centres - values).square() * seen.bins[full]).sum() / seen.count)


def divergence(seen: Histogram, scheme: Scheme, low: float, high: float) -> float:
    """KL(P || Q) in nats of the histogram and its codes under that range.

    A bin with no mass in Q (it has only clipped values) counts as half a value.
    """
    affine = _affine(scheme, low, high)
    if scheme.symmetric:
        low, high = -max(-low, high), max(-low, high)
    first, last = (min(HALF - 1, max(-HALF, int(edge // seen.width))) + HALF for edge in (low, high))
    inside = seen.bins[first : last + 1].double()
    p = inside.clone()
    p[0] += seen.bins[:first].sum()
    p[-1] += seen.bins[last + 1 :].sum()
    codes = quantize(seen.centres[first : last + 1], scheme, affine)
    _, code = torch.unique(codes, return_inverse=True)
    full = inside > 0
    mass = torch.zeros(int(code.max()) + 1, dtype=torch.float64).index_add_(0, code, inside)
    bins = torch.zeros_like(mass).index_add_(0, code, full.double())
    q = torch.where(full, (mass / bins.clamp(min=1))[code], 0.0)
    present = p > 0
    p, q = p[present] / p.sum(), (q[present] / max(float(q.sum()), 1.0)).clamp(min=0.5 / seen.count)
    return float((p * (p / q).log()).sum())


OBSERVERS: Registry[Callable[[Histogram, Scheme], tuple[float, float]]] = Registry("observer", PlanError)
for _rule in (minmax, percentile, mse, entropy):
    OBSERVERS.add(_rule.__name__, _rule)
