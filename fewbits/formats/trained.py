"""Weights that lie on the grid of a format already: those of a model that was trained for few bits.

A checkpoint from quantization-aware training holds floats, each a code times the scale of its group, rounded
to the checkpoint's float type. Searching scales anew destroys them; here the scales are found:

    w = round(s * level)      s lies in the interval [(|w| - u/2) / |level|, (|w| + u/2) / |level|] of each
                              weight, u its last place in the float type; a group is on a grid if all
                              intervals of its weights meet, and all groups of a weight must be

The levels follow from a first guess of s: the weight of largest magnitude has one of the levels, the
outermost first, as Q4_0 (its signed extremum / -8), Q8_0 (absmax / 127), NF4 and FP8 (absmax / the largest)
have it, then each other one, since learned scales need not reach the end. Groups with a minimum (Q4_1, MLX)
are lines through their codes, found by least squares.

That a group of 32 random weights is on a 4-bit grid has a probability of 1e-40; on an 8-bit grid, in bf16, of
1e-16. A weight is tried only where equal values are frequent in its groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..lazy import torch
from ..qtensor import QTensor
from .affine import Affine
from .base import FORMATS, Format
from .codebook import NF4
from .levels import LevelGrid
from .lossless import convert_lossless

PRECISIONS = {"bfloat16": 8, "float16": 11, "float32": 24}  # bits of a significand
SAMPLE = 8  # rows that a grid must fit before a whole weight is tried
REPEATS_IN = 256  # groups of 32 weights
DIFFERENT = 30.5  # random weights in bf16: 31.2, an 8-bit grid in bf16: 28.6
ROWS = 2**20  # weights whose intervals are computed at once
GROUPS = (128, 64, 32)
ROUNDS = 5
SLACK = 1 + 2**-20  # of an interval's ends: rounding of the intervals themselves, in f64


@dataclass(frozen=True)
class Candidate:
    """A format to try. levels: of a symmetric grid, rising; none: a zero or a minimum per group. ends: the
    levels that the largest magnitude of a group may have, the likeliest first."""

    format: Format
    rows: int
    columns: int | None
    levels: tuple[float, ...] = ()
    ends: tuple[float, ...] = ()
    top: int = 0
    minimum: bool = False


def trained_grids(w: torch.Tensor) -> Iterator[QTensor]:
    """`(n, k)` float -> the same weight in each format on whose grid it lies, up to the rounding of its float
    type; the smallest first, on the CPU."""
    if w.ndim != 2 or w.numel() == 0 or not repeats(w):
        return
    w = w.cpu()
    bits = precision_of(w)
    for candidate in candidates(*w.shape):
        rows = max(SAMPLE, candidate.rows)
        if _codes_on(candidate, w[:rows], bits) is None:
            continue
        found = _whole(candidate, w, bits)
        if found is not None:
            yield found


def kept_codes(w: torch.Tensor, to: Format) -> tuple[QTensor | None, str | None]:
    """`(n, k)` float -> the codes that it was trained for in format `to`, None where that does not hold them;
    and the format on whose grid it lies, None where it lies on none."""
    name = None
    for found in trained_grids(w):
        name = name or found.format.name
        same = convert_lossless(found, to)
        if same is not None:
            return same.to(w.device), found.format.name
    return None, name


def repeats(w: torch.Tensor) -> bool:
    """Whether groups of 32 weights have fewer different values than random numbers of their float type, yet
    more than two: a constant lies on any grid."""
    if w.shape[1] % 32:
        return False
    groups = w[:SAMPLE].reshape(-1, 32)[:REPEATS_IN].sort(1).values
    if len(groups.unique()) < 3:
        return False
    different = (groups.diff(dim=1) != 0).sum(1) + 1
    return float(different.double().mean()) < DIFFERENT


def precision_of(w: torch.Tensor) -> int:
    """Bits of the significand of the narrowest float type that holds these values."""
    part = w[:SAMPLE]
    for name in ("bfloat16", "float16"):
        if torch.equal(part.to(getattr(torch, name)).to(part.dtype), part):
            return PRECISIONS[name]
    return PRECISIONS["float32"]


def candidates(n: int, k: int) -> Iterator[Candidate]:
    """Formats of a weight's shape, those of fewest bits first."""
    if k % 256 == 0:
        yield Candidate(FORMATS.get("tq2_0"), 1, 256, (-1.0, 0.0, 1.0), (1.0,))
    yield Candidate(FORMATS.get("int2_channel"), 1, None, (-1.0, 0.0, 1.0), (1.0,))
    groups: list[int | None] = [None, *(g for g in GROUPS if k % g == 0)]
    for bits in (2, 3, 4):
        for group in groups:
            yield _integers(bits, group)
        for group in groups:
            yield Candidate(FORMATS.get(_name(bits, group) + "_asym"), 1, group, top=2**bits - 1)
        if bits == 4 and k % 32 == 0:
            elements = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
            yield Candidate(FORMATS.get("mxfp4"), 1, 32, _both(elements), (6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5))
        if bits == 4 and k % 64 == 0:
            yield Candidate(FORMATS.get("nf4"), 1, 64, tuple(NF4.sorted.tolist()), (1.0,))
        for group in groups[1:]:
            name = _name(bits, group) + "_asym_float"
            yield Candidate(FORMATS.get(name), 1, group, top=2**bits - 1, minimum=True)
    for group in groups:
        yield _integers(8, group)
    yield from _fp8(n, k)


