"""The GGML block types of llama.cpp, as table rows.

A block is 32 or 256 weights of one row with their parameters, a few dozen bytes side by side. A
type is one row of TYPES: the kind of grid, the coding of scales, and the fields of its struct
(`ggml_layout.py`). Three kinds of scale:

    one level     Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL TQ1_0 TQ2_0    d (and m) in f16 for each block
    two levels    Q2_K .. Q6_K IQ4_XS     group scale = d * scale, group offset = -(dmin * minimum),
                                          d and dmin f16 per block, scale and minimum small integers
    power of two  MXFP4                   2^(e - 128), e one byte

Two-level types are fitted group by group (`search.py`), then the group parameters are coded, then
d (and dmin) are refitted by least squares to the resulting codes (`ggml_fit.py`).

The only plane is `blocks`, the struct's bytes as in a GGUF file. The other IQ types use lattice points for
eight or four weights at a time; `iq.py` has their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .. import core
from ..errors import FormatError
from ..lazy import gguf, torch
from ..qtensor import Plane, QTensor
from .base import FORMATS, Distortion, Format, Grid, checked_importance
from .ggml_fit import centred_values, exponent_scale, fit_values, refit_values
from .ggml_layout import Field, Half, Runs, ScaleMin4, ScaleMin6, Ternary, Values
from .ggml_types import GGML_TYPES
from .grids import AffineGrid, TableGrid

_SUFFIX = "_ggml"


@dataclass(frozen=True)
class GgmlGrid(Grid):
    """The grid of GGML blocks: their coded parameters (`values`) and the grid with these decoded."""

    format: Ggml
    values: Values = field(repr=False)
    meaning: AffineGrid | TableGrid
    group: int

    @property
    def dtype(self) -> torch.dtype:
        """Of `d` and its like in files."""
        return torch.float16

    @property
    def _rows(self) -> int:
        return self.meaning.scale.shape[0]

    def round(self, w: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return self.meaning.round(w, columns)

    def value(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return self.meaning.value(codes, columns)

    def level(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return self.meaning.level(codes, columns)

    def groups(self, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.meaning.groups(n)

    def refitted(
        self, scale: torch.Tensor, offset: torch.Tensor | None, weight: torch.Tensor | None = None
    ) -> GgmlGrid:
        """Two-level types: `refit_values`."""
        shape = -1, self.format.block // self.group
        parts = [None if part is None else part.reshape(shape) for part in (scale, offset, weight)]
        assert parts[0] is not None
        values = refit_values(self.format, self.values, parts[0], parts[1], parts[2])
        return self.format.grid(values, scale.shape[0], self.meaning.k)

    @property
    def half(self) -> int:  # type: ignore[override]
        return (self.format.top + 1) // 2

    def with_zero(self, scale: torch.Tensor | None = None) -> GgmlGrid:
        """Affine types: minima of `half` steps, so that both integers of a group are the same."""
        own, offset = self.groups(self._rows)
        if offset is None:
            return self
        wanted = (own if scale is None else scale).reshape(-1, self.format.block // self.group)
        return self.format.grid(centred_values(self.format, wanted, self.half), self._rows, self.meaning.k)

    def parameters(self) -> dict[str, torch.Tensor]:
        n = self._rows
        return {name: self.values[name].reshape(n, -1) for name in ("d", "m", "dmin") if name in self.values}

    def replaced(self, parameters: dict[str, torch.Tensor]) -> GgmlGrid:
        values = {**self.values, **{name: part.reshape(-1, 1) for name, part in parameters.items()}}
        return self.format.grid(values, self._rows, self.meaning.k)


@dataclass(frozen=True)
class Ggml(Format):
    """One GGML type. kind: symmetric | affine | table; `top` is the largest code, `zero` the code of 0.

    scale_range: the integers that a group's scale may take, None for a one-level type.
    table: the sorted levels, in whole numbers. codes: the code of each level.
    """

    kind: str = "symmetric"
    group: int = 32
    top: int = 15
    zero: int = 0
    scale_range: tuple[int, int] | None = None
    fields: tuple[Field, ...] = ()
    table: Callable[[], Sequence[int]] | None = None
    codes: tuple[int, ...] = ()

    @cached_property
    def levels(self) -> torch.Tensor | None:
        """`(L,)` f32: the sorted values of `codes`; None unless the kind is table."""
        return None if self.table is None else torch.tensor(self.table(), dtype=torch.float32)

    @property
    def type_id(self) -> int:
        """The number of this type in GGUF files."""
        return GGML_TYPES[self.type_name].number

    @property
    def type_name(self) -> str:
        """The name of this type in GGML. It differs for MXFP4, because OCP orders the nibbles differently."""
        return self.name.removesuffix(_SUFFIX)

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> GgmlGrid:
        n, k = w.shape
        if core.takes(w, importance):
            return self.grid(self.values(self.encode(w, importance, search)), n, k)
        return self.fit_reference(w, importance, search)

    def fit_reference(
        self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True
    ) -> GgmlGrid:
        """`fit` in plain torch, with or without the C++ core."""
        self.check(w)
        n, k = w.shape
        x = w.float().reshape(-1, self.block // self.group, self.group)
        weight = checked_importance(importance, n, k)
        if weight is not None:
            weight = weight.expand(n, k).reshape(x.shape)
        return self.grid(fit_values(self, x, weight, search), n, k)

    def pack(self, grid: GgmlGrid, codes: torch.Tensor) -> QTensor:
        n, k = codes.shape
        values = {**grid.values, "code": codes.reshape(-1, self.block).to(torch.int32)}
        blocks = torch.cat([part.pack(values) for part in self.fields], 1)
        return QTensor(self, (n, k), {"blocks": blocks.reshape(n, -1)})

    def decode(self, q: QTensor) -> torch.Tensor:
        blocks = q.planes["blocks"]
        if core.takes(blocks):
            return core.decode(self.name, blocks.contiguous(), q.shape)
        return self.decode_reference(q)

    def encode(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> QTensor:
        if not core.takes(w, importance):
            return super().encode(w, importance, search)
        self.check_matrix(w)
        w = w.contiguous() if w.dtype in core.dtypes() else w.float().contiguous()
        weight = checked_importance(importance, *w.shape)
        blocks = self.planes[0].empty(*w.shape)
        if core.encode(self.name, w, None if weight is None else weight.contiguous(), search, blocks):
            self.check_values(w)
        return QTensor(self, (w.shape[0], w.shape[1]), {"blocks": blocks})

    def distortion(self, w: torch.Tensor, q: QTensor) -> Distortion:
        blocks = q.planes["blocks"]
        if w.is_meta or blocks.is_meta:
            raise FormatError(f"{self.name}: a tensor on the meta device has no values to compare")
        if w.dtype not in core.dtypes() or not core.takes(w, blocks):
            return super().distortion(w, q)
        return Distortion(*core.measure(self.name, w.contiguous(), blocks.contiguous()))

    def encode_reference(
        self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True
    ) -> QTensor:
        """`encode` in plain torch, with or without the C++ core."""
        grid = self.fit_reference(w, importance, search)
        return self.pack(grid, grid.round(w.float()))

    def decode_reference(self, q: QTensor) -> torch.Tensor:
        """`decode` in plain torch, with or without the C++ core."""
        return super().decode(q)

    def unpack(self, q: QTensor) -> tuple[GgmlGrid, torch.Tensor]:
        n, k = q.shape
        values = self.values(q, codes=True)
        codes = values.pop("code").reshape(n, k).to(torch.uint8)
        return self.grid(values, n, k), codes

    def values(self, q: QTensor, codes: bool = False) -> Values:
        """-> the block parameters, `(blocks, entries)`; if `codes`, also `code` `(blocks, block)` int32."""
        counts = {"code": self.block, "scale": self.block // self.group, "exponent": 1}
        data = q.planes["blocks"].reshape(-1, self.planes[0].entries)
        sizes = [part.nbytes(counts) for part in self.fields]
        values: Values = {}
        for part, piece in zip(self.fields, data.split(sizes, 1), strict=True):
            if codes or part.name != "code":
                part.unpack(piece, values)
        return values

    def grid(self, values: Values, n: int, k: int) -> GgmlGrid:
        scale, offset = group_parameters(self, values)
        rows = n, k // self.group
        meaning: AffineGrid | TableGrid
        if self.levels is not None:
            codes = torch.tensor(self.codes, dtype=torch.uint8).to(scale.device)
            meaning = TableGrid(scale.reshape(rows), self.levels.to(scale.device), codes, self.group, k)
        else:
            offset = None if offset is None else offset.reshape(rows)
            meaning = AffineGrid(
                scale.reshape(rows), offset, self.zero, self.top, self.group, k, torch.float16
            )
        return GgmlGrid(self, values, meaning, self.group)


def group_parameters(fmt: Ggml, values: Values) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Coded parameters -> scale and offset of each group, `(blocks, groups)` f32, as in decoding."""
    if "exponent" in values:
        return exponent_scale(values["exponent"]), None
    if fmt.scale_range is None:
        return values["d"], values.get("m")
    scale = values["d"] * (values["scale"] + fmt.scale_range[0]).float()
    if fmt.kind != "affine":
        return scale, None
    return scale, -(values["dmin"] * values["minimum"].float())


