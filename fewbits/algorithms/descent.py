"""Coordinate descent: better codes and block parameters for a quantized weight, in closed form.

For the loss tr((q - t) H (q - t)^T) (see hessian.py) let G = (q - t) H, half its gradient.

    codes      with all other columns fixed, column j is best at q_j - G_j / H_jj; rounding that to the
               grid is the exact minimum, since the loss is a parabola in q_j
    scales     with the codes fixed, q = D s is linear in the scales and offsets s of a row's groups, so the
               best change of s solves (D^T H D) ds = -D^T G: a small system per row, solved for all rows

One round goes through the column blocks of the format (the columns whose bytes can be packed alone) from left
to right: refit the scales of a block, then recode its columns. A refit is kept for the rows whose loss it
lowers with the parameters as stored. Rounds continue until one gains less than LEAST_GAIN. The loss never
rises, so this may follow any algorithm on any format.
"""

from __future__ import annotations

import torch

from ..calibrate.stats import Stats
from ..formats import Format, Grid
from ..qtensor import QTensor
from .blocked import blocked_update
from .columns import UNIT, quantize_columns
from .hessian import DAMP, GPTAQ, HessianFactor, require_stats
from .lockstep import count_of, of_rows, product, row_product
from .lockstep import parts as parts_of

ROUNDS = 8
LEAST_GAIN = 0.005


def descend(
    q: QTensor,
    w: torch.Tensor,
    stats: Stats | None,
    rounds: int = ROUNDS,
    damp: float = DAMP,
    gptaq: float = GPTAQ,
) -> QTensor:
    """A QTensor of w `(n, k)` by any algorithm -> one of the same format with no higher loss."""
    stats = require_stats(stats, w, "descent")
    hessian = HessianFactor.of(stats, damp)
    return descended(q, hessian.target(w, stats, gptaq), hessian.hessian, rounds)


