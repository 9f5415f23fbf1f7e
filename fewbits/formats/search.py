"""The search of the scale (and offset) that represents a group of weights best.

A group is G weights x with importances w >= 0. Its representable values are

    symmetric   scale * q              q integer in [lo, hi]
    affine      scale * q + offset     q integer in [0, top]
    table       scale * table[i]       a sorted table of levels

and the search minimizes sum(w (x - value)^2). For fixed codes the best scale and offset have a closed
form, weighted least squares. So each candidate scale proposes codes, the closed form refits, and the
candidate that explains most of the energy sum(w x^2) wins:

    symmetric, table   (sum w x v)^2 / sum w v^2                          v = q or table[i]
    affine             2 (scale sum w x q + offset sum w x) - sum w (scale q + offset)^2

The candidates map the group's extreme value a little beyond or inside the last code.
llama.cpp scans the same family (make_qx_quants, make_qkx2_quants); here rounds of Lloyd's
alternation follow, which start from the best candidate and cannot make it worse.

This is the reference in plain torch of csrc/search.h, equal to it bit for bit: the same operations in
the same order, and sums that run from the first weight of a group to its last (`ordered_sum`). All
functions take x `(..., G)` f32 and a weight of the same shape or None, and return `(...)` f32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..lazy import torch
from .intervals import pick

# In codes beyond the last one. On the weights of SmolLM2-135M a scan four times as fine lowers the
# error of 4-bit groups by less than 1 %.
SYMMETRIC_MARGINS = (0.0, -0.6, 0.4, -1.5, -1.0, -0.3)
BRIEF = 3  # number of margins in a brief scan: 0.9 % more squared error in 4 bits
AFFINE_MARGINS = (0.0, -1.8, -1.5, -1.2, -0.9, -0.6, -0.3, 0.3, 0.6)
# With at most two magnitudes the best scale is far inside the extreme value.
COARSE_MARGINS = (0.4, 1.2, 1.8, 0.0, 0.8, 2.5)
# In shares of the table's last level.
TABLE_MARGINS = (0.0, -0.12, -0.08, -0.04, 0.04, 0.08)
# Rounds of Lloyd's alternation after the scan.
SCALE_ROUNDS, AFFINE_ROUNDS = 1, 2


def ordered_sum(x: torch.Tensor) -> torch.Tensor:
    """`(G, ...)` -> `(...)`: the sum from the first row to the last, one IEEE addition at a time.

    More than 256 rows are first folded, in order, onto 32 partial sums (themselves summed alike, so
    that a group as large as a tensor takes a handful of steps).
    """
    if x.shape[0] > 256:
        missing = -x.shape[0] % 32
        if missing:
            x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
        x = ordered_sum(x.reshape(-1, 32, *x.shape[1:]))
    return ordered_sum_rows(x)


def ordered_sum_rows(x: torch.Tensor) -> torch.Tensor:
    total = x[0].clone()
    if x.device.type == "cpu" and x.ndim > 1:  # there index_add_ adds whole rows one after the other
        return total[None].index_add_(0, torch.zeros(len(x) - 1, dtype=torch.int32), x[1:])[0]
    for row in x[1:]:
        total += row
    return total


def inverse(x: torch.Tensor) -> torch.Tensor:
    """1 / x, or 0 if that is not finite (x zero or too small to invert)."""
    y = 1.0 / x
    return torch.where(y.abs() <= torch.finfo(torch.float32).max, y, 0.0)


def lanes(x: torch.Tensor) -> torch.Tensor:
    """`(..., G)` -> `(G, N)` contiguous: groups side by side, as the C++ core holds them."""
    return x.reshape(-1, x.shape[-1]).T.contiguous()


def extreme(x: torch.Tensor) -> torch.Tensor:
    """`(G, N)` -> `(N,)`: the value of largest magnitude with its sign; of two, the positive one."""
    top, bottom = x.amax(0), x.amin(0)
    return torch.where(top >= -bottom, top, bottom)


def nearest(table: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Index of the level nearest to t; a tie goes to the upper one. table: (L,) sorted."""
    return pick(torch.arange(len(table), device=t.device), middles(table), t)


def middles(table: torch.Tensor) -> torch.Tensor:
    """`(..., L)` sorted levels -> `(..., L - 1)`: the boundaries between the nearest of them."""
    return (table[..., 1:] + table[..., :-1]) * 0.5


def fit_symmetric(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    lo: int,
    hi: int,
    search: bool = True,
    signed: bool = True,
    brief: bool = False,
) -> torch.Tensor:
    """Best scale of value = scale * q, q in [lo, hi].

    If lo = -hi - 1, the scale takes the sign that gives the extreme value the code lo. signed=False
    keeps it positive, for file types whose scales must be.
    """
    shape, x = x.shape[:-1], lanes(x)
    two_sided = signed and lo != -hi
    last = float(lo) if two_sided else float(hi)
    edge = extreme(x) if two_sided else torch.maximum(x.amax(0), x.amin(0) * (float(hi) / float(lo)))
    scale = edge / last
    if search:
        margins = COARSE_MARGINS if hi <= 1 else SYMMETRIC_MARGINS
        sign = 1.0 if last > 0 else -1.0
        candidates = [last + sign * margin for margin in (margins[:BRIEF] if brief else margins)]

        def levels(inv: torch.Tensor, out: torch.Tensor) -> None:
            torch.mul(x, inv, out=out).round_().clamp_(lo, hi)

        scale = scan_scale(x, weight, scale, inverse(edge), candidates, levels, signed)
    return scale.reshape(shape)


