"""The two kinds of grid: evenly spaced values, and a table of levels under a scale.

Parameters are per row and per group of columns, `(n, g)`; group j covers columns j*group to
(j+1)*group - 1. The arithmetic of `value` is exactly what decoding does, in f32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import Grid
from .search import inverse, nearest


def spread(parameter: torch.Tensor, group: int, columns: slice, k: int) -> torch.Tensor:
    """`(n, g)` group parameters -> `(n, c)`, one for each of the chosen columns."""
    if parameter.shape[1] == 1:
        return parameter
    start, stop, stride = columns.indices(k)
    return parameter[:, torch.arange(start, stop, stride) // group]


@dataclass(frozen=True)
class AffineGrid(Grid):
    """value = step * (code - zero) + base, code in [0, top]; base None means no addition."""

    step: torch.Tensor
    base: torch.Tensor | None
    zero: torch.Tensor | int
    top: int
    group: int
    k: int

    def _parameters(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | int]:
        base = None if self.base is None else spread(self.base, self.group, columns, self.k)
        zero = self.zero if isinstance(self.zero, int) else spread(self.zero, self.group, columns, self.k)
        return spread(self.step, self.group, columns, self.k), base, zero

    def round(self, w: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        step, base, zero = self._parameters(columns)
        w = w if base is None else w - base
        return torch.clamp(torch.round(w * inverse(step)) + zero, 0, self.top).to(torch.uint8)

    def value(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        step, base, zero = self._parameters(columns)
        value = step * (codes.float() - zero)
        return value if base is None else value + base


@dataclass(frozen=True)
class TableGrid(Grid):
    """value = scale * level; `table`: sorted levels (L,), `codes`: the stored code of each level.

    A weight over its scale belongs to the nearest level, a tie to the upper one. A code that no level
    has (minus zero) stands for the level nearest zero.
    """

    scale: torch.Tensor
    table: torch.Tensor
    codes: torch.Tensor
    group: int
    k: int

    def round(self, w: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        t = (w * inverse(spread(self.scale, self.group, columns, self.k))).contiguous()
        if self.table.ndim == 1:
            return self.codes[nearest(self.table, t)]
        middle = ((self.table[:, 1:] + self.table[:, :-1]) * 0.5).contiguous()
        return self.codes[torch.searchsorted(middle, t, right=True)]

    def value(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        zero = int(self.table.reshape(-1, self.codes.shape[0])[0].abs().argmin())
        level = torch.full((int(self.codes.max()) + 1,), zero)
        level[self.codes.long()] = torch.arange(self.codes.shape[0])
        index = level[codes.long()]
        scale = spread(self.scale, self.group, columns, self.k)
        if self.table.ndim == 1:
            return scale * self.table[index]
        return scale * torch.gather(self.table, 1, index)
