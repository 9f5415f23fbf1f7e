"""The two kinds of grid: evenly spaced values, and a table of levels times a scale.

Parameters are per row and per group of columns, `(n, g)`; group j covers columns j*group to
(j+1)*group - 1. If cells span several rows, there is one row of parameters for each cell row.
The arithmetic of `value` is exactly what decoding does, in f32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from ..lazy import torch
from .base import Grid, spread
from .intervals import lookup, pick
from .search import inverse, middles


def over_rows(parameter: torch.Tensor, rows: int | None, n: int) -> torch.Tensor:
    """`(down, g)` -> `(n, g)`, or `(1, g)` if one row of parameters serves all."""
    if rows in (None, 1):
        return parameter
    return parameter.repeat_interleave(rows, 0)[:n]


def mean_over_rows(x: torch.Tensor, rows: int | None, weight: torch.Tensor | None) -> torch.Tensor:
    """`(n, g)` -> `(down, g)`: the (weighted) mean over the rows that share a parameter."""
    if rows == 1:
        return x
    n, g = x.shape
    down, rows = (1, n) if rows is None else (ceil(n / rows), rows)
    w = torch.ones_like(x) if weight is None else weight
    wx, w = (
        torch.nn.functional.pad(part.double(), (0, 0, 0, down * rows - n)).reshape(down, rows, g).sum(1)
        for part in (w.double() * x, w)
    )
    return torch.where(w > 0, wx / w, 0.0).float()


def saturate(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """f32 -> dtype, ties to even; overflowing values become the largest finite one."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def beside(
    grid: AffineGrid | TableGrid, x: torch.Tensor, columns: slice, *parameters: torch.Tensor | int | None
) -> tuple[Any, ...]:
    """`(n, c)` and parameters of its groups, in shapes that broadcast: of whole rows without a copy."""
    whole = columns == slice(None) and grid.index is None and x.shape[1] % grid.group == 0
    if whole and grid.scale.shape[1] > 1 and not grid.scale.requires_grad:
        parts = (part[:, :, None] if isinstance(part, torch.Tensor) else part for part in parameters)
        return x.reshape(x.shape[0], -1, grid.group), *parts
    of_columns = (grid.group, columns, grid.k, grid.index)
    return x, *(spread(part, *of_columns) if isinstance(part, torch.Tensor) else part for part in parameters)


@dataclass(frozen=True)
class AffineGrid(Grid):
    """value = scale * (code - zero) + offset, code in [0, top]; offset None means no addition.

    Parameters are `(n, g)`, or `(1, g)` if one row serves all, and are stored as `dtype`; a scale may
    be negative if `signed`.
    """

    scale: torch.Tensor
    offset: torch.Tensor | None
    zero: torch.Tensor | int
    top: int
    group: int
    k: int
    dtype: torch.dtype
    signed: bool = True
    index: torch.Tensor | None = None

    @cached_property
    def _inverse(self) -> torch.Tensor:
        return inverse(self.scale)

    def round(self, w: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        x, inverse, offset, zero = beside(self, w, columns, self._inverse, self.offset, self.zero)
        x = x if offset is None else x - offset
        code = (x * inverse).round_().add_(zero)
        return code.clamp_(0, self.top).to(torch.uint8).view(w.shape)

    def value(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        x, scale, offset, zero = beside(self, codes, columns, self.scale, self.offset, self.zero)
        value = scale * x.float().sub_(zero)
        return (value if offset is None else value + offset).view(codes.shape)

    def level(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        x, zero = beside(self, codes, columns, self.zero)
        return (x.float() - zero).view(codes.shape)

    def groups(self, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        g = self.scale.shape[1]
        return self.scale.expand(n, g), None if self.offset is None else self.offset.expand(n, g)

    def refitted(
        self, scale: torch.Tensor, offset: torch.Tensor | None, weight: torch.Tensor | None = None
    ) -> AffineGrid:
        """The offset absorbs the rounding error of the scale at the middle code."""
        stored = self._stored(scale if self.signed else scale.clamp(min=0), weight)
        if offset is not None:
            offset = self._stored(offset + (scale - stored) * (self.top / 2), weight)
        return replace(self, scale=stored, offset=offset)

    def _stored(self, parameter: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        rows = 1 if self.scale.shape[0] == parameter.shape[0] else None
        return saturate(mean_over_rows(parameter, rows, weight), self.dtype).float()

    @property
    def half(self) -> int:  # type: ignore[override]
        return (self.top + 1) // 2

    def with_zero(self, scale: torch.Tensor | None = None) -> AffineGrid:
        """Offsets of minus `half` steps: `half` is a power of two, so they are stored exactly."""
        if self.offset is None:
            return self
        stored = self.scale if scale is None else self._stored(scale, None)
        return replace(self, scale=stored, offset=-self.half * stored)

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"scale": self.scale} if self.offset is None else {"scale": self.scale, "offset": self.offset}

    def replaced(self, parameters: dict[str, torch.Tensor]) -> AffineGrid:
        return replace(self, scale=parameters["scale"], offset=parameters.get("offset"))


@dataclass(frozen=True)
class TableGrid(Grid):
    """value = scale * level; `table`: sorted levels (L,), `codes`: the stored code of each level.

    A weight over its scale belongs to the nearest level, a tie to the upper one. A code that no level
    has (minus zero) stands for the level nearest zero. The format decides how scales are stored.
    """

    scale: torch.Tensor
    table: torch.Tensor
    codes: torch.Tensor
    group: int
    k: int

    @cached_property
    def _inverse(self) -> torch.Tensor:
        return inverse(self.scale)

    @cached_property
    def levels(self) -> torch.Tensor:
        """The value of each code."""
        levels = self.table[self.table.abs().argmin(0, keepdim=True)].repeat(256)
        levels[self.codes.long()] = self.table
        return levels

    def round(self, w: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        x, inv = beside(self, w, columns, self._inverse)
        return pick(self.codes, middles(self.table), x * inv).view(w.shape)

    def value(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        level, scale = beside(self, self.level(codes), columns, self.scale)
        return (scale * level).view(codes.shape)

    def level(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return lookup(self.levels, codes)

    def groups(self, n: int) -> tuple[torch.Tensor, None]:
        return self.scale, None

    def refitted(
        self, scale: torch.Tensor, offset: torch.Tensor | None, weight: torch.Tensor | None = None
    ) -> TableGrid:
        return replace(self, scale=scale)

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"scale": self.scale}

    def replaced(self, parameters: dict[str, torch.Tensor]) -> TableGrid:
        return replace(self, scale=parameters["scale"])
