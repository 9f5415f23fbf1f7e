"""Error feedback with matrix products: each block of columns updates all later columns.

Error feedback and coordinate descent share one loop. Column i, once rounded, moves by moves[i], and the state
of every later column j changes: state[j] -= coupling[i, j] * moves[i]. Column by column this is bound by
memory. Here the columns are halved recursively, and all updates from the left half to the right half are a
single matrix product:

    round 0 ... 7   =   round 0 ... 3,   state[4:8] -= coupling[0:4, 4:8]^T moves[0:4],   round 4 ... 7

There is no block size to choose; `unit` columns are rounded together. Arrays are stored column by column:
(k, n).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch

from ..core import one_torch_thread
from .lockstep import subtract_product

SMALL = 2**19  # numbers that are rounded at once: for fewer, threads cost more than they gain


def blocked_update(
    state: torch.Tensor,
    coupling: torch.Tensor,
    moves: torch.Tensor,
    quantize: Callable[[int, int], None],
    unit: int = 1,
) -> None:
    """Call `quantize(start, stop)` for every `unit` columns of state `(k, n)` in turn, in place.

    quantize reads state[start:stop] and writes moves[start:stop]; coupling: `(k, k)`, its part above the
    diagonal is used; in lockstep `(e, k, k)`.
    """
    for start, stop, middle in _steps(0, state.shape[0], unit):
        if middle is None:
            with one_torch_thread() if state[start:stop].numel() < SMALL else nullcontext():
                quantize(start, stop)
        else:
            across = coupling[..., start:middle, middle:stop]
            subtract_product(state[middle:stop], across, moves[start:middle])


def _steps(start: int, stop: int, unit: int) -> Iterator[tuple[int, int, int | None]]:
    """What is done in turn: columns start ... stop are rounded (middle None), or the moves of those before
    the middle update those after it."""
    if stop - start <= unit:
        yield start, stop, None
        return
    middle = start + max(1, (stop - start) // unit // 2) * unit
    yield from _steps(start, middle, unit)
    yield start, stop, middle
    yield from _steps(middle, stop, unit)
