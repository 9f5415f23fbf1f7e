"""The interval between sorted boundaries that contains a number: a `bucketize` that is fast for short tables.

A raster of equal cells is laid over the boundaries, fine enough that no cell holds two of them:

    boundaries        b0      b1           b2  b3
    cells       |   |   |   |   |   |   |   |   |   |     cell(t) = trunc(t * scale + offset)

The raster and f32 rounding are monotone, so a number in a cell before (after) that of a boundary is below
(above) the boundary. One multiplication gives the cell, and one comparison with the cell's boundary decides.
That is a dozen passes of plain arithmetic, while a binary search takes a branch for each level.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..lazy import torch

CELLS = 4096  # at most: two tables of them stay in the first cache


@dataclass(frozen=True, eq=False)
class Raster:
    """bounds `(cells,)`: the boundary in each cell, or infinity. interval `(2 * cells,)`: the numbers of the
    intervals below and above it."""

    scale: float
    offset: float
    bounds: torch.Tensor
    interval: torch.Tensor

    @property
    def last(self) -> int:
        return len(self.bounds) - 1

    def position(self, t: torch.Tensor) -> torch.Tensor:
        """The cell of each t, a whole f32; NaN lies in the last, beyond all boundaries."""
        return t.mul(self.scale).add_(self.offset).clamp_(0, self.last).nan_to_num_(self.last).trunc_()


def pick(
    values: torch.Tensor, boundaries: torch.Tensor, t: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`values[i]` for each t, f32, i the number of boundaries that are not above it. values: `(L,)`,
    boundaries: `(L - 1,)` sorted. out may be t itself."""
    raster = None if t.device.type != "cpu" else raster_of(tuple(boundaries.tolist()))
    if raster is None:
        picked = values[torch.bucketize(t.contiguous(), boundaries, right=True)]
        return picked if out is None else out.copy_(picked)
    t = t.contiguous()
    cell = raster.position(t)
    above = raster.bounds.index_select(0, cell.int().view(-1)).view(t.shape).le_(t)
    index = cell.mul_(2.0).add_(above).int().view(-1)
    table = values[raster.interval]
    if out is None or not out.is_contiguous():
        picked = table.index_select(0, index).view(t.shape)
        return picked if out is None else out.copy_(picked)
    torch.index_select(table, 0, index, out=out.view(-1))
    return out


def lookup(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """`table[codes]` for a table `(L,)`; several times faster than indexing with a tensor."""
    return table.index_select(0, codes.int().flatten()).view(codes.shape)


@lru_cache(maxsize=64)
def raster_of(boundaries: tuple[float, ...]) -> Raster | None:
    """The coarsest raster that separates the boundaries; None if it would take more than CELLS cells."""
    b = torch.tensor(boundaries, dtype=torch.float32)
    span = boundaries[-1] - boundaries[0]
    cells = 16
    while 0 < span < float("inf") and cells <= CELLS:
        scale = (cells - 3) / span
        empty = torch.full((cells,), torch.inf)
        raster = Raster(scale, 1.0 - boundaries[0] * scale, empty, empty)
        at = raster.position(b).long()
        if bool((at.diff() > 0).all()) and int(at[-1]) < raster.last:
            bounds = empty.index_copy(0, at, b)
            below = torch.searchsorted(at, torch.arange(cells))
            interval = torch.stack([below, below + torch.isfinite(bounds)], 1).flatten()
            return Raster(scale, raster.offset, bounds, interval)
        cells *= 2
    return None
