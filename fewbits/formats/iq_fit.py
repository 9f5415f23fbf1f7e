"""Fits IQ blocks: signs, the scale of each group, and their codes in a block.

    signs     the sign of each weight; if the number of minus signs must be even, the cheapest flip
    scale     from several starts, each refitted by least squares to its nearest points
    shift     (IQ1) chosen at the first start and kept, then chosen again for the first coded scales
    block     d in f16 and odd integers that code the groups' scales, refitted to the nearest points
    points    searched again for the scales as stored

Reference of csrc/iq_encode.h, equal to it bit for bit: the same operations in the same order. Weights are
stored group by group, `(group, G)`; vectors are runs of `dim` of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..lazy import torch
from .ggml_fit import to_half
from .ggml_layout import Values
from .search import inverse, lanes, ordered_sum

if TYPE_CHECKING:
    from .iq import Iq

RECODE_ROUNDS = 2


@dataclass(frozen=True)
class Tile:
    """Groups side by side, `(group, G)`: weights without their signs, the signs, and importances."""

    x: torch.Tensor
    minus: torch.Tensor
    w: torch.Tensor

    @staticmethod
    def of(fmt: Iq, x: torch.Tensor, weight: torch.Tensor | None) -> Tile:
        """`(blocks, groups, group)` f32 each."""
        rows = lanes(x)
        w = torch.ones_like(rows) if weight is None else lanes(weight)
        if fmt.signs == "none":
            return Tile(rows, torch.zeros_like(rows, dtype=torch.bool), w)
        minus = rows < 0
        size = torch.where(minus, -rows, rows)
        if fmt.signs == "even":
            cost = (w * size).reshape(-1, 8, rows.shape[1])
            odd = minus.reshape(cost.shape).sum(1) % 2 == 1
            flip = torch.zeros_like(cost, dtype=torch.bool)
            flip.scatter_(1, cost.argmin(1)[:, None], odd[:, None])
            flip = flip.reshape(rows.shape)
            size, minus = torch.where(flip, -size, size), minus ^ flip
        return Tile(size, minus, w)


@dataclass(frozen=True)
class Points:
    """The best points of groups under a scale: places `(group / dim, G)`, shifts, and their moments."""

    places: torch.Tensor
    shift: torch.Tensor | None
    level: torch.Tensor
    cross: torch.Tensor
    square: torch.Tensor


def vectors(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`(group, G)` -> `(group / dim * G, dim)`."""
    return x.reshape(-1, dim, x.shape[1]).transpose(1, 2).reshape(-1, dim)


def points_of(fmt: Iq, t: Tile, scale: torch.Tensor, shift: torch.Tensor | None = None) -> Points:
    """scale `(G,)`; shift `(shifts, G)`: 1 where levels are lowered, searched if not given."""
    lattice = fmt.lattice.on(t.x.device)
    dim, count = lattice.dim, t.x.shape[0] // lattice.dim
    wx, w = t.w * t.x, t.w
    parts = vectors(wx, dim), vectors(w, dim), scale.repeat(count)
    shape = count, len(scale)
    if not fmt.shift:
        places = lattice.search(*parts)[0].reshape(shape)
        lowered = None
    else:
        (up, cost_up), (down, cost_down) = (
            lattice.search(*parts, shift=sign * fmt.delta) for sign in (1, -1)
        )
        if shift is None:
            each = fmt.shift // dim
            costs = (c.reshape(-1, each, len(scale)).transpose(0, 1) for c in (cost_up, cost_down))
            cost_up, cost_down = (ordered_sum(c) for c in costs)
            shift = (cost_down < cost_up).to(torch.int32)
        lowered = shift.repeat_interleave(count // len(shift), 0)
        places = torch.where(lowered > 0, down.reshape(shape), up.reshape(shape))
    level = lattice.levels[lattice.points[places]].transpose(1, 2).reshape(t.x.shape)
    if lowered is not None:
        level = level + (1 - 2 * lowered.repeat_interleave(dim, 0)) * fmt.delta
    return Points(places, shift, level, ordered_sum(wx * level), ordered_sum(w * level * level))


def fit_scales(fmt: Iq, t: Tile, search: bool) -> torch.Tensor:
    """-> the scale of each group, `(G,)`."""
    edge = torch.maximum(t.x, -t.x).amax(0)
    scale = edge / fmt.last
    if not search:
        return scale
    best = torch.zeros_like(scale)
    shift = None
    for factor in fmt.starts:
        points = points_of(fmt, t, edge * factor, shift)
        scale, best = keep_better(points, scale, best)
        shift = points.shift
    return scale


def keep_better(points: Points, scale: torch.Tensor, best: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    fitted = points.cross / points.square
    score = points.cross * fitted
    better = (points.cross > 0) & (score > best)
    return torch.where(better, fitted, scale), torch.where(better, score, best)


def fit_block(fmt: Iq, x: torch.Tensor, weight: torch.Tensor | None, search: bool) -> Values:
    """`(blocks, groups, group)` f32 -> d, scale and shift of each block."""
    t = Tile.of(fmt, x, weight)
    shape = x.shape[:2]
    scale = fit_scales(fmt, t, search).reshape(shape)
    hi = 2 * fmt.scale_top + 1
    d = to_half(scale.amax(1) / (hi * fmt.unit))
    odd = nearest_odd(scale, d * fmt.unit, hi)
    shift = None
    for _ in range(RECODE_ROUNDS if search else 0):
        points = points_of(fmt, t, ((d * fmt.unit)[:, None] * odd).reshape(-1), shift)
        shift = points.shift
        cross, square = points.cross.reshape(shape), points.square.reshape(shape)
        odd = torch.where(square > 0, nearest_odd(cross / square, d * fmt.unit, hi), odd)
        up, down = ordered_sum((odd * cross).T), ordered_sum((odd * odd * square).T)
        d = torch.where((up > 0) & (down > 0), to_half(up / down / fmt.unit), d)
    values = {"d": d[:, None], "scale": ((odd - 1) / 2).to(torch.int32)}
    if fmt.shift and shift is None:
        shift = points_of(fmt, t, ((d * fmt.unit)[:, None] * odd).reshape(-1)).shift
    if shift is not None:
        values["shift"] = shift.T.reshape(len(d), -1)
    return values


def nearest_odd(scale: torch.Tensor, unit: torch.Tensor, hi: int) -> torch.Tensor:
    """`(blocks, groups)` scales -> the odd integers in [1, hi] that come nearest to scale / unit."""
    half = torch.round((scale * inverse(unit)[:, None] - 1.0) * 0.5)
    return torch.clamp(half, 0, (hi - 1) // 2) * 2.0 + 1.0
