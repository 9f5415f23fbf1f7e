"""The walk: columns of a weight are rounded one after the other, and each rounding moves the later ones.

    code_j   = nearest of the grid to state_j                  value_j = what it stands for
    move_j   = (state_j - value_j) / pivot_j                   error feedback, or
             = value_j - old_j                                 coordinate descent
    state_i -= coupling_ji move_j                              for every later column i

Where a grid's codes are points of a lattice, a vector of columns is rounded at once, each as it then is;
the errors of its columns are then told on one by one all the same.

`walk` does an atom's worth of columns; what it moves in the columns after them, `sweep` carries there.
The loop below is the twin of csrc/walk.h, equal to it bit for bit.
"""

from __future__ import annotations

import torch

from .. import core
from ..formats import Grid
from ..formats.rounding import rounding_of

UNIT = 128  # columns walked at once; between such pieces a product of matrices is faster

Walked = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def walk(
    grid: Grid,
    state: torch.Tensor,
    coupling: torch.Tensor,
    columns: torch.Tensor,
    pivot: torch.Tensor | None = None,
    old: torch.Tensor | None = None,
) -> Walked:
    """state `(k, n)`, whose row j is the grid's column columns[j] -> codes, values, moves `(k, n)`.

    coupling: `(k, k)`, its part above the diagonal. pivot `(k,)` for error feedback, old `(k, n)` for
    descent.
    """
    if core.available() and state.device.type == "cpu" and state.dtype == torch.float32:
        rounding = rounding_of(grid, state.shape[1], columns)
        if rounding is not None:
            return core.walk(
                state, coupling.contiguous(), rounding, None if pivot is None else pivot.contiguous(), old
            )
    return walk_twin(grid, state, coupling, columns, pivot, old)


def walk_twin(
    grid: Grid,
    state: torch.Tensor,
    coupling: torch.Tensor,
    columns: torch.Tensor,
    pivot: torch.Tensor | None = None,
    old: torch.Tensor | None = None,
) -> Walked:
    """`walk` in plain torch."""
    state, codes = state.clone(), []
    values, moves = torch.empty_like(state), torch.empty_like(state)
    for j, place in enumerate(columns.tolist()):
        if j % grid.vector == 0:
            here = slice(j, j + grid.vector)
            columns_here = slice(place, place + grid.vector)
            code = grid.round(state[here].T, columns_here)
            codes.append(code.T)
            values[here] = grid.value(code, columns_here).T
        moves[j] = (state[j] - values[j]) / pivot[j] if pivot is not None else values[j] - old[j]  # type: ignore[index]
        state[j + 1 :] -= coupling[j, j + 1 :, None] * moves[j]
    return torch.cat(codes), values, moves
