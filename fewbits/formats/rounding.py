"""The rounding of a grid as data for kernels: see `core.Rounding`."""

from __future__ import annotations

from ..core import Rounding
from ..lazy import torch
from .base import Grid
from .grids import AffineGrid, TableGrid
from .levels import LevelGrid
from .search import inverse, middles


def rounding_of(grid: Grid, n: int, columns: torch.Tensor, most: int) -> Rounding | None:
    """A grid, for `columns (k,)` of it in that order -> its Rounding, on the grid's device. `(e, k)`: each
    e-th of the n rows has its own columns.

    None for a grid that is neither scale and offset nor a sorted table, and for tables of more than `most`
    levels."""
    meaning = getattr(grid, "meaning", grid)
    scale, offset = (None if part is None else part.T.contiguous() for part in meaning.groups(n))
    assert scale is not None
    group = grid.group_of(columns.to(scale.device)).contiguous()
    if isinstance(meaning, AffineGrid):
        zero = meaning.zero
        if isinstance(zero, torch.Tensor):
            zero = zero.expand(n, len(scale)).T.float().contiguous()
        return Rounding(group, scale, inverse(scale), offset, zero, meaning.top)
    if isinstance(meaning, TableGrid) and meaning.table.ndim == 1:
        table = meaning.table, middles(meaning.table), meaning.codes
    elif isinstance(meaning, LevelGrid):
        levels = meaning.levels.on(scale.device)
        table = levels.sorted, levels.boundaries, levels.codes
    else:
        return None
    if len(table[0]) > most:
        return None
    values, boundaries, codes = (part.float().contiguous() for part in table)
    return Rounding(group, scale, inverse(scale), table=(values, boundaries, codes))
