"""Levels of a learned table: one-dimensional k-means, by Lloyd's iterations (1982).

They start from levels at even distances between the smallest and the largest weight, the start that Han et
al. (arXiv 1510.00149, section 3.2) found best, and from levels by the density of the weights; the better end
is kept.
"""

from __future__ import annotations

from ..lazy import torch
from .grids import saturate


def fit_levels(x: torch.Tensor, weight: torch.Tensor, count: int, search: bool) -> torch.Tensor:
    """`(r, m)` weights and their importance -> `(r, count)` sorted levels, f32 of f16 values."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    even = low + (high - low) * torch.linspace(0, 1, count, device=x.device)
    if not search:
        return saturate(even, torch.float16).float()
    x, order = x.sort(dim=1)
    weight = weight.gather(1, order)
    sums = torch.stack(
        [running_sum(part) for part in (weight, weight.double() * x, weight * x.double() ** 2)]
    )
    best, least = torch.empty(0), torch.empty(0)
    for start in (even, companded(x, weight, count)):
        levels = saturate(lloyd(x, sums, start), torch.float16).float()
        nearest = torch.searchsorted(((levels[:, 1:] + levels[:, :-1]) * 0.5).contiguous(), x, right=True)
        error = (weight.double() * (levels.gather(1, nearest) - x).double().square()).sum(1, keepdim=True)
        best = levels if best.numel() == 0 else torch.where(error < least, levels, best)
        least = error if least.numel() == 0 else torch.minimum(error, least)
    return best


def companded(x: torch.Tensor, weight: torch.Tensor, count: int) -> torch.Tensor:
    """`(r, m)` sorted weights -> `(r, count)` levels whose density is the cube root of theirs.

    This is the density of optimal levels if there are many (Panter and Dite, 1951). A spacing d between
    neighbours estimates the density 1 / d, so an interval counts d * (weight / d)^(1/3).
    """
    step = x.diff(dim=1, prepend=x[:, :1])
    share = running_sum(step.double() ** (2 / 3) * weight.double() ** (1 / 3))[:, 1:].contiguous()
    middles = (torch.arange(count, dtype=torch.float64, device=x.device) + 0.5) / count
    index = torch.searchsorted(share, share[:, -1:] * middles)
    return x.gather(1, index.clamp(max=x.shape[1] - 1))


def running_sum(x: torch.Tensor) -> torch.Tensor:
    """`(r, m)` -> `(r, m + 1)` f64: sums of the first 0 ... m."""
    return torch.nn.functional.pad(x.double().cumsum(1), (1, 0))


def lloyd(x: torch.Tensor, sums: torch.Tensor, levels: torch.Tensor, rounds: int = 100) -> torch.Tensor:
    """Move each level to the weighted mean of the (sorted) x nearest to it, until none moves.

    sums: `(3, r, m + 1)` running sums of the weights, of weight * x and of weight * x^2, so that a
    round costs no pass over x. If cells of levels are empty, one of these levels moves to the lowest x of
    the cell with the largest error and so splits it.
    """
    energy = sums[2, :, -1:]
    for _ in range(rounds):
        inner = torch.searchsorted(x, ((levels[:, 1:] + levels[:, :-1]) * 0.5).contiguous())
        edges = torch.nn.functional.pad(inner, (1, 0))
        edges = torch.cat([edges, torch.full_like(edges[:, :1], x.shape[1])], 1)
        mass, moment, square = sums.gather(2, edges.expand(3, -1, -1)).diff(dim=2)
        empty = mass <= 0
        moved = torch.where(empty, levels.double(), moment / mass).float()
        # A loss below the rounding error of the f64 sums counts as zero.
        loss = torch.where(empty, 0.0, square - moment.square() / mass)
        worst, cell = loss.max(1, keepdim=True)
        split = (empty & (empty.cumsum(1) == 1)) & (worst > 1e-12 * energy)
        lowest = x.gather(1, edges.gather(1, cell))
        moved = torch.where(split, lowest, moved).sort(1).values
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels
