"""Cells: how a weight is cut into the groups that share one set of parameters, and how one is chosen.

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

import torch

from .base import checked_importance
from .search import lanes, ordered_sum


@dataclass(frozen=True)
class Cells:
    rows: int | None
    columns: int | None

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """`(n, k)` -> `(down, across, rows * columns)`; a short last cell repeats its last row and column."""
        rows, columns = self.rows or x.shape[0], self.columns or x.shape[1]
        down, across = ceil(x.shape[0] / rows), ceil(x.shape[1] / columns)
        x = _stretch(_stretch(x, down * rows, 0), across * columns, 1)
        return x.reshape(down, rows, across, columns).transpose(1, 2).flatten(2)

    def importance(self, importance: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
        """`(k,)` or `(n, k)` -> the weight of each gathered square, at most 1; None if all count alike.

        Weights that `gather` repeated count nothing. A cell without any importance counts evenly.
        """
        n, k = shape
        rows, columns = self.rows or n, self.columns or k
        importance = checked_importance(importance, n, k)
        if importance is None and n % rows == 0 and k % columns == 0:
            return None
        inside = torch.zeros(ceil(n / rows) * rows, ceil(k / columns) * columns)
        inside[:n, :k] = 1.0
        even = self.gather(inside)
        if importance is None:
            return even
        padded = torch.zeros_like(inside)
        padded[:n, :k] = importance
        weight = self.gather(padded)
        weight = torch.where(weight.amax(-1, keepdim=True) > 0, weight, even)
        return weight / weight.amax(-1, keepdim=True)

    def over_rows(self, parameter: torch.Tensor, n: int) -> torch.Tensor:
        """`(down, g)` -> `(n, g)`, or `(1, g)` where one row of parameters serves all."""
        if self.rows in (None, 1):
            return parameter
        return parameter.repeat_interleave(self.rows, 0)[:n]


def choose(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    options: Sequence[Sequence[torch.Tensor]],
    value: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Per group, the option of least (weighted) squared error; the first of equal ones.

    x: `(..., G)`. Each option is a tuple of `(...)` parameters and `value(x, *option)` what x becomes
    under it: storing parameters in few bits moves them, so a fit is judged after they are stored.
    """
    best = [part.clone() for part in options[0]]
    least = None
    for option in options:
        error = (value(x, *(part[..., None] for part in option)) - x).square()
        total = ordered_sum(lanes(error if weight is None else error * weight)).reshape(x.shape[:-1])
        if least is None:
            least = total
            continue
        better = total < least
        least = torch.where(better, total, least)
        best = [torch.where(better, new, old) for new, old in zip(option, best, strict=True)]
    return tuple(best)


def tries(search: bool) -> tuple[bool, ...]:
    """Values of `search` to offer `choose`: a search is judged against the plain rule it must beat."""
    return (False, True) if search else (False,)


def saturate(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """f32 -> dtype, ties to even; what overflows becomes the largest finite value."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def _stretch(x: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    have = x.shape[axis]
    return x if have == size else x.index_select(axis, torch.arange(size).clamp(max=have - 1))
