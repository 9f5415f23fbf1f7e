"""The sweep: settle the columns of a weight one after the other, each knowing what the others became.

Error feedback and coordinate descent are the same walk. Column i, once settled, moves by moves[i],
and every later column j has its state pulled along: state[j] -= coupling[i, j] * moves[i]. Done
column by column that is bound by memory; here halves are settled by recursion, and all that the left
half says to the right one is a single product of matrices:

    settle 0 ... 7   =   settle 0 ... 3,   state[4:8] -= coupling[0:4, 4:8]^T moves[0:4],   settle 4 ... 7

So there is no block size, and nothing depends on one. Arrays lie column by column: (k, n).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch

from ..core import one_torch_thread

SMALL = 2**19  # numbers that are settled at once: fewer, and threads cost more than they bring


def sweep(
    state: torch.Tensor,
    coupling: torch.Tensor,
    moves: torch.Tensor,
    settle: Callable[[int, int], None],
    unit: int = 1,
) -> None:
    """Call `settle(start, stop)` for every `unit` columns of state `(k, n)` in turn, in place.

    settle reads state[start:stop] and writes moves[start:stop]; coupling: `(k, k)`, its part above the
    diagonal is used.
    """
    for start, stop, middle in _visits(0, state.shape[0], unit):
        if middle is None:
            with one_torch_thread() if state[start:stop].numel() < SMALL else nullcontext():
                settle(start, stop)
        else:
            state[middle:stop].addmm_(coupling[start:middle, middle:stop].T, moves[start:middle], alpha=-1)


def _visits(start: int, stop: int, unit: int) -> Iterator[tuple[int, int, int | None]]:
    """What is done in turn: columns start ... stop settled (middle None), or those before the middle told
    to those after it."""
    if stop - start <= unit:
        yield start, stop, None
        return
    middle = start + max(1, (stop - start) // unit // 2) * unit
    yield from _visits(start, middle, unit)
    yield start, stop, middle
    yield from _visits(middle, stop, unit)