def fit_table(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    table: torch.Tensor,
    search: bool = True,
    signed: bool = True,
) -> torch.Tensor:
    """Best scale of value = scale * table[i]; table: sorted `(L,)`, first level negative, last positive."""
    shape, x = x.shape[:-1], lanes(x)
    first, final = float(table[0]), float(table[-1])
    one_sided = signed and first != -final
    last = (first if -first > final else final) if one_sided else final
    edge = extreme(x) if one_sided else torch.maximum(x.amax(0), x.amin(0) * (final / first))
    scale = edge / last
    if search:
        boundaries = middles(table)

        def levels(inv: torch.Tensor, out: torch.Tensor) -> None:
            pick(table, boundaries, torch.mul(x, inv, out=out), out)

        candidates = [last * (1.0 + margin) for margin in TABLE_MARGINS]
        scale = scan_scale(x, weight, scale, inverse(edge), candidates, levels, signed)
    return scale.reshape(shape)


def scan_scale(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor,
    inverse_edge: torch.Tensor,
    candidates: Sequence[float],
    levels: Callable[[torch.Tensor, torch.Tensor], None],
    signed: bool,
) -> torch.Tensor:
    """The scan shared by symmetric grids and tables: propose, refit, keep the best, alternate.

    levels(inv, out) writes the level nearest to each x * inv. Buffers are allocated once, because fresh
    memory costs more than the arithmetic.
    """
    w = None if weight is None else lanes(weight)
    best, v = torch.zeros_like(scale), torch.empty_like(x)
    terms = x.new_empty(x.shape[0], 2, *x.shape[1:])

    def consider(inv: torch.Tensor) -> None:
        nonlocal scale, best
        levels(inv, v)
        wv = v if w is None else torch.mul(w, v, out=terms[:, 1])
        torch.mul(wv, x, out=terms[:, 0])
        torch.mul(wv, v, out=terms[:, 1])
        cross, square = ordered_sum(terms)
        fitted = cross / square
        score = cross * fitted
        better = (square > 0) & (score > best)
        if not signed:
            better &= fitted > 0
        scale, best = torch.where(better, fitted, scale), torch.where(better, score, best)

    for candidate in candidates:
        consider(candidate * inverse_edge)
    for _ in range(SCALE_ROUNDS if len(candidates) > BRIEF else 0):
        consider(inverse(scale))
    return scale


def fit_affine(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    top: int,
    search: bool = True,
    offset_max: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best (scale, offset) of value = scale * q + offset, q in [0, top]; offset_max=0 keeps offset <= 0."""
    shape, x = x.shape[:-1], lanes(x)
    low = x.amin(0) if offset_max is None else torch.clamp(x.amin(0), max=offset_max)
    y = x - low
    span = y.amax(0)
    scale, shift = span / float(top), torch.zeros_like(span)
    if search:
        room = None if offset_max is None else offset_max - low
        w = None if weight is None else lanes(weight)
        scale, shift = scan_affine(y, w, top, scale, inverse(span), room)
    offset = shift + low
    if offset_max is not None:
        offset = torch.clamp(offset, max=offset_max)
    return scale.reshape(shape), offset.reshape(shape)


def scan_affine(
    y: torch.Tensor,
    w: torch.Tensor | None,
    top: int,
    scale: torch.Tensor,
    inverse_span: torch.Tensor,
    room: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan of an affine grid over y >= 0; `room`: how far the offset may rise above zero."""
    shift = torch.zeros_like(scale)
    best = torch.zeros_like(scale)
    q, terms = torch.empty_like(y), y.new_empty(y.shape[0], 3, *y.shape[1:])
    wy = y if w is None else w * y
    swy = ordered_sum(wy)
    sw = torch.full_like(swy, y.shape[0]) if w is None else ordered_sum(w)

    def consider(inv: torch.Tensor, start: torch.Tensor) -> None:
        nonlocal scale, shift, best
        torch.sub(y, start, out=q).mul_(inv).round_().clamp_(0, top)
        wq = torch.mul(q, 1.0 if w is None else w, out=terms[:, 0])
        torch.mul(wq, q, out=terms[:, 1])
        torch.mul(wy, q, out=terms[:, 2])
        swq, swqq, swyq = ordered_sum(terms)
        det = sw * swqq - swq * swq
        a = (sw * swyq - swy * swq) / det
        b = (swy - a * swq) / sw
        if room is not None:
            b = torch.minimum(b, room)
            a = (swyq - b * swq) / swqq
        score = 2.0 * (a * swyq + b * swy) - (a * (a * swqq + 2.0 * (b * swq)) + b * (b * sw))
        better = (det > 0) & (a > 0) & (score > best)
        scale, shift = torch.where(better, a, scale), torch.where(better, b, shift)
        best = torch.where(better, score, best)

    for margin in AFFINE_MARGINS:
        consider((top + margin) * inverse_span, torch.zeros_like(scale))
    for _ in range(AFFINE_ROUNDS):
        consider(inverse(scale), shift)
    return scale, shift
