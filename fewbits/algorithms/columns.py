"""Columns of a weight are rounded one after the other, and the error of each changes the later ones.

    code_j   = nearest of the grid to state_j                  value_j = its value
    move_j   = (state_j - value_j) / pivot_j                   error feedback, or
             = value_j - old_j                                 coordinate descent
    state_i -= coupling_ji move_j                              for every later column i

If a grid's codes are points of a lattice, a vector of columns is rounded at once; the errors of its columns
are still applied to the later columns one by one.

`quantize_columns` does the columns of one block; `blocked_update` applies its errors to the columns after
them. `quantize_columns_reference`, csrc/columns.h and, on a GPU, kernels/columns.py are bit-identical.
"""

from __future__ import annotations

from functools import cache

import torch

from .. import core, kernels
from ..formats import Format, Grid
from ..formats.rounding import rounding_of

UNIT = 128  # columns rounded at once; between such pieces a matrix product is faster
LEVELS = 16  # the core passes over a table; a longer one is searched faster by torch
MOST_LEVELS = 256  # a GPU's kernel searches it by halving

Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quantize_columns(
    grid: Grid,
    state: torch.Tensor,
    coupling: torch.Tensor,
    columns: torch.Tensor,
    pivot: torch.Tensor | None = None,
    old: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> Columns:
    """state `(k, n)`, whose row j is the grid's column columns[j] -> codes, values, moves `(k, n)`.

    coupling: `(k, k)`, its part above the diagonal. pivot `(k,)` for error feedback, old `(k, n)` for
    descent. keep `(k, n)`: 0 for pruned weights, which get the code nearest to 0, else 1. In lockstep (only
    where `in_lockstep` holds) coupling `(e, k, k)`, columns and pivot `(e, k)`.
    """
    on_gpu = kernels.takes(state)
    if keep is None and (on_gpu or core.takes(state)) and state.dtype == torch.float32:
        rounding = rounding_of(grid, state.shape[1], columns, MOST_LEVELS if on_gpu else LEVELS)
        if rounding is not None:
            pivot, old = (None if part is None else part.contiguous() for part in (pivot, old))
            run = kernels.load("columns").quantize_columns if on_gpu else core.quantize_columns
            return run(state.contiguous(), coupling.contiguous(), rounding, pivot, old)
    assert coupling.ndim == 2, "in lockstep columns are rounded by the kernel"
    return quantize_columns_reference(grid, state, coupling, columns, pivot, old, keep)


def in_lockstep(format: Format, k: int, place: torch.Tensor) -> bool:
    """Whether weights of k columns in this format, where the tensor `place` lies, can be rounded in lockstep:
    the kernel takes their grid, and no row depends on another."""
    alone = format.rows_alone and format.vector == 1 and format.ordered is None
    return alone and kernels.takes(place) and _has_rounding(format, format.column_block(k) or k)


@cache
def _has_rounding(format: Format, width: int) -> bool:
    grid = format.fit(torch.linspace(-1, 1, width)[None], search=False)
    return rounding_of(grid, 1, torch.arange(width), MOST_LEVELS) is not None


def quantize_columns_reference(
    grid: Grid,
    state: torch.Tensor,
    coupling: torch.Tensor,
    columns: torch.Tensor,
    pivot: torch.Tensor | None = None,
    old: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> Columns:
    """`quantize_columns` in plain torch."""
    state, codes = state.clone(), []
    values, moves = torch.empty_like(state), torch.empty_like(state)
    for j, place in enumerate(columns.tolist()):
        if j % grid.vector == 0:
            here = slice(j, j + grid.vector)
            columns_here = slice(place, place + grid.vector)
            seen = state[here] if keep is None else state[here] * keep[here] + 0.0  # no minus zero
            code = grid.round(seen.T, columns_here)
            codes.append(code.T)
            values[here] = grid.value(code, columns_here).T
        moves[j] = (state[j] - values[j]) / pivot[j] if pivot is not None else values[j] - old[j]  # type: ignore[index]
        state[j + 1 :] -= coupling[j, j + 1 :, None] * moves[j]
    return torch.cat(codes), values, moves
