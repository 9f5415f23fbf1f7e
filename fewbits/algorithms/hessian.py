"""The Hessian of an input: what it says about the errors of a weight that reads it.

Every algorithm here that knows the Hessian minimizes, over the values q (n, k) of a format,

    loss(q) = tr((q - t) H (q - t)^T)        H = mean x x^T + damp * mean(diag) * I

the mean squared error of the layer's output. t is the weight itself, or (gptaq) the weight whose output
on the inputs x as they are now comes nearest to the output of w on the float model's x~: the least-squares
solution of |t x - w x~|^2, t = w + w mismatch H^-1 (GPTAQ, arXiv 2504.02692, in closed form), or a share
of the way there, since the mismatch is known from a sample only. Damping (GPTQ, arXiv 2210.17323, section
3.3) keeps H invertible and stands for the inputs not seen.

    U upper, H^-1 = U^T U      U_jj^2 is 1 / (what a unit error in column j costs when all later
                               columns may still correct it)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..calibrate.stats import Stats
from ..errors import CalibrationError

# On SmolLM2-135M, 32,768 tokens of one text and the loss on another, 0.01 to 0.1 differ by 2 %.
DAMP = 0.03
MOST_DAMP = 10.0
# The share of the mismatch to correct. On wikitext / c4 the same model, ten blocks in Q4_0, has a KL of, by
# 32,768 tokens: 0.0339 / 0.0245 at 0.25, 0.0312 / 0.0248 at 0.5, 0.0343 / 0.0263 at 0.75; by 131,072 tokens:
# 0.0332 / 0.0212 at 0.75, 0.0357 / 0.0233 at 1.
GPTAQ = 0.5


class CalibrationWarning(UserWarning):
    """Calibration went on, but not as asked."""


@dataclass(frozen=True)
class HessianFactor:
    """hessian: `(k, k)` f32, damped; factor: U `(k, k)` of it, for columns taken in `order` `(k,)`. Of e
    weights in lockstep `(e, k, k)` and `(e, k)`."""

    hessian: torch.Tensor
    factor: torch.Tensor
    order: torch.Tensor

    @staticmethod
    def of(stats: Stats, damp: float = DAMP, order: torch.Tensor | None = None) -> HessianFactor:
        """Of checked statistics. The last one is kept on `stats`: weights that share an input share it."""
        assert stats.hessian is not None
        order = torch.arange(stats.columns, device=stats.hessian.device) if order is None else order
        known = stats.cache.get("factor")
        if known is not None and known[0] == damp and torch.equal(known[1].order, order):
            return known[1]
        hessian, factor = factorize(stats.hessian, damp, order)
        stats.cache["factor"] = damp, HessianFactor(hessian, factor, order)
        return stats.cache["factor"][1]

    @staticmethod
    def of_each(
        stats: Sequence[Stats], damp: float, order: torch.Tensor
    ) -> tuple[HessianFactor | None, list[int]]:
        """Of checked statistics, each with its row of order `(e, k)`: one factor in lockstep, and which of
        them it has. Those that need more damping are left out; `of` finds theirs. `stats` keep nothing."""
        hessians = [each.hessian for each in stats if each.hessian is not None]
        added = [damp * mean_diagonal(hessian) for hessian in hessians]
        turned = [backwards(*each) for each in zip(hessians, order, added, strict=True)]
        lower, fault = torch.linalg.cholesky_ex(torch.stack(turned))
        del turned
        known = [i for i, bad in enumerate(fault.tolist()) if not bad]
        if not known:
            return None, []
        if len(known) < len(hessians):
            left = torch.tensor(known, device=lower.device)
            lower, order = lower[left], order[left]
        upper = lower.flip(-2, -1)
        del lower
        factor = inverse_of(upper)
        del upper
        damped = torch.stack([hessians[i].float() for i in known])
        for i, hessian in zip(known, damped, strict=True):
            hessian.diagonal().add_(added[i])
        return HessianFactor(damped, factor, order), known

    def part(self, i: int) -> HessianFactor:
        """That of weight i, in lockstep."""
        return HessianFactor(self.hessian[i], self.factor[i], self.order[i])

    def target(self, w: torch.Tensor, stats: Stats, gptaq: float = GPTAQ) -> torch.Tensor:
        """`(n, k)` -> the t of the loss, f32. gptaq: the share of the mismatch to correct."""
        w = w.float()
        if gptaq == 0 or stats.mismatch is None:
            return w
        moved = (gptaq * w @ stats.mismatch)[:, self.order] @ self.factor.T @ self.factor
        return w + moved[:, self.order.argsort()]


def factorize(hessian: torch.Tensor, damp: float, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(k, k)` -> the damped Hessian and its U; damping is raised, with a warning, until it can be factored.

    With V V^T = H and V upper (a Cholesky factor from the last column to the first), U = V^-1.
    """
    mean = mean_diagonal(hessian)
    share = damp
    while True:
        lower, fault = torch.linalg.cholesky_ex(backwards(hessian, order, share * mean))
        if not int(fault):
            break
        if share >= MOST_DAMP:
            raise CalibrationError(
                f"the Hessian of {hessian.shape[0]} columns is not positive definite even when {share:g} of "
                "its mean diagonal is added; the statistics are damaged, collect them again"
            )
        share = max(10 * share, DAMP / 10)
    if share != damp:
        warnings.warn(
            f"the Hessian of {hessian.shape[0]} columns is not positive definite: damping raised from "
            f"{damp:g} to {share:g} of its mean diagonal; more calibration tokens would avoid it",
            CalibrationWarning,
            stacklevel=2,
        )
    upper = lower.flip(0, 1)
    del lower  # a Hessian's size each: three of them at once are enough
    inverse = inverse_of(upper)
    del upper
    damped = hessian.float().clone()
    damped.diagonal().add_(share * mean)
    return damped, inverse


