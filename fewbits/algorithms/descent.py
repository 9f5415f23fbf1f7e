"""Coordinate descent: better codes and block parameters for a quantized weight, in closed form.

For the loss tr((q - t) H (q - t)^T) (see curvature.py) let G = (q - t) H, half its gradient.

    codes      with all other columns held, column j is best at q_j - G_j / H_jj; rounding that to the
               grid is the exact minimum, since the loss is a parabola in q_j
    steps      with the codes held, q = D s is linear in the steps and bases s of a row's groups, so the
               best change of s solves (D^T H D) ds = -D^T G: some numbers a row, solved for all rows

One round goes through the atoms of the format (the columns whose bytes can be packed alone) from left
to right: refit the steps of an atom, then sweep its columns. A refit is kept for the rows whose loss
it lowers once the parameters are stored in their few bits. Rounds go on until one gains less than
LEAST_GAIN. No step raises the loss, so this may follow any algorithm on any format.
"""

from __future__ import annotations

from math import ceil

import torch

from ..calibrate.stats import Stats
from ..formats import Format, Grid
from ..qtensor import QTensor
from .curvature import ASYMMETRIC, DAMP, Curvature, require_stats
from .sweep import sweep
from .walk import UNIT, walk

ROUNDS = 8
LEAST_GAIN = 0.005


def descend(
    q: QTensor,
    w: torch.Tensor,
    stats: Stats | None,
    rounds: int = ROUNDS,
    damp: float = DAMP,
    asymmetric: float = ASYMMETRIC,
) -> QTensor:
    """A QTensor of w `(n, k)` by any algorithm -> one of the same format with no higher loss."""
    stats = require_stats(stats, w, "descent")
    curvature = Curvature.of(stats, damp)
    return descended(q, curvature.target(w, stats, asymmetric), curvature.hessian, rounds)


