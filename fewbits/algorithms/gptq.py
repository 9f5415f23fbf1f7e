"""GPTQ: columns are rounded one after the other, and those still to come make up for each error.

With H^-1 = U^T U (see hessian.py) and columns j in the order in which they are taken:

    q_j   = nearest value of the grid to w_j
    err_j = (w_j - q_j) / U_jj                  the sum of err^2 is the loss
    w_i  -= err_j U_ji                          for every later column i

A format's *column block* is the columns whose bytes can be packed alone: 64 of int4_g64, 256 of q4_k.

    fit="dynamic"   the parameters of a block are fitted when its first column is reached, to the weights
                    as feedback has left them; the error of column j weighs 1 / U_jj^2, as in the loss
    fit="searched"  the same, and the fitted steps are tried a little smaller and larger: each row keeps
                    what leaves it the least loss once the columns of the block have been fed back
    fit="static"    the parameters of the whole weight are fitted first

Formats whose parameters span rows or the whole weight are always static; one whose parameters span a
row has that row as its only column block. Columns that matter most go first, while many can still make up
for them: blocks are taken by falling diag(H), and the columns inside a block likewise. Their place in the
file does not change, so that any format allows it. A format in act order has groups of the columns as
they are taken, all of them by falling diag(H): its column blocks are those of the format in order.

On a GPU `gptq_batch` quantizes weights of one shape in lockstep (see lockstep.py): each has its own Hessian
and its own order, and every step is one launch for all of them.

Source: Frantar et al., GPTQ (arXiv 2210.17323). The blocks, their order and the search are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..calibrate.stats import Stats
from ..errors import PlanError, raise_all
from ..formats import Format, Grid
from ..formats.zero import fit_with_zero
from ..qtensor import QTensor
from .blocked import blocked_update
from .columns import UNIT, quantize_columns
from .descent import descended, join_parts
from .hessian import DAMP, GPTAQ, HessianFactor, require_stats
from .lockstep import count_of, of_rows, taken

FITS = ("searched", "dynamic", "static")
# Of a fitted step; the first is the fit itself, and wins ties.
SCALINGS = (1.0, 0.9, 0.95, 1.05)
# Two rounds gain three quarters of what eight do: 5 % of the loss in 4 bits, 12 % in q2_k.
DESCENT = 2
# Weights at once where rows stand alone: feedback and descent hold about ten f32 copies of them. A GPU is
# kept busy by more.
PIECE, GPU_PIECE = 2**22, 2**26
# Bytes of the Hessians of weights in lockstep. While they are factored there are four of each: as measured
# and in order, its factor, and their inverse.
HESSIANS, HESSIAN_COPIES = 2**31, 4


def gptq(
    w: torch.Tensor,
    format: Format,
    stats: Stats | None = None,
    damp: float = DAMP,
    fit: str = "searched",
    descent: int = DESCENT,
    gptaq: float = GPTAQ,
) -> QTensor:
    """`(n, k)` float -> QTensor of least output error under stats.hessian (and stats.mismatch, if known).

    damp: share of the mean of diag(H) added to it. descent: rounds of coordinate descent after it.
    gptaq: share of the mismatch to correct (GPTAQ, arXiv 2504.02692).
    """
    return gptq_pruned(w, format, stats, None, Settings(damp, fit, descent, gptaq))


class Settings(NamedTuple):
    """The options of gptq."""

    damp: float = DAMP
    fit: str = "searched"
    descent: int = DESCENT
    gptaq: float = GPTAQ


def gptq_pruned(
    w: torch.Tensor, format: Format, stats: Stats | None, keep: torch.Tensor | None, settings: Settings
) -> QTensor:
    """`gptq` of a pruned weight: the others make up for those that `keep` `(n, k)` bool drops, and are
    rounded, in one pass (SparseGPT, arXiv 2301.00774, section 3.4)."""
    check_options(*settings)
    damp, fit, descent, gptaq = settings
    format.check(w)
    stats = require_stats(stats, w, "gptq")
    n, k = w.shape
    inner = format.ordered or format
    width = _width(inner, k, fit)
    order = column_order(stats, k if format.ordered else width, format.vector)
    hessian = HessianFactor.of(stats, damp, order)
    piece = PIECE if w.device.type == "cpu" else GPU_PIECE
    step = max(1, piece // k) if inner.rows_alone else n
    parts = []
    for start in range(0, n, step):
        rows = slice(start, start + step)
        target, mask = hessian.target(w[rows], stats, gptaq), None if keep is None else keep[rows]
        if format.ordered:
            in_order = replace(hessian, order=torch.arange(k, device=order.device))
            inner_mask = None if mask is None else mask[:, order]
            q = fed_back(target[:, order], inner, in_order, width, fit, inner_mask)
            q = format.arranged(q, order)
        else:
            q = fed_back(target, format, hessian, width, fit, mask)
        parts.append(descended(q, target, hessian.hessian, descent, mask) if descent else q)
    return QTensor.join_rows(parts)


def most_at_once(n: int, k: int) -> int:
    """How many weights `(n, k)` `gptq_batch` may get, so that they and their Hessians fit."""
    return max(1, min(GPU_PIECE // (n * k), HESSIANS // (4 * HESSIAN_COPIES * k * k)))


def gptq_batch(
    ws: Sequence[torch.Tensor], format: Format, stats: Sequence[Stats], settings: Settings
) -> list[QTensor | None]:
    """Weights `(n, k)` of one shape on one device, and the statistics of each, for which `in_lockstep` holds
    -> what `gptq` makes of each, except that sums on a GPU may run in another order.

    None for a weight whose Hessian needs more damping than asked: `gptq` raises it, and says so."""
    check_options(*settings)
    damp, fit, descent, gptaq = settings
    for w, each in zip(ws, stats, strict=True):
        format.check(w)
        require_stats(each, w, "gptq")
    n, k = ws[0].shape
    width = _width(format, k, fit)
    order = torch.stack([column_order(each, width) for each in stats])
    hessian, known = HessianFactor.of_each(stats, damp, order)
    found: list[QTensor | None] = [None] * len(ws)
    if hessian is None:
        return found
    targets = [hessian.part(i).target(ws[j], stats[j], gptaq) for i, j in enumerate(known)]
    target = torch.cat(targets)
    del targets
    q = fed_back(target, format, hessian, width, fit)
    q = descended(q, target, hessian.hessian, descent) if descent else q
    for i, j in enumerate(known):
        found[j] = q.take_rows(slice(i * n, (i + 1) * n))
    return found


def _width(format: Format, k: int, fit: str) -> int:
    """The columns that are fitted at once."""
    return k if fit == "static" else format.column_block(k) or k


def fed_back(
    target: torch.Tensor,
    format: Format,
    hessian: HessianFactor,
    width: int,
    fit: str,
    keep: torch.Tensor | None = None,
) -> QTensor:
    """Rows `(n, k)`, in lockstep `(e n, k)` -> their QTensor, `width` columns at a time in the order of the
    factor."""
    order, n = hessian.order, len(target)
    state = taken(target.T, order).contiguous()
    mask = None if keep is None else keep.T[order].float()
    moves = torch.empty_like(state)
    parts: list[QTensor] = []

    def quantize(start: int, stop: int) -> None:
        columns = order[..., start:stop] % width
        factor = hessian.factor[..., start:stop, start:stop]
        here = None if mask is None else mask[start:stop]
        seen = state[start:stop] if here is None else state[start:stop] * here
        seen, weight = taken(seen, columns.argsort()).T.contiguous(), of_rows(weights(factor, columns), n)
        grid = format.fit(seen, weight) if here is None else fit_with_zero(format, seen, weight)
        feed = feed_searched if fit == "searched" and format.rows_alone else feed_back
        q, moves[start:stop] = feed(format, grid, state[start:stop], factor, columns, here)
        parts.append(q)

    blocked_update(state, hessian.factor, moves, quantize, width)
    return join_parts(_in_place(parts, order[..., ::width] // width))


def _in_place(parts: list[QTensor], block: torch.Tensor) -> list[QTensor]:
    """Column blocks as they were taken -> as they lie. block `(b,)`: where each belongs; in lockstep
    `(e, b)`."""
    if block.ndim == 1:
        return [parts[i] for i in block.argsort().tolist()]
    (e, b), inverse, planes = block.shape, block.argsort(), {}
    each = torch.arange(e, device=block.device)[:, None]
    for name in parts[0].planes:
        stacked = torch.stack([part.planes[name] for part in parts], 1)  # (e n, b, entries)
        planes[name] = stacked.view(e, -1, *stacked.shape[1:]).transpose(1, 2)[each, inverse]
    first = parts[0]
    return [
        QTensor(first.format, first.shape, {name: x[:, i].flatten(0, 1) for name, x in planes.items()})
        for i in range(b)
    ]


def weights(factor: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """1 / U_jj^2 `([e,] c)` of the columns as they lie."""
    weight = factor.diagonal(dim1=-2, dim2=-1).pow(-2)
    return weight.gather(-1, columns.argsort())


def feed_back(
    format: Format,
    grid: Grid,
    state: torch.Tensor,
    factor: torch.Tensor,
    columns: torch.Tensor,
    keep: torch.Tensor | None = None,
) -> tuple[QTensor, torch.Tensor]:
    """Round state `(k, n)`, whose row i is the grid's column columns[i] -> QTensor, err `(k, n)`. keep
    `(k, n)`: 0 for what is rounded as if it were 0, else 1. In lockstep factor `(e, k, k)` and columns
    `(e, k)`."""
    state, errors, codes = state.clone(), torch.empty_like(state), []
    grid = grid.weighted(weights(factor, columns))

    def quantize(start: int, stop: int) -> None:
        here = slice(start, stop)
        inner = factor[..., here, here]
        pivot = inner.diagonal(dim1=-2, dim2=-1)
        mask = None if keep is None else keep[here]
        chosen, _, errors[here] = quantize_columns(
            grid, state[here], inner, columns[..., here], pivot=pivot, keep=mask
        )
        codes.append(chosen)

    blocked_update(state, factor, errors, quantize, UNIT)
    return format.pack(grid, taken(torch.cat(codes), columns.argsort()).T.contiguous()), errors


def feed_searched(
    format: Format,
    grid: Grid,
    state: torch.Tensor,
    factor: torch.Tensor,
    columns: torch.Tensor,
    keep: torch.Tensor | None = None,
) -> tuple[QTensor, torch.Tensor]:
    """The same for several scalings of the grid at once, as so many rows; each row keeps its best."""
    n, e, tried = state.shape[1], count_of(factor), len(SCALINGS)
    step, base = grid.groups(n)
    if grid.refitted(step, base) is grid:  # a float type: there is no scale
        return feed_back(format, grid, state, factor, columns, keep)
    fitted = format.pack(grid, grid.round(taken(state, columns.argsort()).T))
    # In lockstep all scalings of a weight lie together: e times (tried, n / e) rows.
    every = torch.arange(n, device=state.device).view(e, 1, -1)
    rows = every.expand(e, tried, -1).flatten()
    wide, _ = format.unpack(fitted.take_rows(rows))
    scaling = torch.tensor(SCALINGS, device=state.device).repeat_interleave(n // e).repeat(e)[:, None]
    wide = wide.refitted(step[rows] * scaling, None if base is None else base[rows] * scaling)
    if keep is not None:
        wide, keep = wide.with_zero(), keep.repeat(1, tried)
    repeated = state.view(len(state), e, 1, -1).expand(-1, -1, tried, -1).flatten(1)
    q, errors = feed_back(format, wide, repeated, factor, columns, keep)
    best = errors.square().sum(0).view(e, tried, -1).argmin(1, keepdim=True)  # (e, 1, n / e)
    best = torch.arange(len(rows), device=rows.device).view(e, tried, -1).gather(1, best).flatten()
    return q.take_rows(best), errors[:, best]


def column_order(stats: Stats, width: int, vector: int = 1) -> torch.Tensor:
    """-> `(k,)`: the columns as they are taken, blocks of `width` whole, and those of a vector together."""
    assert stats.hessian is not None
    diagonal = stats.hessian.diagonal().reshape(-1, width)
    blocks = diagonal.sum(1).argsort(dim=0, descending=True, stable=True)
    together = diagonal.reshape(len(diagonal), -1, vector).sum(2)
    vectors = together.argsort(dim=1, descending=True, stable=True)
    inside = (vectors[..., None] * vector + torch.arange(vector, device=vectors.device)).flatten(1)
    return (inside[blocks] + blocks[:, None] * width).flatten()


def check_options(damp: float, fit: str, descent: int, gptaq: float) -> None:
    faults = []
    if not damp >= 0:
        faults.append(f"damp is {damp}; it is a share of the mean diagonal, 0 or more")
    if fit not in FITS:
        faults.append(f"fit is {fit!r}; choose one of {', '.join(FITS)}")
    if descent < 0:
        faults.append(f"descent is {descent}; it counts rounds, 0 or more")
    if not 0 <= gptaq <= 1:
        faults.append(f"gptaq is {gptaq}; it is a share of the mismatch, 0 to 1")
    raise_all(PlanError, "gptq", faults)
