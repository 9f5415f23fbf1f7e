"""Lattices: the tables of points of the IQ types, for eight or four weights at a time.

A point is a vector of level indices. Its cost for weights x under importances w and a scale s is a sum
over coordinates, so it splits into two halves, and all costs of a half are few numbers:

    cost(point) = low[half of the first coordinates] + high[half of the last]        8^2 or 3^4 entries each
    half        = sum of level index * L^i over its coordinates

The search is exhaustive: one addition and one comparison a point (the core finds the same point with fewer:
`csrc/iq_search.h`). The points are the `gguf` package's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..lazy import gguf, torch

# The most costs in memory at once in the search in torch.
CHUNK = 2**22


@dataclass(frozen=True)
class Lattice:
    """levels `(L,)` f32 sorted; points `(P, dim)` int64, indices of levels, in order of their halves'
    numbers, the last half's first."""

    levels: torch.Tensor
    points: torch.Tensor

    @staticmethod
    def of(type_name: str) -> Lattice:
        """The lattice of a GGML type, from the `gguf` package's table."""
        table = getattr(gguf.quants, type_name.upper())
        table.init_grid()
        levels = torch.tensor(table.grid_map, dtype=torch.float32)
        values = torch.from_numpy(table.grid.reshape(table.grid_shape).copy())
        return Lattice(levels, torch.searchsorted(levels, values))

    @property
    def dim(self) -> int:
        return self.points.shape[1]

    def on(self, device: torch.device) -> Lattice:
        """The same on another device."""
        if device == self.levels.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Lattice(self.levels.to(device), self.points.to(device))
        return self._elsewhere[device]

    @cached_property
    def _elsewhere(self) -> dict[torch.device, Lattice]:
        return {}

    @cached_property
    def halves(self) -> torch.Tensor:
        """`(2, P)`: the place of each point's halves in the tables of costs."""
        half = self.dim // 2
        powers = len(self.levels) ** torch.arange(half, device=self.points.device)
        return torch.stack([(part * powers).sum(1) for part in self.points.split(half, 1)])

    @cached_property
    def places(self) -> torch.Tensor:
        """A vector of level indices, read as the digits of a number -> its place in points, or -1."""
        size = len(self.levels)
        places = torch.full((size**self.dim,), -1, device=self.points.device)
        places[self._number(self.points)] = torch.arange(len(self.points), device=self.points.device)
        return places

    def _number(self, digits: torch.Tensor) -> torch.Tensor:
        return (digits * len(self.levels) ** torch.arange(self.dim, device=digits.device)).sum(-1)

    def index(self, digits: torch.Tensor) -> torch.Tensor:
        """`(..., dim)` level indices -> `(...)` places of these points, -1 for those that are no points."""
        return self.places[self._number(digits)]

    def search(
        self, wx: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, shift: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """wx = w * x and w `(V, dim)`, scale `(V,)` -> place of the nearest point, its cost `(V,)`.

        The cost is sum w l (s l - 2 x), with l = level + shift: the squared error over s up to a constant.
        Of equal costs the first wins.
        """
        size = max(1, CHUNK // len(self.points))
        parts = [
            self._search(wx[at : at + size], w[at : at + size], scale[at : at + size], shift)
            for at in range(0, len(w), size)
        ]
        return torch.cat([place for place, _ in parts]), torch.cat([cost for _, cost in parts])

    def _search(
        self, wx: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, shift: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        level = self.levels + shift
        costs = level * (level * (w * scale[:, None])[..., None] - (2.0 * wx)[..., None])
        sums = list(costs.unbind(1))
        while len(sums) > 2:  # neighbours first, the earlier one counting up faster
            sums = [
                (b[:, :, None] + a[:, None, :]).flatten(1) for a, b in zip(sums[::2], sums[1::2], strict=True)
            ]
        first, last = self.halves
        total = sums[0][:, first] + sums[1][:, last]
        place = total.argmin(1)
        return place, total.gather(1, place[:, None])[:, 0]