def descended(
    q: QTensor,
    target: torch.Tensor,
    hessian: torch.Tensor,
    rounds: int = ROUNDS,
    keep: torch.Tensor | None = None,
) -> QTensor:
    """The same for a known target `(n, k)` and damped Hessian `(k, k)`. keep `(n, k)` bool: False for pruned
    weights, which stay 0, and so do offsets that make them 0. In lockstep targets `(e n, k)` and Hessians
    `(e, k, k)`, each with rounds of its own."""
    (n, k), e = q.shape, count_of(hessian)
    width = q.format.column_block(k) or k
    parts = [q.format.unpack(part) for part in split_columns(q, width)]
    value = q.decode().T.contiguous()
    wanted = target.T.contiguous()
    moves = torch.empty_like(value)

    def quantize(start: int, stop: int) -> None:
        columns = slice(start, stop)
        grid, codes = parts[start // width]
        inner = hessian[..., columns, columns]
        now = value[columns].T.contiguous()
        changed = now
        if keep is None or grid.groups(len(now))[1] is None:
            grid, changed = refit(q.format, grid, codes, pull[columns].T.contiguous(), inner)
        pull_here = pull[columns] + product(inner, (changed - now).T)
        best = changed
        if q.format.vector == 1:  # a vector's best point is not known column by column
            mask = None if keep is None else keep[:, columns].T.float()
            codes, best = recode(grid, codes, changed, pull_here, inner, mask)
        parts[start // width] = grid, codes
        moves[columns] = (now - best).T
        value[columns] = best.T

    def packed() -> QTensor:
        return join_parts([q.format.pack(grid, codes) for grid, codes in parts])

    before = torch.full((e,), torch.inf, dtype=torch.float64)
    at_end, ended = torch.zeros(e, dtype=torch.bool), list[tuple[torch.Tensor, QTensor]]()
    for _ in range(rounds):
        pull = product(hessian, value - wanted)
        now = parts_of((value - wanted) * pull, e).sum((1, 2), dtype=torch.float64).cpu()
        ends = ~at_end & (before - now <= LEAST_GAIN * now)
        at_end |= ends
        if bool(at_end.all()):
            break
        if bool(ends.any()):  # others go on, and take these with them
            ended.append((ends.repeat_interleave(n // e).to(value.device), packed()))
        before = now
        blocked_update(pull, hessian, moves, quantize, width)
    found = packed()
    for rows, earlier in ended:
        found = where_rows(rows, earlier, found)
    return found


def recode(
    grid: Grid,
    codes: torch.Tensor,
    value: torch.Tensor,
    pull: torch.Tensor,
    hessian: torch.Tensor,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """value `(n, k)`, pull and keep `(k, n)` (pull: G transposed) -> codes and values `(n, k)` after one
    round. In lockstep hessian `(e, k, k)`."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    best = (value.T - pull / torch.atleast_2d(of_rows(diagonal, len(value))).T).contiguous()
    old, coupling = value.T.contiguous(), hessian / diagonal[..., None, :]
    columns = torch.arange(len(pull)).expand(diagonal.shape)
    new, moves, chosen = torch.empty_like(old), torch.empty_like(old), []

    def quantize(start: int, stop: int) -> None:
        here = slice(start, stop)
        unit_codes, new[here], moves[here] = quantize_columns(
            grid, best[here], coupling[..., here, here], columns[..., here], old=old[here],
            keep=None if keep is None else keep[here],
        )  # fmt: skip
        chosen.append(unit_codes)

    blocked_update(best, coupling, moves, quantize, UNIT)
    return torch.cat(chosen).T.contiguous(), new.T.contiguous()


def refit(
    format: Format, grid: Grid, codes: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor
) -> tuple[Grid, torch.Tensor]:
    """-> the grid with better scales where that lowers the loss for these codes, and its values `(n, k)`."""
    value = grid.value(codes)
    scale, offset = grid.groups(codes.shape[0])
    change = solve_scales(grid, grid.level(codes), gradient, hessian, offset is not None)
    fitted = grid.refitted(scale + change[0], None if offset is None else offset + change[1])
    if fitted is grid:
        return grid, value
    moved = fitted.value(codes) - value
    gain = (moved * (2 * gradient + row_product(moved, hessian))).sum(1)
    if not bool((gain < 0).any()):
        return grid, value
    new, old = format.pack(fitted, codes), format.pack(grid, codes)
    if not exchangeable(new, old):
        return (fitted, value + moved) if float(gain.sum()) < 0 else (grid, value)
    grid, _ = format.unpack(where_rows(gain < 0, new, old))
    return grid, grid.value(codes)


def solve_scales(
    grid: Grid, level: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, offsets: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels and half gradients `(n, k)` -> the best changes of scales and offsets `(n, g)`, unrounded."""
    kinds = [level, torch.ones_like(level)] if offsets else [level]
    groups = grid.members(level.shape[1])
    g, rows = len(groups), []
    for left in kinds:
        for inside in groups:
            reach = row_product(left[:, inside], hessian[..., inside, :])
            rows.append(torch.cat([grid.sums(reach * right) for right in kinds], 1))
    square = torch.stack(rows, 1)
    slope = torch.cat([grid.sums(gradient * kind) for kind in kinds], 1)
    # A group whose levels are all zero keeps its scale. The ridge is a few ulps of f32.
    diagonal = square.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(diagonal > 0, diagonal * (1 + 1e-6), 1.0))
    solution, _ = torch.linalg.solve_ex(square, -slope)
    solution = torch.where(solution.isfinite(), solution, 0.0)
    return solution[:, :g], solution[:, g:]


def exchangeable(a: QTensor, b: QTensor) -> bool:
    """Whether rows of a can replace rows of b: data shared by all rows, such as the groups of columns, is
    equal."""
    if not a.format.rows_movable:
        return False
    shared = [plane.name for plane in a.format.planes if plane.rows is None]
    return all(torch.equal(a.planes[name], b.planes[name]) for name in shared)


def keep_better(a: QTensor, b: QTensor, lost_a: torch.Tensor, lost_b: torch.Tensor) -> QTensor:
    """The one of lower loss `(n,)`: row by row where rows are exchangeable, else as a whole."""
    if exchangeable(a, b):
        return where_rows(lost_a < lost_b, a, b)
    return a if float(lost_a.sum()) < float(lost_b.sum()) else b


def where_rows(first: torch.Tensor, a: QTensor, b: QTensor) -> QTensor:
    """Row by row a (where `first (n,)`) or b, whose rows are exchangeable."""
    planes = {
        plane.name: torch.where(first[:, None], a.planes[plane.name], b.planes[plane.name])
        if plane.rows
        else a.planes[plane.name]
        for plane in a.format.planes
    }
    return QTensor(a.format, a.shape, planes)


def join_parts(parts: list[QTensor]) -> QTensor:
    """The inverse of `split_columns`."""
    return parts[0] if len(parts) == 1 else QTensor.join_columns(parts)


def split_columns(q: QTensor, width: int) -> list[QTensor]:
    """Parts of `width` columns, a column block of the format or all."""
    n, k = q.shape
    if width == k:
        return [q]
    parts = []
    for start in range(0, k, width):
        planes = {}
        for plane in q.format.planes:
            assert plane.columns is not None
            first, last = (edge // plane.columns * plane.entries for edge in (start, start + width))
            planes[plane.name] = q.planes[plane.name][:, first:last]
        parts.append(QTensor(q.format, (n, width), planes))
    return parts
