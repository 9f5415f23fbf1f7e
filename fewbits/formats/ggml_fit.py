"""Fits the parameters of GGML blocks, and codes them in the bits of a block.

    x (blocks, groups, group)  ->  search.py: scale, offset of each group
                               ->  d, dmin in f16, scale and minimum in small integers
                               ->  d, dmin, scale, minimum again, for the resulting codes

`refit_values` does the second step for given scales and offsets.

Reference of csrc/ggml_encode.h, equal to it bit for bit: the same operations in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from ..lazy import torch
from .ggml_layout import Values
from .search import extreme, fit_affine, fit_symmetric, fit_table, inverse, lanes, nearest, ordered_sum

if TYPE_CHECKING:
    from .ggml import Ggml

HALF_MAX = 65504.0
# Rounds of recoding the integers of a two-level block; a third changes the error by less than 0.1 %.
RECODE_ROUNDS = 2
Moments: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]"
Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"


def exponent_scale(exponent: torch.Tensor) -> torch.Tensor:
    """The E8M0 byte e -> 2^(e - 128): half the scale, since the level table is doubled."""
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return bits.to(torch.int32).view(torch.float32)


def to_half(x: torch.Tensor) -> torch.Tensor:
    """f32 rounded to float16, the largest finite one on overflow; minus zero becomes zero."""
    return (x.clamp(-HALF_MAX, HALF_MAX) + 0.0).to(torch.float16).float()


def fit_values(fmt: Ggml, x: torch.Tensor, weight: torch.Tensor | None, search: bool) -> Values:
    """`(blocks, groups, group)` f32 -> the coded block parameters."""
    if fmt.name == "mxfp4_ggml":
        return fit_exponent(fmt, x, weight, search)
    if fmt.kind == "affine":
        offset_max = None if fmt.scale_range is None else 0.0
        scale, offset = fit_affine(x, weight, fmt.top, search, offset_max)
        if fmt.scale_range is None:
            return {"d": to_half(scale), "m": to_half(offset)}
        return code_scales_affine(fmt, x, weight, search, scale, offset)
    if fmt.levels is not None:
        scale = fit_table(x, weight, fmt.levels.to(x.device), search)
    else:
        brief = fmt.scale_range is None and weight is None
        scale = fit_symmetric(x, weight, -fmt.zero, fmt.top - fmt.zero, search, brief=brief)
    if fmt.scale_range is None:
        return {"d": to_half(scale)}
    return code_scales_symmetric(fmt, x, weight, search, scale)


def code_scales_symmetric(
    fmt: Ggml, x: torch.Tensor, weight: torch.Tensor | None, search: bool, group_scale: torch.Tensor
) -> Values:
    """Group scales `(blocks, groups)` -> f16 d and integer scales, both refitted to the codes."""
    assert fmt.scale_range is not None
    lo, hi = fmt.scale_range
    d = to_half(extreme(group_scale.T) / float(lo))
    scale = torch.clamp(torch.round(group_scale * inverse(d)[:, None]), lo, hi)
    for _ in range(RECODE_ROUNDS if search else 0):
        cross, square = group_moments(fmt, x, weight, d[:, None] * scale)
        wanted = torch.clamp(torch.round(cross / square * inverse(d)[:, None]), lo, hi)
        scale = torch.where(square > 0, wanted, scale)
        up, down = ordered_sum((scale * cross).T), ordered_sum((scale * scale * square).T)
        d = torch.where(down > 0, to_half(up / down), d)
    return {"d": d[:, None], "scale": scale.to(torch.int32) - lo}


def group_moments(
    fmt: Ggml, x: torch.Tensor, weight: torch.Tensor | None, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum(w x v) and sum(w v^2) of each group, v the unscaled levels for `scale`."""
    rows = lanes(x)
    w = torch.ones_like(rows) if weight is None else lanes(weight)
    inv = inverse(scale.reshape(-1))
    if fmt.levels is not None:
        levels = fmt.levels.to(x.device)
        v = levels[nearest(levels, rows * inv)]
    else:
        v = torch.clamp(torch.round(rows * inv), -fmt.zero, fmt.top - fmt.zero)
    wv = w * v
    return ordered_sum(wv * rows).reshape(scale.shape), ordered_sum(wv * v).reshape(scale.shape)


def code_scales_affine(
    fmt: Ggml,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    search: bool,
    group_scale: torch.Tensor,
    group_offset: torch.Tensor,
) -> Values:
    """Group scales and offsets -> f16 d and dmin, integer scales and minimums; all refitted to the codes."""
    assert fmt.scale_range is not None
    hi = fmt.scale_range[1]
    d, dmin = to_half(group_scale.amax(1) / float(hi)), to_half((-group_offset).amax(1) / float(hi))
    scale = torch.clamp(torch.round(group_scale * inverse(d)[:, None]), 0, hi)
    minimum = torch.clamp(torch.round(-group_offset * inverse(dmin)[:, None]), 0, hi)
    for _ in range(RECODE_ROUNDS if search else 0):
        moments = affine_moments(fmt, x, weight, d[:, None] * scale, dmin[:, None] * minimum)
        scale, minimum = recode_affine(moments, (d, dmin), (scale, minimum), hi)
        d, dmin = refit_affine(moments, (d, dmin), (scale, minimum))
    return {
        "d": d[:, None],
        "dmin": dmin[:, None],
        "scale": scale.to(torch.int32),
        "minimum": minimum.to(torch.int32),
    }


