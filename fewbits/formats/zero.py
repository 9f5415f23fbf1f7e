"""Grids that hold 0, for pruned weights.

Symmetric formats, integer zero points and most tables have 0 among their values. Formats with a float
offset (q4_1, q4_k, int4_g64_asym_float) have it only by chance: their offset is put on minus `half` steps,
where half is a power of two, so that the code `half` is 0 exactly. A learned table gives up its level nearest
to 0. Some tables have no 0 at all (iq4_nl, the lattices of IQ1 to IQ3); `holds_zero` tells.
"""

from __future__ import annotations

from functools import cache

from ..lazy import torch
from .base import Format, Grid
from .search import fit_symmetric


def fit_with_zero(format: Format, w: torch.Tensor, importance: torch.Tensor | None = None) -> Grid:
    """`format.fit`, with 0 among the values of every group where the format can have it."""
    grid = format.fit(w, importance)
    n, k = w.shape
    scale, offset = grid.groups(n)
    if offset is None:
        return grid.with_zero()
    x, weight = grouped(w, grid.group), None
    if importance is not None:
        weight = grouped(importance.expand(n, k), grid.group)
    best = fit_symmetric(x, weight, -grid.half, grid.half - 1, signed=False)
    return grid.with_zero(best.reshape(scale.shape))


def grouped(x: torch.Tensor, group: int) -> torch.Tensor:
    """`(n, k)` -> `(n, g, group)`, the last group filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % group)).reshape(x.shape[0], -1, group)


def zero_codes(grid: Grid, w: torch.Tensor) -> torch.Tensor:
    """`(n, k)`: the code nearest to 0 of each weight of w."""
    return grid.round(torch.zeros_like(w, dtype=torch.float32))


@cache
def holds_zero(format: Format) -> bool:
    """Whether pruned weights stay exactly 0 in this format."""
    grid, w = _probe(format)
    return not bool(format.pack(grid, grid.round(w)).decode()[w == 0].any())


@cache
def stays_zero(format: Format) -> bool:
    """Whether they do whatever the parameters of the blocks become: there is no offset."""
    grid, w = _probe(format)
    return holds_zero(format) and grid.groups(len(w))[1] is None


def _probe(format: Format) -> tuple[Grid, torch.Tensor]:
    """A grid of the format for a few weights, of which every second one is 0."""
    n, k = 4, 2 * format.block
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) + 0.3
    w[:, ::2] = 0
    return fit_with_zero(format, w), w
