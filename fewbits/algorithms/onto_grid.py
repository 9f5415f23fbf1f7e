"""onto_grid(): new codes on a grid that is given, for a weight that has moved.

    nearest      the nearest value of the grid to each weight: a move smaller than half a step is lost
    feedback     GPTQ's columns one after the other, then descent on the codes (see gptq.py, descent.py): what
                 a column loses is made up for by the later ones, so that small moves of many weights are kept

Scales and offsets stay as they are. Of each row the better one is taken, by the error of the output.
"""

from __future__ import annotations

import torch

from ..calibrate.stats import Stats
from ..formats import Grid
from ..qtensor import QTensor
from .descent import keep_better, recode
from .gptq import DESCENT, column_order, feed_back
from .hessian import DAMP, HessianFactor, loss, require_stats


def onto_grid(
    w: torch.Tensor, q: QTensor, stats: Stats | None = None, damp: float = DAMP, descent: int = DESCENT
) -> QTensor:
    """`(n, k)` float, a weight on the grid wanted -> w on that grid. Nearest without statistics; with them of
    the least output error found, and no row's is larger than that of the nearest."""
    w = w.float()
    grid, _ = q.format.unpack(q)
    nearest = q.format.pack(grid, grid.round(w))
    if stats is None:
        return nearest
    stats = require_stats(stats, w, "onto_grid")
    order = column_order(stats, w.shape[1], q.format.vector)
    factor = HessianFactor.of(stats, damp, order)
    fed, _ = feed_back(q.format, grid, w.T[order], factor.factor, order)
    if q.format.vector == 1:  # a vector's best point is not known column by column
        fed = _descended(fed, grid, w, factor.hessian, descent)
    lost = [loss(each.decode(), w, factor.hessian) for each in (fed, nearest)]
    return keep_better(fed, nearest, lost[0], lost[1])


def _descended(q: QTensor, grid: Grid, w: torch.Tensor, hessian: torch.Tensor, rounds: int) -> QTensor:
    _, codes = q.format.unpack(q)
    value = grid.value(codes)
    for _ in range(rounds):
        codes, value = recode(grid, codes, value, hessian @ (value - w).T, hessian)
    return q.format.pack(grid, codes)
