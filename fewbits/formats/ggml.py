"""The GGML block types: what llama.cpp reads, as table rows.

A block is 32 or 256 weights of one row with their parameters, a few dozen bytes side by side. A
type is one row of TYPES: which kind of grid its groups use, how their scales are coded, and the
fields of its struct (`ggml_layout.py`). Three kinds of scale:

    one level     Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL TQ1_0 TQ2_0    d (and m) in f16 for each block
    two levels    Q2_K .. Q6_K IQ4_XS     group step = d * scale, group minimum = -(dmin * minimum),
                                          d and dmin f16 a block, scale and minimum small integers
    power of two  MXFP4                   2^(e - 128), e one byte

Two-level types are fitted group by group (`search.py`), then the group parameters are coded, then
d (and dmin) are refitted by least squares against the codes they led to.

The only plane is `blocks`, the struct's bytes: what a GGUF file stores is what the format is.
The remaining IQ types of llama.cpp (IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S) choose their codes
from lattice points, eight or four weights at a time: they need a Grid of vectors and belong in a
module of their own, `ggml_iq.py`, with rows like these.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import gguf
import torch

from .. import core
from ..qtensor import Plane, QTensor
from .base import FORMATS, Distortion, Format, Grid, checked_importance
from .ggml_layout import Field, Half, Runs, ScaleMin4, ScaleMin6, Ternary, Values
from .grids import AffineGrid, TableGrid
from .search import extreme, fit_affine, fit_symmetric, fit_table, inverse, lanes, nearest, ordered_sum

HALF_MAX = 65504.0
# Rounds of recoding the integers of a two-level block; a third changes the error by less than 0.1 %.
RECODE_ROUNDS = 2
Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
# The non-linear levels of IQ4_NL and IQ4_XS, and the doubled e2m1 values of MXFP4.
IQ4_LEVELS = torch.tensor(gguf.quants.IQ4_NL.kvalues, dtype=torch.float32)
MXFP4_LEVELS = torch.tensor([-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12], dtype=torch.float32)
MXFP4_CODES = torch.tensor([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)


@dataclass(frozen=True)
class GgmlGrid(Grid):
    """A grid of blocks: the coded parameters (`values`), and the grid of values that they mean."""

    values: Values = field(repr=False)
    meaning: AffineGrid | TableGrid

    def round(self, w: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return self.meaning.round(w, columns)

    def value(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return self.meaning.value(codes, columns)


@dataclass(frozen=True)
class Ggml(Format):
    """One GGML type. kind: symmetric | affine | table; `top` is the largest code, `zero` the code of 0.

    scale_range: the integers that a group's scale may take, None for a one-level type.
    """

    kind: str = "symmetric"
    group: int = 32
    top: int = 15
    zero: int = 0
    scale_range: tuple[int, int] | None = None
    fields: tuple[Field, ...] = ()
    levels: torch.Tensor | None = None
    codes: torch.Tensor | None = None

    @property
    def type_id(self) -> int:
        """The number of this type in GGUF files."""
        return int(gguf.GGMLQuantizationType[self.name.removesuffix("_ggml").upper()])

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> GgmlGrid:
        self.check(w)
        n, k = w.shape
        x = w.float().reshape(-1, self.block // self.group, self.group)
        weight = checked_importance(importance, n, k)
        if weight is not None:
            weight = weight.expand(n, k).reshape(x.shape)
        return self._grid(fit_values(self, x, weight, search), n, k)

    def pack(self, grid: GgmlGrid, codes: torch.Tensor) -> QTensor:
        n, k = codes.shape
        values = {**grid.values, "code": codes.reshape(-1, self.block).to(torch.int32)}
        blocks = torch.cat([part.pack(values) for part in self.fields], 1)
        return QTensor(self, (n, k), {"blocks": blocks.reshape(n, -1)})

    def decode(self, q: QTensor) -> torch.Tensor:
        if core.available():
            return core.decode(self.name, q.planes["blocks"], q.shape)
        return self.decode_twin(q)

    def encode(
        self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True
    ) -> QTensor:
        if not core.available():
            return super().encode(w, importance, search)
        self.check_matrix(w)
        w = w.contiguous() if w.dtype in core.DTYPES else w.float().contiguous()
        blocks = self.planes[0].empty(*w.shape)
        if core.encode(self.name, w, checked_importance(importance, *w.shape), search, blocks):
            self.check_values(w)
        return QTensor(self, (w.shape[0], w.shape[1]), {"blocks": blocks})

    def distortion(self, w: torch.Tensor, q: QTensor) -> Distortion:
        if not core.available() or w.dtype not in core.DTYPES:
            return super().distortion(w, q)
        return Distortion(*core.measure(self.name, w.contiguous(), q.planes["blocks"].contiguous()))

    def encode_twin(
        self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True
    ) -> QTensor:
        """`encode` in plain torch, whether or not the C++ core is there."""
        return super().encode(w, importance, search)

    def decode_twin(self, q: QTensor) -> torch.Tensor:
        """`decode` in plain torch, whether or not the C++ core is there."""
        n, k = q.shape
        values = self.unpack(q)
        codes = values.pop("code").reshape(n, k).to(torch.uint8)
        return self._grid(values, n, k).value(codes)

    def unpack(self, q: QTensor) -> Values:
        """-> `code` (blocks, block) int32 and the block parameters."""
        counts = {"code": self.block, "scale": self.block // self.group, "exponent": 1}
        data = q.planes["blocks"].reshape(-1, self.planes[0].entries)
        sizes = [part.nbytes(counts) for part in self.fields]
        values: Values = {}
        for part, piece in zip(self.fields, data.split(sizes, 1), strict=True):
            part.unpack(piece, values)
        return values

    def _grid(self, values: Values, n: int, k: int) -> GgmlGrid:
        step, base = group_parameters(self, values)
        rows = n, k // self.group
        meaning: AffineGrid | TableGrid
        if self.levels is not None and self.codes is not None:
            meaning = TableGrid(step.reshape(rows), self.levels, self.codes, self.group, k)
        else:
            shift = None if base is None else base.reshape(rows)
            meaning = AffineGrid(step.reshape(rows), shift, self.zero, self.top, self.group, k)
        return GgmlGrid(values, meaning)


def group_parameters(fmt: Ggml, values: Values) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Coded parameters -> step and base of each group, `(blocks, groups)` f32, as decoding has them."""
    if "exponent" in values:
        return exponent_step(values["exponent"]), None
    if fmt.scale_range is None:
        return values["d"], values.get("m")
    offset = -fmt.scale_range[0]
    step = values["d"] * (values["scale"] - offset).float()
    if fmt.kind != "affine":
        return step, None
    return step, -(values["dmin"] * values["minimum"].float())