def descended(q: QTensor, target: torch.Tensor, hessian: torch.Tensor, rounds: int = ROUNDS) -> QTensor:
    """The same for a known target `(n, k)` and damped Hessian `(k, k)`."""
    k = q.shape[1]
    atom = q.format.atom(k) or k
    parts = [q.format.unpack(part) for part in split_columns(q, atom)]
    value = q.decode().T.contiguous()
    wanted = target.T.contiguous()
    moves = torch.empty_like(value)

    def settle(start: int, stop: int) -> None:
        columns = slice(start, stop)
        grid, codes = parts[start // atom]
        inner = hessian[columns, columns]
        now = value[columns].T.contiguous()
        grid, changed = refit(q.format, grid, codes, pull[columns].T.contiguous(), inner)
        pull_here = pull[columns] + inner @ (changed - now).T
        best = changed
        if q.format.vector == 1:  # a vector's best point is not known column by column
            codes, best = recode(grid, codes, changed, pull_here, inner)
        parts[start // atom] = grid, codes
        moves[columns] = (now - best).T
        value[columns] = best.T

    before = torch.inf
    for _ in range(rounds):
        pull = hessian @ (value - wanted)
        now = float(((value - wanted) * pull).sum(dtype=torch.float64))
        if before - now <= LEAST_GAIN * now:
            break
        before = now
        sweep(pull, hessian, moves, settle, atom)
    return join_parts([q.format.pack(grid, codes) for grid, codes in parts])


def recode(
    grid: Grid, codes: torch.Tensor, value: torch.Tensor, pull: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """value `(n, k)`, pull `(k, n)` (G transposed) -> codes and values `(n, k)` after one sweep."""
    diagonal = hessian.diagonal()
    best, old = (value.T - pull / diagonal[:, None]).contiguous(), value.T.contiguous()
    coupling, columns = hessian / diagonal, torch.arange(len(diagonal))
    new, moves, chosen = torch.empty_like(old), torch.empty_like(old), []

    def settle(start: int, stop: int) -> None:
        here = slice(start, stop)
        found, new[here], moves[here] = walk(
            grid, best[here], coupling[here, here], columns[here], old=old[here]
        )
        chosen.append(found)

    sweep(best, coupling, moves, settle, UNIT)
    return torch.cat(chosen).T.contiguous(), new.T.contiguous()


def refit(
    format: Format, grid: Grid, codes: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor
) -> tuple[Grid, torch.Tensor]:
    """-> the grid with better steps where that lowers the loss for these codes, and its values `(n, k)`."""
    value = grid.value(codes)
    step, base = grid.groups(codes.shape[0])
    change = solve_steps(grid.level(codes), gradient, hessian, grid.group, base is not None)
    fitted = grid.refitted(step + change[0], None if base is None else base + change[1])
    if fitted is grid:
        return grid, value
    moved = fitted.value(codes) - value
    gain = (moved * (2 * gradient + moved @ hessian)).sum(1)
    if not rows_alone(format):
        return (fitted, value + moved) if float(gain.sum()) < 0 else (grid, value)
    if not bool((gain < 0).any()):
        return grid, value
    kept = where_rows(gain < 0, format.pack(fitted, codes), format.pack(grid, codes))
    grid, _ = format.unpack(kept)
    return grid, grid.value(codes)


def solve_steps(
    level: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, width: int, bases: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels and half gradients `(n, k)` -> the best changes of steps and bases `(n, g)`, unrounded."""
    k = level.shape[1]
    g = ceil(k / width)
    kinds = [level, torch.ones_like(level)] if bases else [level]
    rows = []
    for left in kinds:
        for start in range(0, k, width):
            inside = slice(start, min(start + width, k))
            reach = left[:, inside] @ hessian[inside]
            rows.append(torch.cat([group_sums(reach * right, width) for right in kinds], 1))
    square = torch.stack(rows, 1)
    slope = torch.cat([group_sums(gradient * kind, width) for kind in kinds], 1)
    # A group whose levels are all zero has no say: its step stays. The ridge is a few ulps of f32.
    diagonal = square.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(diagonal > 0, diagonal * (1 + 1e-6), 1.0))
    found, _ = torch.linalg.solve_ex(square, -slope)
    found = torch.where(found.isfinite(), found, 0.0)
    return found[:, :g], found[:, g:]


def group_sums(x: torch.Tensor, width: int) -> torch.Tensor:
    """`(n, k)` -> `(n, ceil(k / width))`: sums over groups of columns, the last of which may be short."""
    n, k = x.shape
    x = torch.nn.functional.pad(x, (0, -k % width)) if k % width else x
    return x.reshape(n, -1, width).sum(2)


def rows_alone(format: Format) -> bool:
    """Whether every plane belongs to one row, so that a row may be exchanged for another."""
    return all(plane.rows == 1 and plane.flat is None for plane in format.planes)


def keep_better(a: QTensor, b: QTensor, lost_a: torch.Tensor, lost_b: torch.Tensor) -> QTensor:
    """The one of lower loss `(n,)`: row by row where rows stand alone, else as a whole."""
    if rows_alone(a.format):
        return where_rows(lost_a < lost_b, a, b)
    return a if float(lost_a.sum()) < float(lost_b.sum()) else b


def where_rows(first: torch.Tensor, a: QTensor, b: QTensor) -> QTensor:
    """Row by row a (where `first (n,)`) or b, of a format whose rows stand alone."""
    planes = {name: torch.where(first[:, None], a.planes[name], b.planes[name]) for name in a.planes}
    return QTensor(a.format, a.shape, planes)


def join_rows(parts: list[QTensor]) -> QTensor:
    """Parts of a weight, some rows each, of a format whose rows stand alone."""
    if len(parts) == 1:
        return parts[0]
    planes = {name: torch.cat([part.planes[name] for part in parts]) for name in parts[0].planes}
    return QTensor(parts[0].format, (sum(part.shape[0] for part in parts), parts[0].shape[1]), planes)


def join_parts(parts: list[QTensor]) -> QTensor:
    """The inverse of `split_columns`."""
    return parts[0] if len(parts) == 1 else QTensor.join_columns(parts)


def split_columns(q: QTensor, width: int) -> list[QTensor]:
    """Parts of `width` columns, an atom of the format or all."""
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