def one_level(name: str, nbytes: int, **row: object) -> Ggml:
    return Ggml(name, 32, (Plane("blocks", "u8", columns=32, entries=nbytes),), **row)  # type: ignore[arg-type]


def two_level(name: str, nbytes: int, **row: object) -> Ggml:
    return Ggml(name, 256, (Plane("blocks", "u8", columns=256, entries=nbytes),), **row)  # type: ignore[arg-type]


def iq4_levels() -> Sequence[int]:
    """The non-linear levels of IQ4_NL and IQ4_XS, from the `gguf` package."""
    levels: Sequence[int] = gguf.quants.IQ4_NL.kvalues
    return levels


def mxfp4_levels() -> Sequence[int]:
    """The values of e2m1, doubled."""
    return -12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12


NIBBLES, FIFTH = Runs("code", 4, 16), Runs("code", 1, 1, shift=4)
D, M, DMIN = Half("d"), Half("m"), Half("dmin")
Q3_SCALES = (Runs("scale", 4, 8), Runs("scale", 2, 4, shift=4))
IQ4_SCALES = (Runs("scale", 2, 1, shift=4), Runs("scale", 4, 1))
IQ4 = {"kind": "table", "table": iq4_levels, "codes": tuple(range(16)), "group": 32}

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
    one_level("mxfp4_ggml", 17, kind="table", table=mxfp4_levels, codes=(*range(15, 8, -1), *range(8)),
              fields=(Runs("exponent", 8, 1), NIBBLES)),
)  # fmt: skip

for row in TYPES:
    FORMATS.add(row.name, row)

_OTHER_NAMES = {row.type_name: row.name for row in TYPES if row.type_name != row.name}


def format_of(type_name: str) -> str:
    """The name of a GGML type (`q4_k`, `mxfp4`, `f16`) -> the name of its format."""
    return _OTHER_NAMES.get(type_name, type_name)
