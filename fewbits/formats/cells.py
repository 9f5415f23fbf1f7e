"""Cells: the groups of weights that share one set of parameters, and the choice of these parameters.

A cell is `rows` x `columns` weights, None meaning all of them, as in `Plane`:

    (1, 128)     groups of 128          (1, None)      a row, also called a channel
    (128, 128)   square blocks          (None, None)   the whole tensor

`gather` lays the weights of each cell side by side, so that every family fits its parameters along
the last axis; the result of a fit, `(down, across)`, has the shape of a plane with the same cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from ..lazy import torch
from .base import checked_importance
from .search import lanes, ordered_sum


@dataclass(frozen=True)
class Cells:
    rows: int | None
    columns: int | None

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`(n, k)` -> `(down, across, rows * columns)`; a short last cell repeats its last row and column.

        The weights of a cell are strided in memory, so that `lanes` of the result is no copy.
        """
        rows, columns = self.rows or x.shape[0], self.columns or x.shape[1]
        down, across = ceil(x.shape[0] / rows), ceil(x.shape[1] / columns)
        x = _stretch(_stretch(x, down * rows, 0), across * columns, 1)
        cells = x.reshape(down, rows, across, columns).permute(1, 3, 0, 2).contiguous()
        return cells.reshape(rows * columns, down, across).permute(1, 2, 0)

    def importance(self, importance: torch.Tensor | None, w: torch.Tensor) -> torch.Tensor | None:
        """`(k,)` or `(n, k)` -> the importance of each weight gathered of w, up to 1; None if all are equal.

        Weights that `gather` repeats have importance 0. All weights of a cell without importance have 1.
        """
        n, k = w.shape
        rows, columns = self.rows or n, self.columns or k
        importance = checked_importance(importance, n, k)
        if importance is None and n % rows == 0 and k % columns == 0:
            return None
        one = 1 if rows == 1 else n  # one row represents all if rows are independent
        inside = w.new_ones(one, k, dtype=torch.float32)
        even = self.gather(pad(inside, rows, columns))
        if importance is None:
            return even.expand(ceil(n / rows), -1, -1)
        counts = importance.expand(n, k) if importance.ndim == 2 else importance.expand_as(inside)
        weight = self.gather(pad(counts, rows, columns))
        weight = torch.where(weight.amax(-1, keepdim=True) > 0, weight, even)
        return (weight / weight.amax(-1, keepdim=True)).expand(ceil(n / rows), -1, -1)


def choose(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    options: Sequence[Sequence[torch.Tensor]],
    value: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Per group, the option of least (weighted) squared error; the first of equal ones.

    x: `(..., G)`. Each option is a tuple of `(...)` parameters. `value(lanes(x), *option)`, the option
    as `(N,)`, quantizes x with it and returns new memory. The options are parameters as stored, because
    rounding them to their stored type changes the error.
    """
    shape, x = x.shape[:-1], lanes(x)
    choice = Choice(x, None if weight is None else lanes(weight))
    for option in options:
        flat = tuple(part.reshape(-1) for part in option)
        choice.offer(flat, value(x, *flat))
    return tuple(part.reshape(shape) for part in choice.best)


class Choice:
    """The best option so far for each group: lanes x `(G, N)`, options of `(N,)` parameters."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor | None):
        self.x, self.weight = x, weight
        self.best: tuple[torch.Tensor, ...] = ()
        self.least = torch.empty(0)

    def offer(self, option: tuple[torch.Tensor, ...], value: torch.Tensor) -> None:
        """value `(G, N)`: x quantized with the option; it is overwritten."""
        error = value.sub_(self.x).square_()
        total = ordered_sum(error if self.weight is None else error.mul_(self.weight))
        if not self.best:
            self.best, self.least = option, total
            return
        better = total < self.least
        self.least = torch.where(better, total, self.least)
        pairs = zip(option, self.best, strict=True)
        self.best = tuple(torch.where(better, new, old) for new, old in pairs)


def tries(search: bool) -> tuple[bool, ...]:
    """The values of `search` to try with `choose`: the result of a search must be better than the plain
    rule's."""
    return (False, True) if search else (False,)


def pad(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`(n, k)` -> the same, padded with zeros to whole cells."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))


def _stretch(x: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    if (have := x.shape[axis]) == size:
        return x
    return x.index_select(axis, torch.arange(size, device=x.device).clamp(max=have - 1))