def exponent_step(exponent: torch.Tensor) -> torch.Tensor:
    """The E8M0 byte e -> 2^(e - 128): half the scale, since the level table is doubled."""
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return bits.to(torch.int32).view(torch.float32)


def to_half(x: torch.Tensor) -> torch.Tensor:
    """f32 rounded to float16, the largest finite one where it would overflow; minus zero becomes zero."""
    return (x.clamp(-HALF_MAX, HALF_MAX) + 0.0).to(torch.float16).float()


def fit_values(fmt: Ggml, x: torch.Tensor, weight: torch.Tensor | None, search: bool) -> Values:
    """`(blocks, groups, group)` f32 -> the coded block parameters."""
    if fmt.name == "mxfp4_ggml":
        return fit_exponent(fmt, x, weight, search)
    if fmt.kind == "affine":
        base_max = None if fmt.scale_range is None else 0.0
        step, base = fit_affine(x, weight, fmt.top, search, base_max)
        if fmt.scale_range is None:
            return {"d": to_half(step), "m": to_half(base)}
        return code_scales_affine(fmt, x, weight, search, step, base)
    if fmt.levels is not None:
        step = fit_table(x, weight, fmt.levels, search)
    else:
        step = fit_symmetric(x, weight, -fmt.zero, fmt.top - fmt.zero, search)
    if fmt.scale_range is None:
        return {"d": to_half(step)}
    return code_scales_symmetric(fmt, x, weight, search, step)