def affine_moments(
    fmt: Ggml, x: torch.Tensor, weight: torch.Tensor | None, scale: torch.Tensor, drop: torch.Tensor
) -> Moments:
    """Sums w q^2, w q, w, w x q and w x of each group, q the codes of value = scale * q - drop."""
    rows = lanes(x)
    w = torch.ones_like(rows) if weight is None else lanes(weight)
    q = torch.clamp(torch.round((rows + drop.reshape(-1)) * inverse(scale.reshape(-1))), 0, fmt.top)
    wq, wx = w * q, w * rows
    sqq, sq, sw, sxq, sx = (ordered_sum(p).reshape(scale.shape) for p in (wq * q, wq, w, wx * q, wx))
    return sqq, sq, sw, sxq, sx


def recode_affine(moments: Moments, halves: Pair, integers: Pair, hi: int) -> Pair:
    """Better integers for the same codes: the scale of the least-squares line, then the minimum that
    suits the coded scale; kept for each group if the (quadratic) error falls."""
    sqq, sq, sw, sxq, sx = moments
    d, dmin = halves[0][:, None], halves[1][:, None]
    scale, minimum = integers
    a = (sw * sxq - sx * sq) / (sw * sqq - sq * sq)
    new_scale = torch.clamp(torch.round(a * inverse(d)), 0, hi)
    new_group_scale = d * new_scale
    new_minimum = torch.clamp(torch.round((new_group_scale * sq - sx) / sw * inverse(dmin)), 0, hi)

    def error(group_scale: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
        return group_scale * (group_scale * sqq - 2.0 * (drop * sq + sxq)) + drop * (drop * sw + 2.0 * sx)

    better = error(new_group_scale, dmin * new_minimum) < error(d * scale, dmin * minimum)
    return torch.where(better, new_scale, scale), torch.where(better, new_minimum, minimum)


def refit_affine(moments: Moments, halves: Pair, integers: Pair) -> Pair:
    """Least squares of x = d (scale q) - dmin (minimum) over each block, for the moments' codes."""
    sqq, sq, sw, sxq, sx = moments
    (d, dmin), (scale, minimum) = halves, integers
    a = ordered_sum((scale * scale * sqq).T)
    b = ordered_sum((scale * minimum * sq).T)
    c = ordered_sum((minimum * minimum * sw).T)
    p, r = ordered_sum((scale * sxq).T), ordered_sum((minimum * sx).T)
    det = a * c - b * b
    both = det > 1e-6 * (a * c)
    new_d = torch.where(both, (p * c - r * b) / det, (p + dmin * b) / a)
    new_min = torch.where(both, (p * b - r * a) / det, dmin)
    good = (a > 0) & (new_d > 0) & (new_min >= 0)
    return torch.where(good, to_half(new_d), d), torch.where(good, to_half(new_min), dmin)


def fit_exponent(fmt: Ggml, x: torch.Tensor, weight: torch.Tensor | None, search: bool) -> Values:
    """MXFP4: floor(log2(amax)) - 2 as in the OCP MX specification, and its neighbours if searching."""
    assert fmt.levels is not None
    levels, rows = fmt.levels.to(x.device), lanes(x)
    w = torch.ones_like(rows) if weight is None else lanes(weight)
    amax = rows.abs().amax(0)
    exponent = (torch.frexp(amax).exponent - 1 - 2 + 127).clamp(0, 254).to(torch.int32)
    exponent = torch.where(amax > 0, exponent, torch.zeros_like(exponent))
    best, chosen = torch.full_like(amax, -torch.inf), exponent
    for change in (0, 1, -1) if search else (0,):
        candidate = (exponent + change).clamp(0, 254)
        scale = exponent_scale(candidate)
        v = levels[nearest(levels, rows * inverse(scale))]
        wv = w * v
        cross, square = ordered_sum(wv * rows), ordered_sum(wv * v)
        score = scale * (2.0 * cross - scale * square)
        better = score > best
        best, chosen = torch.where(better, score, best), torch.where(better, candidate, chosen)
    return {"exponent": chosen[:, None]}


def refit_values(
    fmt: Ggml, old: Values, scale: torch.Tensor, offset: torch.Tensor | None, weight: torch.Tensor | None
) -> Values:
    """Group scales and offsets `(blocks, groups)` -> the coded parameters that come nearest to them.

    Two-level types choose d, dmin and the small integers of a block together, and keep the old ones
    if no others are nearer. weight `(blocks, groups)`: the weight of each group's error.
    """
    if "exponent" in old:
        mantissa, exponent = torch.frexp(scale)
        exponent = exponent - (mantissa <= 0.75).int() + 128
        return {"exponent": torch.where(scale > 0, exponent, 0).clamp(0, 254)}
    if fmt.scale_range is None:
        d = to_half(scale)
        return {"d": d} if offset is None else {"d": d, "m": to_half(offset + (scale - d) * (fmt.top / 2))}
    weight = torch.ones_like(scale) if weight is None else weight
    lo, hi = fmt.scale_range
    if offset is None:
        return recode_scales(old, scale, weight, lo, hi)
    return recode_lines(old, (scale, offset), weight, hi, fmt.top)


def centred_values(fmt: Ggml, scale: torch.Tensor, half: int) -> Values:
    """Group scales `(blocks, groups)`, not negative -> parameters of minima that are `half` steps exactly, so
    that the code `half` is 0. half: a power of two."""
    if fmt.scale_range is None:
        d = to_half(scale)
        return {"d": d, "m": -half * d}
    hi = fmt.scale_range[1]
    d = to_half(scale.amax(1, keepdim=True) / hi)
    for _ in range(RECODE_ROUNDS):
        integer = torch.clamp(torch.round(scale * inverse(d)), 0, hi)
        square = (integer * integer).sum(1, keepdim=True)
        d = torch.where(square > 0, to_half((integer * scale).sum(1, keepdim=True) / square), d)
    coded = integer.to(torch.int32)
    return {"d": d, "dmin": half * d, "scale": coded, "minimum": coded}


# Starts of the search for d and dmin, in the integer that the widest group takes, as a share of the range.
RECODE_STARTS = (1.0, 0.93)


def recode_scales(old: Values, group_scale: torch.Tensor, weight: torch.Tensor, lo: int, hi: int) -> Values:
    """Group scales -> f16 d and integers in [lo, hi] with the least sum of weight (d * integer - scale)^2."""
    best_d, best = old["d"][:, 0], (old["scale"] + lo).float()

    def error(d: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return ((d[:, None] * scale - group_scale).square() * weight).sum(1)

    least = error(best_d, best)
    starts = [best_d, *(to_half(extreme(group_scale.T) / (share * float(lo))) for share in RECODE_STARTS)]
    for d in starts:
        for _ in range(RECODE_ROUNDS):
            scale = torch.clamp(torch.round(group_scale * inverse(d)[:, None]), lo, hi)
            up, down = (weight * scale * group_scale).sum(1), (weight * scale * scale).sum(1)
            d = torch.where(down > 0, to_half(up / down), d)
            now = error(d, scale)
            better = now < least
            best_d, least = torch.where(better, d, best_d), torch.where(better, now, least)
            best = torch.where(better[:, None], scale, best)
    return {"d": best_d[:, None], "scale": best.to(torch.int32) - lo}


def recode_lines(old: Values, line: Pair, weight: torch.Tensor, hi: int, top: int) -> Values:
    """Scales and offsets -> d, dmin and integers whose lines are nearest for codes distributed about top / 2.

    The codes of a group are assumed to have mean top / 2 and deviation top / 4, as those of a normal
    weight have, so the minimum compensates the error of the rounded scale at the middle.
    """
    group_scale, group_offset = line
    mean, square = top / 2, (top / 2) ** 2 + (top / 4) ** 2
    moments = (
        weight * square,
        weight * mean,
        weight,
        weight * (group_scale * square + group_offset * mean),
        weight * (group_scale * mean + group_offset),
    )

    def error(d: torch.Tensor, dmin: torch.Tensor, scale: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
        a, b = d[:, None] * scale - group_scale, -(dmin[:, None] * drop) - group_offset
        return ((a * (a * square + 2.0 * mean * b) + b * b) * weight).sum(1)

    best = [old["d"][:, 0], old["dmin"][:, 0], old["scale"].float(), old["minimum"].float()]
    least = error(*best)
    widest, deepest = group_scale.amax(1).clamp(min=0), (-group_offset).amax(1).clamp(min=0)
    starts = [(best[0], best[1])]
    starts += [(to_half(widest / (s * hi)), to_half(deepest / (s * hi))) for s in RECODE_STARTS]
    for d, dmin in starts:
        scale = torch.clamp(torch.round(group_scale * inverse(d)[:, None]), 0, hi)
        minimum = torch.clamp(torch.round(-group_offset * inverse(dmin)[:, None]), 0, hi)
        for _ in range(RECODE_ROUNDS):
            scale, minimum = recode_affine(moments, (d, dmin), (scale, minimum), hi)
            d, dmin = refit_affine(moments, (d, dmin), (scale, minimum))
            now = error(d, dmin, scale, minimum)
            better = now < least
            least = torch.where(better, now, least)
            fresh = (d, dmin, scale, minimum)
            best = [
                torch.where(better if new.ndim == 1 else better[:, None], new, kept)
                for new, kept in zip(fresh, best, strict=True)
            ]
    d, dmin, scale, minimum = best
    return {
        "d": d[:, None],
        "dmin": dmin[:, None],
        "scale": scale.to(torch.int32),
        "minimum": minimum.to(torch.int32),
    }