def _name(bits: int, group: int | None) -> str:
    return f"int{bits}_" + ("channel" if group is None else f"g{group}")


def _both(magnitudes: Sequence[float]) -> tuple[float, ...]:
    return tuple(sorted({*magnitudes, *(-x for x in magnitudes)}))


def _integers(bits: int, group: int | None) -> Candidate:
    half = 1 << (bits - 1)
    levels = tuple(float(x) for x in range(-half, half))
    # Learned scales: any end, the smallest that fits. With eight bits that would fit anything.
    ends = [half, *range(1, half + 1)] if bits < 8 else [half - 1, half]
    return Candidate(FORMATS.get(_name(bits, group)), 1, group, levels, tuple(map(float, ends)))


def _fp8(n: int, k: int) -> Iterator[Candidate]:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = tuple(sorted({float(x) for x in values[values.isfinite()]}))
    if n % 128 == 0 and k % 128 == 0:
        yield Candidate(FORMATS.get("fp8_e4m3_block128"), 128, 128, levels, (448.0,))
    yield Candidate(FORMATS.get("fp8_e4m3_channel"), 1, None, levels, (448.0,))


def _whole(candidate: Candidate, w: torch.Tensor, bits: int) -> QTensor | None:
    n, k = w.shape
    step = max(1, ROWS // k // candidate.rows) * candidate.rows
    parts = []
    for start in range(0, n, step):
        part = _codes_on(candidate, w[start : start + step], bits)
        if part is None:
            return None
        parts.append(part)
    return QTensor.join_rows(parts) if candidate.rows == 1 else _joined(parts)


def _joined(parts: list[QTensor]) -> QTensor:
    """Whole cells one below another."""
    first = parts[0]
    planes = {name: torch.cat([part.planes[name] for part in parts]) for name in first.planes}
    return QTensor(first.format, (sum(part.shape[0] for part in parts), first.shape[1]), planes)


def _codes_on(candidate: Candidate, w: torch.Tensor, bits: int) -> QTensor | None:
    """These rows on the candidate's grid; None if one group is not on it."""
    n, k = w.shape
    columns, rows = candidate.columns or k, min(candidate.rows, n)
    # (cells, weights of a cell)
    x = w.double().reshape(n // rows, rows, k // columns, columns).transpose(1, 2).reshape(-1, rows * columns)
    half = _half_places(x, bits)
    found = _lines(candidate, x, half) if not candidate.levels else _scales(candidate, x, half)
    if found is None:
        return None
    shape = (n // rows, k // columns)
    q = _packed(candidate, w.double(), *(part.reshape(shape) for part in found))
    return _exact(candidate, q, w, bits) if isinstance(candidate.format, Affine) else q


def _half_places(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Half of each number's last place. Below 2^-14, those of f16 are 2^-24 apart."""
    exponent = torch.frexp(x)[1].double()
    half = torch.exp2(exponent - 1 - bits)
    return half.clamp(min=2.0**-25) if bits == PRECISIONS["float16"] else torch.where(x == 0, 0.0, half)


def _scales(candidate: Candidate, x: torch.Tensor, half: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """-> the scale of each cell of a grid of levels."""
    levels = torch.tensor(candidate.levels, dtype=torch.float64)
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
    scale, open_ = torch.zeros_like(largest), largest != 0
    for tried, end in enumerate(candidate.ends):
        if not bool(open_.any()):
            break
        # A level that only one side has: the scale is negative where the other side's weight is the largest.
        lone = -end in candidate.levels and end not in candidate.levels
        first = largest[open_] / -end if lone else largest[open_].abs() / end
        low, high = _met(levels, x[open_], half[open_], first)
        fits = low <= high * SLACK
        if tried == 0 and len(candidate.ends) > 2:
            fits &= ~_divisible(x[open_] / ((low + high) / 2)[:, None])
        places = open_.nonzero()[:, 0][fits]
        sign = first.sign()[fits]
        scale[places] = sign * (low + high)[fits] / 2
        open_[places] = False
    return None if bool(open_.any()) else (scale,)


def _divisible(levels: torch.Tensor) -> torch.Tensor:
    """Cells `(c, m)` whose levels have a common divisor: multiples of those of a larger scale."""
    whole = levels.round()
    return torch.stack([(whole % divisor == 0).all(1) for divisor in (2, 3, 5, 7)]).any(0)


def _met(
    levels: torch.Tensor, x: torch.Tensor, half: torch.Tensor, first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells `(c, m)` and their scales `(c,)`, if the largest weight is exact -> where the intervals of
    |scale| meet: from, to; empty for a cell that is on no grid of these levels.

    A weight counts when its level is the same for both ends of what is known of the scale, so that no level
    is ever chosen wrongly; each narrows the ends, and more weights count.
    """
    sign, guess = first.sign()[:, None], first.abs()[:, None]
    x = x * sign
    loose = (half / x.abs().clamp(min=1e-300)).gather(1, x.abs().argmax(1, keepdim=True))
    low, high = guess * (1 - loose), guess * (1 + loose)
    middle = (levels[1:] + levels[:-1]) / 2

    whole = bool((levels.diff() == 1).all())

    def at(scale: torch.Tensor) -> torch.Tensor:
        t = x / scale
        if whole:
            return t.round_().clamp_(levels[0], levels[-1])
        return levels[torch.bucketize(t.contiguous(), middle)]

    for _ in range(ROUNDS):
        level = at(low)
        counts = (level == at(high)) & (level != 0)
        low, high = _narrowed(low, high, x, half, torch.where(counts, level, 0.0))
    level = at((low + high) / 2)
    low, high = _narrowed(low, high, x, half, level)
    nothing = ((level == 0) & (x.abs() > half)).any(1)  # a weight that no level but zero is near
    return torch.where(nothing, torch.inf, low[:, 0]), high[:, 0]


def _narrowed(
    low: torch.Tensor, high: torch.Tensor, x: torch.Tensor, half: torch.Tensor, level: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both `(c, 1)`, within the intervals of the weights whose level is not zero."""
    size = torch.where(level == 0, 1.0, level.abs())
    turned = x * level.sign()
    least = torch.where(level == 0, -torch.inf, (turned - half) / size).amax(1, keepdim=True)
    most = torch.where(level == 0, torch.inf, (turned + half) / size).amin(1, keepdim=True)
    return torch.maximum(low, least), torch.minimum(high, most)


def _lines(candidate: Candidate, x: torch.Tensor, half: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """-> scale and integer zero, or scale and minimum, of each cell."""
    low, high = x.amin(1), x.amax(1)
    if not candidate.minimum:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale, other = torch.zeros_like(low), torch.zeros_like(low)
    open_ = (high > low) if candidate.minimum else (x != 0).any(1)
    if candidate.minimum:
        other = torch.where(open_, other, low)
    for tried, steps in enumerate((candidate.top, *range(1, candidate.top + 1))):
        if not bool(open_.any()):
            break
        solve = _with_minimum if candidate.minimum else _with_zero
        guess = (high - low)[open_] / steps
        s, second, fits = solve(x[open_], half[open_], guess, candidate.top)
        if tried == 0 and candidate.top > 1:
            fits &= ~_divisible((x[open_] - second[:, None] * candidate.minimum) / s[:, None])
        places = open_.nonzero()[:, 0][fits]
        scale[places], other[places] = s[fits], second[fits]
        open_[places] = False
    return None if bool(open_.any()) else (scale, other)


def _with_zero(
    x: torch.Tensor, half: torch.Tensor, guess: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    levels = torch.arange(-top, top + 1, dtype=torch.float64)
    low, high = _met(levels, x, half, guess)
    scale = (low + high) / 2
    level = (x / scale[:, None]).round()
    first, last = level.amin(1), level.amax(1)
    fits = (low <= high * SLACK) & (last.clamp(min=0) - first.clamp(max=0) <= top)
    return scale, (-first).clamp(0, top), fits


def _with_minimum(
    x: torch.Tensor, half: torch.Tensor, guess: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A line through the codes, by least squares in units of each weight's rounding; every weight is a place
    of its float type from it at most."""
    least = x.amin(1, keepdim=True)
    code = ((x - least) / guess[:, None]).round().clamp(0, top)
    near = half.clamp(min=half.amax(1, keepdim=True) * 2.0**-10)
    weight = (near.amax(1, keepdim=True) / near).square()
    total = weight.sum(1, keepdim=True)
    mean, mean_x = ((weight * part).sum(1, keepdim=True) / total for part in (code, x))
    spread = (weight * (code - mean).square()).sum(1, keepdim=True)
    slope = (weight * (code - mean) * (x - mean_x)).sum(1, keepdim=True)
    scale = slope / spread.clamp(min=1e-300)
    minimum = mean_x - scale * mean
    off = (scale * code + minimum - x).abs()
    return scale[:, 0], minimum[:, 0], (off <= 2 * near).all(1) & (off <= scale / 4).all(1)


def _exact(candidate: Candidate, q: QTensor, w: torch.Tensor, bits: int) -> QTensor:
    """The same with other scales in f16, where those lead to the very weights and the nearest ones do not."""
    format, k = candidate.format, w.shape[1]
    assert isinstance(format, Affine)
    wrong = _wrong_groups(q, w, candidate, bits)
    if format.scale_type != "f16" or not bool(wrong.any()):
        return q
    grid, codes = format.unpack(q)
    others = tuple(part for part in (grid.zero, grid.offset) if isinstance(part, torch.Tensor))
    nearest = scale = q.planes["scale"]
    for move in (1, -1, 2, -2, 3, -3):
        tried = (nearest.view(torch.int16) + move).view(torch.float16)
        other = format.grid((tried.float(), *others), k)
        again = _wrong_groups(format.pack(other, other.round(w.float())), w, candidate, bits)
        scale = torch.where(wrong & ~again, tried, scale)
        wrong &= again
    best = format.grid((scale.float(), *others), k)
    moved = best.spread((scale != nearest).float(), k) > 0
    return format.pack(best, torch.where(moved, best.round(w.float()), codes))


def _wrong_groups(q: QTensor, w: torch.Tensor, candidate: Candidate, bits: int) -> torch.Tensor:
    """`(n, groups)`: where a value is not the weight, in the checkpoint's float type."""
    kind = next(getattr(torch, name) for name, known in PRECISIONS.items() if known == bits)
    differs = q.decode().to(kind).float() != w.float()
    return differs.view(len(w), -1, candidate.columns or w.shape[1]).any(2)


def _packed(candidate: Candidate, w: torch.Tensor, scale: torch.Tensor, *other: torch.Tensor) -> QTensor:
    """Codes for the scales as found, in f64; these as the format stores them."""
    format, k = candidate.format, w.shape[1]
    if isinstance(format, Affine):
        second = tuple(format.stored(part.float()) if candidate.minimum else part.float() for part in other)
        grid = format.grid((format.stored(scale.float()), *second), k)
        columns = candidate.columns or k
        wide = [part.repeat_interleave(columns, 1) for part in (scale, *other)]
        zero = wide[1] if other and not candidate.minimum else 0 if other else 1 << (format.bits - 1)
        level = (w - wide[1] if candidate.minimum else w) / torch.where(wide[0] == 0, 1.0, wide[0])
        return format.pack(grid, (level.round() + zero).clamp(0, format.top).to(torch.uint8))
    fitted = format.fit(w.float(), search=False)
    found = scale.abs().float()
    fitted = (
        fitted.replaced({"scale": found}) if isinstance(fitted, LevelGrid) else fitted.refitted(found, None)
    )
    return format.pack(fitted, fitted.round(w.float()))
