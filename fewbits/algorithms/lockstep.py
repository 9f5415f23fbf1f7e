"""Weights of one shape in lockstep: each step is one launch for all of them.

Weights `(n, k)` of which each has a Hessian of its own, such as the experts of a layer, are the rows of one
weight of e n rows, and columns are arrays of all these rows, one part of n for each weight:

    state (k, e n)      row of the state: | weight 0 | weight 1 | ... |
    coupling (e, k, k), columns (e, c), pivot (e, c): one for each part

What rows share without lockstep has no first axis: coupling `(k, k)`, columns `(c,)`. Every function here
takes both, and without lockstep does the plain operation.
"""

from __future__ import annotations

import torch


def count_of(coupling: torch.Tensor) -> int:
    """The number of weights of a coupling `(k, k)` or `(e, k, k)`."""
    return 1 if coupling.ndim == 2 else len(coupling)


def parts(x: torch.Tensor, e: int) -> torch.Tensor:
    """`(m, e n)` -> `(e, m, n)`, a view."""
    return x.view(len(x), e, -1).transpose(0, 1)


def subtract_product(state: torch.Tensor, coupling: torch.Tensor, moves: torch.Tensor) -> None:
    """state `(m, e n)` -= coupling^T moves, of coupling `([e,] k, m)` and moves `(k, e n)`, in place."""
    if coupling.ndim == 2:
        state.addmm_(coupling.T, moves, alpha=-1)
    else:
        e = len(coupling)
        parts(state, e).baddbmm_(coupling.mT, parts(moves, e), alpha=-1)


def product(coupling: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`([e,] m, k)` times columns `(k, e n)` -> `(m, e n)`."""
    if coupling.ndim == 2:
        return coupling @ x
    return (coupling @ parts(x, len(coupling))).transpose(0, 1).reshape(-1, x.shape[1])


def row_product(x: torch.Tensor, coupling: torch.Tensor) -> torch.Tensor:
    """Rows `(e n, k)` times `([e,] k, m)` -> `(e n, m)`."""
    if coupling.ndim == 2:
        return x @ coupling
    return (x.reshape(len(coupling), -1, x.shape[1]) @ coupling).flatten(0, 1)


def taken(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns `(m, e n)` -> `(c, e n)`: those of `index ([e,] c)`, in that order."""
    if index.ndim == 1:
        return x[index]
    e, c = index.shape
    n = x.shape[1] // e
    return x.view(len(x), e, n).gather(0, index.T[:, :, None].expand(c, e, n)).flatten(1)


def of_rows(value: torch.Tensor, rows: int) -> torch.Tensor:
    """`(c,)`, which all rows share, as it is; `(e, c)` -> `(rows, c)`."""
    return value if value.ndim == 1 else value.repeat_interleave(rows // len(value), 0)
