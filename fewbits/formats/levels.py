"""A table of values indexed by code, its grid under a scale, and the format of one scale per cell.

In `TableGrid` every code has a level, in sorted order. Here codes are the bit patterns of an element, some of
which mean minus zero, infinity or NaN. All codes decode; rounding gives those of finite values only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from ..core.pack import cell, pack, unpack
from ..lazy import torch
from ..qtensor import Plane, QTensor
from .base import Format, Grid, spread
from .cells import Cells, choose, tries
from .grids import mean_over_rows, over_rows, saturate
from .intervals import lookup, pick
from .search import fit_table, inverse


@dataclass(frozen=True, eq=False)
class Levels:
    """table: makes `values`. ties: a tie goes to the even code, or to the level "below"."""

    table: Callable[[], torch.Tensor]
    ties: str = "even"

    def on(self, device: torch.device) -> Levels:
        """These on a device; all of their tensors lie there."""
        if device == self.values.device:
            return self
        if device not in self._elsewhere:
            there = Levels(self.table, self.ties)
            for name in ("values", "codes", "sorted", "boundaries"):
                there.__dict__[name] = getattr(self, name).to(device)
            self._elsewhere[device] = there
        return self._elsewhere[device]

    @cached_property
    def _elsewhere(self) -> dict[torch.device, Levels]:
        return {}

    @cached_property
    def values(self) -> torch.Tensor:
        """`(2^bits,)` f32: the value of each code."""
        return self.table()

    @cached_property
    def codes(self) -> torch.Tensor:
        """`(L,)` u8: the codes that rounding may give, by rising value; of two zeros the lower code."""
        finite = torch.isfinite(self.values).nonzero()[:, 0]
        by_value = finite[torch.sort(self.values[finite], stable=True).indices]
        new = torch.ones(len(by_value), dtype=torch.bool)
        new[1:] = self.values[by_value].diff() > 0
        return by_value[new].to(torch.uint8)

    @cached_property
    def sorted(self) -> torch.Tensor:
        """`(L,)` f32: the values of `codes`."""
        return self.values[self.codes.long()]

    @cached_property
    def boundaries(self) -> torch.Tensor:
        """`(L - 1,)`: from boundary i on, the level above it is the nearest.

        The midpoint is a tie. If it belongs to the level below, the boundary is the next f32.
        """
        middle = (self.sorted[1:] + self.sorted[:-1]) * 0.5
        down = torch.ones(len(middle), dtype=torch.bool) if self.ties == "below" else self.codes[:-1] % 2 == 0
        return torch.where(down, torch.nextafter(middle, torch.tensor(torch.inf)), middle)

    def round(self, t: torch.Tensor) -> torch.Tensor:
        """f32 -> u8 codes: nearest, saturating."""
        here = self.on(t.device)
        return pick(here.codes, here.boundaries, t)

    def nearest(self, t: torch.Tensor) -> torch.Tensor:
        """f32 -> the values of those codes."""
        here = self.on(t.device)
        return pick(here.sorted, here.boundaries, t)

    def of(self, codes: torch.Tensor) -> torch.Tensor:
        """The values of codes, in their shape."""
        return lookup(self.on(codes.device).values, codes)


@dataclass(frozen=True)
class LevelGrid(Grid):
    """value = scale * values[code]; scale `(down, g)`, one for `rows` rows (None: all) of `group` columns.

    Scales are stored as `dtype` and are not negative.
    """

    scale: torch.Tensor
    levels: Levels
    group: int
    k: int
    rows: int | None
    dtype: torch.dtype

    @cached_property
    def _inverse(self) -> torch.Tensor:
        return inverse(self.scale)

    def _scale(self, n: int, columns: slice) -> torch.Tensor:
        return over_rows(spread(self.scale, self.group, columns, self.k), self.rows, n)

    def round(self, w: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        inv = over_rows(spread(self._inverse, self.group, columns, self.k), self.rows, w.shape[0])
        return self.levels.round(w * inv)

    def value(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return self._scale(codes.shape[0], columns) * self.level(codes)

    def level(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return self.levels.of(codes)

    def groups(self, n: int) -> tuple[torch.Tensor, None]:
        return over_rows(self.scale, self.rows, n).expand(n, -1), None

    def refitted(
        self, scale: torch.Tensor, offset: torch.Tensor | None, weight: torch.Tensor | None = None
    ) -> LevelGrid:
        scale = mean_over_rows(scale.clamp(min=0), self.rows, weight)
        return replace(self, scale=saturate(scale, self.dtype).float())

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"scale": self.scale}

    def replaced(self, parameters: dict[str, torch.Tensor]) -> LevelGrid:
        return replace(self, scale=parameters["scale"])


def code_plane(bits: int) -> Plane:
    """The plane of a row's packed codes."""
    columns, entries = cell(bits)
    return Plane("codes", "u8", columns=columns, entries=entries)


@dataclass(frozen=True)
class ScaledLevels(Format):
    """value = scale * level: a table of levels under one scale per cell, kept in a float type.

    planes: the codes, then the scale. order: of the codes inside a byte, as in `pack`.
    """

    levels: Levels
    bits: int
    cells: Cells
    order: tuple[int, ...] | None = None

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> LevelGrid:
        x, weight = self.cells.gather(w), self.cells.importance(importance, w)
        options = [
            (self.stored(fit_table(x, weight, self.levels.on(x.device).sorted, tried, signed=False)).float(),)
            for tried in tries(search)
        ]
        (scale,) = choose(x, weight, options, self.nearest)
        return self.grid(scale, w.shape[1])

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        return saturate(scale, self.planes[1].dtype)

    def nearest(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.levels.nearest(x * inverse(scale)).mul_(scale)

    def grid(self, scale: torch.Tensor, k: int) -> LevelGrid:
        group, dtype = self.cells.columns or k, self.planes[1].dtype
        return LevelGrid(scale, self.levels, group, k, self.cells.rows, dtype)

    def pack(self, grid: LevelGrid, codes: torch.Tensor) -> QTensor:
        scale = self.planes[1].name
        planes = {"codes": pack(codes, self.bits, order=self.order), scale: self.stored(grid.scale)}
        return QTensor(self, (codes.shape[0], codes.shape[1]), planes)

    def unpack(self, q: QTensor) -> tuple[LevelGrid, torch.Tensor]:
        codes = unpack(q.planes["codes"], self.bits, q.shape[1], self.order)
        return self.grid(q.planes[self.planes[1].name].float(), q.shape[1]), codes
