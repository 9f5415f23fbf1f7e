"""HQQ: half-quadratic quantization, robust to outliers without data.

Instead of squared errors, sum |w - q|^p with p < 1 is minimized: most weights end near their values, a few
outliers do not. Half-quadratic splitting gives the errors their own variable e and alternates

    e <- shrink(w - q) = sign(w - q) max(0, |w - q| - |w - q|^(p-1) / beta)     the outliers' share
    offset <- mean of (w - e) - scale * level over each group                     in closed form
    (scale <- <level, w - e> / <level, level> if the format has no offset)
    q <- nearest values of the new grid to w;    beta <- GROWTH * beta

Errors are divided by the scale of their group, so beta means the same for every weight. Each group keeps
its best parameters. A row whose stored parameters are worse than plain rounding is rounded plainly. The
alternation ends when a round improves no group.

Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models (2023), for a
float zero point. Other offsets and scales are ours.
"""

from __future__ import annotations

import torch

from ..calibrate.stats import Stats
from ..errors import PlanError, raise_all
from ..formats import Format, Grid
from ..formats.search import inverse
from ..qtensor import QTensor
from .descent import keep_better

BETA = 2.0
GROWTH = 1.2
PATIENCE = 2


def hqq(
    w: torch.Tensor,
    format: Format,
    stats: Stats | None = None,
    norm: float = 0.7,
    beta: float = BETA,
    rounds: int = 20,
) -> QTensor:
    """`(n, k)` float -> QTensor of no higher sum |w - q|^norm than rounding to nearest, without data."""
    faults = [] if 0 < norm < 1 else [f"norm is {norm}; it lies between 0 and 1"]
    faults += [] if beta > 0 else [f"beta is {beta}; it is positive"]
    faults += [] if rounds >= 0 else [f"rounds is {rounds}; 0 or more"]
    raise_all(PlanError, "hqq", faults)
    format.check(w)
    x = w.float()
    grid = format.fit(x)
    plain = format.pack(grid, grid.round(x))
    best = grid.groups(x.shape[0])
    least = grid.sums(lp(x, grid.value(grid.round(x)), norm))
    waited = 0
    for _ in range(rounds):
        new = refit_robust(x, grid, norm, beta)
        if new is grid:
            break
        grid, beta = new, beta * GROWTH
        error = grid.sums(lp(x, grid.value(grid.round(x)), norm))
        better = error < least
        waited = 0 if bool(better.any()) else waited + 1
        if waited == PATIENCE:
            break
        least = torch.where(better, error, least)
        best = choose_groups(better, grid.groups(x.shape[0]), best)
    grid = grid.refitted(*best)
    q = format.pack(grid, grid.round(x))
    lost, lost_plainly = (lp(x, part.decode(), norm).sum(1) for part in (q, plain))
    return keep_better(q, plain, lost, lost_plainly)


Groups = tuple[torch.Tensor, torch.Tensor | None]


def refit_robust(x: torch.Tensor, grid: Grid, norm: float, beta: float) -> Grid:
    """One alternation: -> the grid refitted to x `(n, k)` without its outlier errors."""
    n, k = x.shape
    codes = grid.round(x)
    scale, offset = grid.groups(n)
    unit = grid.spread(scale.abs(), k).expand(n, k)
    error = (x - grid.value(codes)) * inverse(unit)
    size = error.abs()
    outlying = error.sign() * (size - size.clamp(min=1e-9).pow(norm - 1) / beta).clamp(min=0)
    level, kept = grid.level(codes), x - outlying * unit
    if offset is None:
        square = grid.sums(level * level)
        fitted = grid.sums(level * kept) * inverse(square)
        return grid.refitted(torch.where(square > 0, fitted, scale), None, square)
    count = grid.sums(torch.ones_like(x))
    return grid.refitted(scale, grid.sums(kept - grid.spread(scale, k) * level) / count)


def lp(x: torch.Tensor, value: torch.Tensor, norm: float) -> torch.Tensor:
    """`(n, k)`: |x - value|^norm."""
    return (x - value).abs().pow(norm)


def choose_groups(first: torch.Tensor, a: Groups, b: Groups) -> Groups:
    """Group by group a (where `first (n, g)`) or b."""
    offset = None if a[1] is None or b[1] is None else torch.where(first, a[1], b[1])
    return torch.where(first, a[0], b[0]), offset
