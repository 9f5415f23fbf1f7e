"""The rounding of a grid as data for the C++ core: see `core.Rounding`."""

from __future__ import annotations

from ..core import Rounding
from ..lazy import torch
from .base import Grid
from .grids import AffineGrid, TableGrid
from .levels import LevelGrid
from .search import inverse, middles

LEVELS = 16  # a longer table is searched faster elsewhere


def rounding_of(grid: Grid, n: int, columns: torch.Tensor) -> Rounding | None:
    """A grid, for `columns (k,)` of it in that order -> its Rounding; None if the core does not support
    it."""
    meaning = getattr(grid, "meaning", grid)
    scale, offset = (None if part is None else part.T.contiguous() for part in meaning.groups(n))
    assert scale is not None
    group = grid.group_of(columns).contiguous()
    if isinstance(meaning, AffineGrid):
        zero = meaning.zero
        if isinstance(zero, torch.Tensor):
            zero = zero.expand(n, len(scale)).T.float().contiguous()
        return Rounding(group, scale, inverse(scale), offset, zero, meaning.top)
    if isinstance(meaning, TableGrid) and meaning.table.ndim == 1:
        table = meaning.table, middles(meaning.table), meaning.codes
    elif isinstance(meaning, LevelGrid):
        table = meaning.levels.sorted, meaning.levels.boundaries, meaning.levels.codes
    else:
        return None
    if len(table[0]) > LEVELS:
        return None
    levels, boundaries, codes = (part.float().contiguous() for part in table)
    return Rounding(group, scale, inverse(scale), table=(levels, boundaries, codes))