def mean_diagonal(hessian: torch.Tensor) -> float:
    """What shares of damping refer to; 1 for a Hessian of zeros."""
    return float(hessian.diagonal().mean()) or 1.0


def backwards(hessian: torch.Tensor, order: torch.Tensor, added: float) -> torch.Tensor:
    """`(k, k)` -> the same in f32 with columns from the last of `order` to the first, `added` to the
    diagonal."""
    turned = order.flip(0)
    found = hessian.float()[turned[:, None], turned]
    found.diagonal().add_(added)
    return found


def inverse_of(upper: torch.Tensor) -> torch.Tensor:
    """The inverses of `([e,] k, k)`."""
    inverse = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    inverse = inverse if upper.ndim == 2 else inverse.repeat(len(upper), 1, 1)
    torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
    return inverse


def loss(q: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """`(n, k)`, `(n, k)`, `(k, k)` -> `(n,)` f64: the loss of each row."""
    error = (q - target).double()
    return ((error @ hessian.double()) * error).sum(1)


def require_stats(stats: Stats | None, w: torch.Tensor, algorithm: str, hessian: bool = True) -> Stats:
    """The statistics, checked; CalibrationError where they are missing, of another width or not finite."""
    if stats is None or (hessian and stats.hessian is None):
        what = "the Hessian" if hessian else "statistics"
        raise CalibrationError(
            f"{algorithm} needs {what} of the weight's input and has none; calibrate, "
            "or use an algorithm without data (rtn, hqq)"
        )
    if w.ndim == 2 and stats.columns != w.shape[1]:
        raise CalibrationError(
            f"the weight has {w.shape[1]} columns, the statistics of its input {stats.columns}; "
            "they belong to another weight or model: calibrate this one"
        )
    bad = {
        name: int((~torch.isfinite(part)).sum())
        for name in ("mean_square", "hessian", "mismatch")
        if (part := getattr(stats, name)) is not None and (hessian or name == "mean_square")
    }
    for name, count in bad.items():
        if count:
            raise CalibrationError(
                f"{name} of the input has {count} entries that are NaN or infinite; "
                "an earlier block's output has overflowed, or the text has: calibrate in f32"
            )
    return stats