def code_scales_symmetric(
    fmt: Ggml, x: torch.Tensor, weight: torch.Tensor | None, search: bool, step: torch.Tensor
) -> Values:
    """Group steps `(blocks, groups)` -> f16 d and integer scales, both refitted to the codes."""
    assert fmt.scale_range is not None
    lo, hi = fmt.scale_range
    d = to_half(extreme(step.T) / float(lo))
    scale = torch.clamp(torch.round(step * inverse(d)[:, None]), lo, hi)
    for _ in range(RECODE_ROUNDS if search else 0):
        cross, square = group_moments(fmt, x, weight, d[:, None] * scale)
        wanted = torch.clamp(torch.round(cross / square * inverse(d)[:, None]), lo, hi)
        scale = torch.where(square > 0, wanted, scale)
        up, down = ordered_sum((scale * cross).T), ordered_sum((scale * scale * square).T)
        d = torch.where(down > 0, to_half(up / down), d)
    return {"d": d[:, None], "scale": scale.to(torch.int32) - lo}


def group_moments(
    fmt: Ggml, x: torch.Tensor, weight: torch.Tensor | None, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum(w x v) and sum(w v^2) of each group, v the unscaled levels that `step` leads to."""
    rows = lanes(x)
    w = torch.ones_like(rows) if weight is None else lanes(weight)
    inv = inverse(step.reshape(-1))
    if fmt.levels is not None:
        v = fmt.levels[nearest(fmt.levels, rows * inv)]
    else:
        v = torch.clamp(torch.round(rows * inv), -fmt.zero, fmt.top - fmt.zero)
    wv = w * v
    return ordered_sum(wv * rows).reshape(step.shape), ordered_sum(wv * v).reshape(step.shape)


def code_scales_affine(
    fmt: Ggml,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    search: bool,
    step: torch.Tensor,
    base: torch.Tensor,
) -> Values:
    """Group steps and bases -> f16 d and dmin, integer scales and minimums; all refitted to the codes."""
    assert fmt.scale_range is not None
    hi = fmt.scale_range[1]
    d, dmin = to_half(step.amax(1) / float(hi)), to_half((-base).amax(1) / float(hi))
    scale = torch.clamp(torch.round(step * inverse(d)[:, None]), 0, hi)
    minimum = torch.clamp(torch.round(-base * inverse(dmin)[:, None]), 0, hi)
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
    fmt: Ggml, x: torch.Tensor, weight: torch.Tensor | None, step: torch.Tensor, drop: torch.Tensor
) -> Moments:
    """Sums w q^2, w q, w, w x q and w x of each group, q the codes of value = step * q - drop."""
    rows = lanes(x)
    w = torch.ones_like(rows) if weight is None else lanes(weight)
    q = torch.clamp(torch.round((rows + drop.reshape(-1)) * inverse(step.reshape(-1))), 0, fmt.top)
    wq, wx = w * q, w * rows
    sqq, sq, sw, sxq, sx = (ordered_sum(p).reshape(step.shape) for p in (wq * q, wq, w, wx * q, wx))
    return sqq, sq, sw, sxq, sx


def recode_affine(moments: Moments, halves: Pair, integers: Pair, hi: int) -> Pair:
    """Better integers for the same codes: the scale of the least-squares line, then the minimum that
    suits the coded scale; kept for each group where the (quadratic) error falls."""
    sqq, sq, sw, sxq, sx = moments
    d, dmin = halves[0][:, None], halves[1][:, None]
    scale, minimum = integers
    a = (sw * sxq - sx * sq) / (sw * sqq - sq * sq)
    new_scale = torch.clamp(torch.round(a * inverse(d)), 0, hi)
    new_step = d * new_scale
    new_minimum = torch.clamp(torch.round((new_step * sq - sx) / sw * inverse(dmin)), 0, hi)

    def error(step: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
        return step * (step * sqq - 2.0 * (drop * sq + sxq)) + drop * (drop * sw + 2.0 * sx)

    better = error(new_step, dmin * new_minimum) < error(d * scale, dmin * minimum)
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
    """MXFP4: floor(log2(amax)) - 2 as the OCP MX specification has it, and its neighbours if searching."""
    assert fmt.levels is not None
    rows = lanes(x)
    w = torch.ones_like(rows) if weight is None else lanes(weight)
    amax = rows.abs().amax(0)
    exponent = (torch.frexp(amax).exponent - 1 - 2 + 127).clamp(0, 254).to(torch.int32)
    exponent = torch.where(amax > 0, exponent, torch.zeros_like(exponent))
    best, chosen = torch.full_like(amax, -torch.inf), exponent
    for change in (0, 1, -1) if search else (0,):
        candidate = (exponent + change).clamp(0, 254)
        step = exponent_step(candidate)
        v = fmt.levels[nearest(fmt.levels, rows * inverse(step))]
        wv = w * v
        cross, square = ordered_sum(wv * rows), ordered_sum(wv * v)
        score = step * (2.0 * cross - step * square)
        better = score > best
        best, chosen = torch.where(better, score, best), torch.where(better, candidate, chosen)
    return {"exponent": chosen[:, None]}


def one_level(name: str, nbytes: int, **row: object) -> Ggml:
    return Ggml(name, 32, (Plane("blocks", torch.uint8, columns=32, entries=nbytes),), **row)  # type: ignore[arg-type]


def two_level(name: str, nbytes: int, **row: object) -> Ggml:
    return Ggml(name, 256, (Plane("blocks", torch.uint8, columns=256, entries=nbytes),), **row)  # type: ignore[arg-type]


NIBBLES, FIFTH = Runs("code", 4, 16), Runs("code", 1, 1, shift=4)
D, M, DMIN = Half("d"), Half("m"), Half("dmin")
Q3_SCALES = (Runs("scale", 4, 8), Runs("scale", 2, 4, shift=4))
IQ4_SCALES = (Runs("scale", 2, 1, shift=4), Runs("scale", 4, 1))
IQ4 = {"kind": "table", "levels": IQ4_LEVELS, "codes": torch.arange(16, dtype=torch.uint8), "group": 32}

TYPES = (
    one_level("q4_0", 18, zero=8, fields=(D, NIBBLES)),
    one_level("q4_1", 20, kind="affine", fields=(D, M, NIBBLES)),
    one_level("q5_0", 22, zero=16, top=31, fields=(D, FIFTH, NIBBLES)),
    one_level("q5_1", 24, kind="affine", top=31, fields=(D, M, FIFTH, NIBBLES)),
    one_level("q8_0", 34, zero=128, top=255, fields=(D, Runs("code", 8, 1, flip=128))),
    two_level("q2_k", 84, kind="affine", group=16, top=3, scale_range=(0, 15),
              fields=(ScaleMin4(), Runs("code", 2, 32), D, DMIN)),
    two_level("q3_k", 110, group=16, top=7, zero=4, scale_range=(-32, 31),
              fields=(Runs("code", 1, 32, shift=2), Runs("code", 2, 32), *Q3_SCALES, D)),
    two_level("q4_k", 144, kind="affine", scale_range=(0, 63),
              fields=(D, DMIN, ScaleMin6(), Runs("code", 4, 32))),
    two_level("q5_k", 176, kind="affine", top=31, scale_range=(0, 63),
              fields=(D, DMIN, ScaleMin6(), Runs("code", 1, 32, shift=4), Runs("code", 4, 32))),
    two_level("q6_k", 210, group=16, top=63, zero=32, scale_range=(-128, 127),
              fields=(Runs("code", 4, 64), Runs("code", 2, 32, shift=4), Runs("scale", 8, 1, flip=128), D)),
    one_level("iq4_nl", 18, fields=(D, NIBBLES), **IQ4),
    two_level("iq4_xs", 136, scale_range=(-32, 31), fields=(D, *IQ4_SCALES, NIBBLES), **IQ4),
    two_level("tq1_0", 54, group=256, top=2, zero=1, fields=(Ternary(), D)),
    two_level("tq2_0", 66, group=256, top=2, zero=1, fields=(Runs("code", 2, 32), D)),
    one_level("mxfp4_ggml", 17, kind="table", levels=MXFP4_LEVELS, codes=MXFP4_CODES,
              fields=(Runs("exponent", 8, 1), NIBBLES)),
)  # fmt: skip

for row in TYPES:
    FORMATS.add(row.name, row)
