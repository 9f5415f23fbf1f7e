"""Codebooks: a table of levels, either fixed and multiplied by a scale, or learned.

    nf4 fp4        16 levels in [-1, 1] times the largest magnitude of 64 weights, as bitsandbytes
                   codes    u8    2 codes in a byte, the first in the HIGH nibble
                   absmax   f32   one per 64 weights
                   (nf4_g{32 ... 4096}: other group sizes)
    nf4_dq fp4_dq  the same with absmax itself in 8 bits (double quantization):
                   absmax   u8    code of a dynamic map; absmax = map[code] * nested_absmax + offset
                   nested_absmax f32 per 256 absmax, running on over rows; offset f32, their mean
    int8_absmax    LLM.int8: the integers -127 ... 127 over 127 times the largest magnitude of the row
                   codes    u8    two's complement; -128 is unused
                   absmax   f32   one per row
    pow2_{bits}    0 and +-2^-i, i = 0 ... 2^(bits-1) - 2, times a scale; a multiplication is a shift
    kmeans{bits}   2^bits levels in f16, learned for each row (`_channel`) or for all (`_tensor`)

Grammar: `{nf4|fp4}[_g{columns}][_dq]` (g64 by default), `kmeans{1..8}_{channel|tensor}` and
`pow2_{2..5}[_g{columns}|_channel|_tensor][_f16|_bf16|_f32]` (g128 and f16 by default).

Sources: QLoRA (arXiv 2305.14314), sections 3 and appendix E; bitsandbytes 0.50 for the values of the
tables, its order of operations and the unused eighth level of fp4; 8-bit Optimizers via Block-wise
Quantization (arXiv 2110.02861), section 2.1, for the dynamic map; LLM.int8() (arXiv 2208.07339),
section 3, for int8_absmax; Lloyd (1982) for k-means.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, cached_property

from ..core.pack import pack, unpack
from ..lazy import torch
from ..qtensor import Plane, QTensor
from .base import FORMATS, Format, Grid
from .cells import Cells, choose
from .floats import Element
from .grids import mean_over_rows, saturate
from .levels import LevelGrid, Levels, ScaledLevels, code_plane
from .lloyd import fit_levels
from .search import inverse


def nf4_values() -> torch.Tensor:
    """`(16,)`: quantiles of the normal distribution, eight below zero and seven above, scaled to +-1."""
    return torch.tensor(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ],
        dtype=torch.float32,
    )


def fp4_values() -> torch.Tensor:
    """`(16,)` by code: sign, then three bits with values of their own; in units of the largest, 12."""
    magnitudes = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12
    return torch.cat([magnitudes, -magnitudes])


def int8_values() -> torch.Tensor:
    """`(256,)` by byte: a signed integer over 127. bitsandbytes never makes -128."""
    return torch.cat([torch.arange(128.0), torch.tensor([torch.nan]), torch.arange(-127.0, 0.0)]) / 127


NORMAL_BLOCK = 64  # weights per absmax by default
NESTED_BLOCK = 256  # absmax per nested absmax


def dynamic_map() -> torch.Tensor:
    """`(256,)` f32: signed 8-bit dynamic quantization, sorted.

    After the sign come i zeros and a one; the remaining 6 - i bits are a linear fraction: the middles
    of 2^(6 - i) equal parts of [0.1, 1], times 10^-i. With 0 and 1 that makes 2 * 127 + 2 values.
    """
    positive = []
    for zeros in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (6 - zeros) + 1, dtype=torch.float32)
        positive.append(10**-zeros * ((edges[1:] + edges[:-1]) / 2.0))
    values = torch.cat(positive)
    return torch.cat([values, -values, torch.tensor([0.0, 1.0])]).sort().values


NF4, FP4, DYNAMIC = (Levels(table, ties="below") for table in (nf4_values, fp4_values, dynamic_map))
INT8 = Levels(int8_values)


@dataclass(frozen=True)
class NestedGrid(LevelGrid):
    """A LevelGrid whose scale is itself stored in 8 bits."""

    absmax_codes: torch.Tensor
    nested_absmax: torch.Tensor
    offset: torch.Tensor

    def coded(self, codes: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor) -> NestedGrid:
        scale = nested_scale(codes, nested, offset)
        return replace(self, scale=scale, absmax_codes=codes, nested_absmax=nested, offset=offset)

    def refitted(
        self, scale: torch.Tensor, offset: torch.Tensor | None, weight: torch.Tensor | None = None
    ) -> NestedGrid:
        """The better of two: new codes with the old nested absmax and offset, or all three new."""
        weight = torch.ones_like(scale) if weight is None else weight

        def error(grid: NestedGrid) -> torch.Tensor:
            return (grid.scale - scale).square() * weight

        fresh = self.coded(*nest(scale))
        codes = nested_codes(scale, self.nested_absmax, self.offset)
        moved = self.coded(codes, self.nested_absmax, self.offset)
        codes = torch.where(error(moved) < error(self), codes, self.absmax_codes)
        moved = self.coded(codes, self.nested_absmax, self.offset)
        return min(moved, fresh, key=lambda grid: float(error(grid).sum(dtype=torch.float64)))

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"nested_absmax": self.nested_absmax[None], "offset": self.offset}

    def replaced(self, parameters: dict[str, torch.Tensor]) -> NestedGrid:
        return self.coded(self.absmax_codes, parameters["nested_absmax"][0], parameters["offset"])


@dataclass(frozen=True)
class DoubleQuantized(ScaledLevels):
    """ScaledLevels whose scales, minus their mean, are stored as dynamic 8-bit codes in blocks of 256."""

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> NestedGrid:
        """The rule of bitsandbytes; the search also tries both neighbours of each scale's code."""
        codes, nested, offset = nest(super().fit(w, importance, search).scale)
        if search:
            x, weight = self.cells.gather(w), self.cells.importance(importance, w)
            options = [((codes.int() + move).clamp(0, 255),) for move in (0, 1, -1)]
            scaled = per_scale(nested, codes.numel())

            def nearest(x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
                return self.nearest(x, DYNAMIC.of(code) * scaled + offset[0])

            codes = choose(x, weight, options, nearest)[0].to(torch.uint8)
        return self.nested_grid(codes, nested, offset, w.shape[1])

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        return scale  # f32 until it is quantized, too

    def nested_grid(
        self, codes: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor, k: int
    ) -> NestedGrid:
        assert self.cells.columns is not None
        shared = (self.levels, self.cells.columns, k, 1, torch.float32)
        return NestedGrid(nested_scale(codes, nested, offset), *shared, codes, nested, offset)

    def pack(self, grid: LevelGrid, codes: torch.Tensor) -> QTensor:
        assert isinstance(grid, NestedGrid)
        planes = {
            "codes": pack(codes, self.bits, order=self.order),
            "absmax": grid.absmax_codes,
            "nested_absmax": grid.nested_absmax,
            "offset": grid.offset,
        }
        return QTensor(self, (codes.shape[0], codes.shape[1]), planes)

    def unpack(self, q: QTensor) -> tuple[NestedGrid, torch.Tensor]:
        codes, absmax, nested, offset = (q.planes[plane.name] for plane in self.planes)
        grid = self.nested_grid(absmax, nested, offset, q.shape[1])
        return grid, unpack(codes, self.bits, q.shape[1], self.order)


def nest(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(n, g)` absmax -> their codes `(n, g)` u8, the nested absmax `(blocks,)` and the offset `(1, 1)`."""
    offset = absmax.double().mean().float().reshape(1, 1)
    blocks = Cells(1, NESTED_BLOCK).gather((absmax - offset).reshape(1, -1))[0]
    nested = blocks.abs().amax(-1)
    return nested_codes(absmax, nested, offset), nested, offset


def nested_codes(absmax: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    flat = (absmax - offset).flatten()
    return DYNAMIC.round(flat * inverse(per_scale(nested, flat.numel()))).reshape(absmax.shape)


def nested_scale(codes: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return DYNAMIC.of(codes) * per_scale(nested, codes.numel()).reshape(codes.shape) + offset


def per_scale(nested: torch.Tensor, count: int) -> torch.Tensor:
    """`(blocks,)` -> `(count,)`: the nested absmax of each absmax."""
    return nested.repeat_interleave(NESTED_BLOCK)[:count]


@dataclass(frozen=True)
class LearnedGrid(Grid):
    """value = table[code]: levels `(n, L)`, or `(1, L)` for all rows, stored as f16. A fit sorts them;
    training may exchange neighbours."""

    table: torch.Tensor
    group: int

    @property
    def dtype(self) -> torch.dtype:
        """Of levels in files."""
        return torch.float16

    @cached_property
    def sorted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The boundaries between levels, and the code of each level by rising value."""
        levels, codes = self.table.sort(dim=1, stable=True)
        return ((levels[:, 1:] + levels[:, :-1]) * 0.5).contiguous(), codes

    def round(self, w: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        w, (boundaries, codes) = w.contiguous(), self.sorted
        if self.table.shape[0] == 1:
            return codes[0][torch.bucketize(w, boundaries[0], right=True)].to(torch.uint8)
        return codes.gather(1, torch.searchsorted(boundaries, w, right=True)).to(torch.uint8)

    def value(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return self.table.expand(codes.shape[0], -1).gather(1, codes.long())

    def level(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return self.value(codes)

    def groups(self, n: int) -> tuple[torch.Tensor, None]:
        return self.table.new_ones(n, 1), None

    def refitted(
        self, scale: torch.Tensor, offset: torch.Tensor | None, weight: torch.Tensor | None = None
    ) -> LearnedGrid:
        rows = 1 if self.table.shape[0] == scale.shape[0] else None
        table = self.table * mean_over_rows(scale.clamp(min=0), rows, weight)
        return replace(self, table=saturate(table, torch.float16).float())

    def with_zero(self, scale: torch.Tensor | None = None) -> LearnedGrid:
        """The level nearest to 0 becomes 0; order stays."""
        nearest = self.table.abs().argmin(1, keepdim=True)
        return replace(self, table=self.table.scatter(1, nearest, 0.0))

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"table": self.table}

    def replaced(self, parameters: dict[str, torch.Tensor]) -> LearnedGrid:
        return replace(self, table=parameters["table"])


@dataclass(frozen=True)
class KMeans(Format):
    """value = table[code]: a table per row or per tensor, learned by weighted Lloyd iterations."""

    bits: int
    cells: Cells

    def fit(
        self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True
    ) -> LearnedGrid:
        """Without search, levels are spaced evenly from the smallest to the largest weight of a cell.

        The search runs Lloyd's iterations from there and from the quantiles, and keeps the better table of
        each cell. It needs about 50 bytes for each weight of a cell.
        """
        x, weight = self.cells.gather(w)[:, 0].contiguous(), self.cells.importance(importance, w)
        chunk = max(1, (1 << 20) // x.shape[1])
        tables = [
            fit_levels(
                x[row : row + chunk],
                torch.ones_like(x[row : row + chunk]) if weight is None else weight[row : row + chunk, 0],
                1 << self.bits,
                search,
            )
            for row in range(0, x.shape[0], chunk)
        ]
        return LearnedGrid(torch.cat(tables), w.shape[1])

    def pack(self, grid: LearnedGrid, codes: torch.Tensor) -> QTensor:
        planes = {"codes": pack(codes, self.bits), "table": saturate(grid.table, torch.float16)}
        return QTensor(self, (codes.shape[0], codes.shape[1]), planes)

    def unpack(self, q: QTensor) -> tuple[LearnedGrid, torch.Tensor]:
        grid = LearnedGrid(q.planes["table"].float(), q.shape[1])
        return grid, unpack(q.planes["codes"], self.bits, q.shape[1])


NORMAL = re.compile(r"(?P<levels>nf4|fp4)(?:_g(?P<block>32|64|128|256|512|1024|2048|4096))?(?P<nested>_dq)?")
POW2 = re.compile(
    r"pow2_(?P<bits>[2-5])(?:_g(?P<group>[1-9]\d{0,5})|_(?P<whole>channel|tensor))?(?:_(?P<dtype>f16|bf16|f32))?"
)
KMEANS = re.compile(r"kmeans(?P<bits>[1-8])_(?P<whole>channel|tensor)")


def parse_normal(name: str) -> ScaledLevels | None:
    """`nf4`, `fp4_g128_dq` ... -> the format; None for any other name."""
    match = NORMAL.fullmatch(name)
    if match is None:
        return None
    block, levels = int(match["block"] or NORMAL_BLOCK), NF4 if match["levels"] == "nf4" else FP4
    canonical = normal_name(match["levels"], block, match["nested"] is not None)
    shared = (levels, 4, Cells(1, block), (1, 0))
    if match["nested"] is None:
        planes = (code_plane(4), Plane("absmax", "f32", columns=block))
        return ScaledLevels(canonical, block, planes, *shared)
    nested = Plane("nested_absmax", "f32", flat=block * NESTED_BLOCK)
    offset = Plane("offset", "f32", rows=None, columns=None)
    absmax = Plane("absmax", "u8", columns=block)
    return DoubleQuantized(canonical, block, (code_plane(4), absmax, nested, offset), *shared)


def normal_name(levels: str, block: int, nested: bool) -> str:
    """The name of a format of bitsandbytes: `nf4`, `fp4_g128_dq`."""
    return f"{levels}{'' if block == NORMAL_BLOCK else f'_g{block}'}{'_dq' if nested else ''}"


def parse_pow2(name: str) -> ScaledLevels | None:
    """`pow2_4_g64`, `pow2_3_channel_f32` ... -> the format; None for any other name."""
    match = POW2.fullmatch(name)
    if match is None:
        return None
    bits, dtype = int(match["bits"]), match["dtype"] or "f16"
    group = None if match["whole"] else int(match["group"] or 128)
    cells = Cells(None if match["whole"] == "tensor" else 1, group)
    canonical = f"pow2_{bits}_" + (match["whole"] or f"g{group}") + ("" if dtype == "f16" else f"_{dtype}")
    scale = Plane("scale", dtype, cells.rows, cells.columns)
    element = pow2_element(bits)
    return ScaledLevels(canonical, 1, (code_plane(bits), scale), element.levels, bits, cells)


@cache
def pow2_element(bits: int) -> Element:
    """A float without mantissa whose largest value is 1."""
    return Element(f"pow2_{bits}", bits - 1, 0, bias=2 ** (bits - 1) - 1)


def parse_kmeans(name: str) -> KMeans | None:
    """`kmeans3_channel` ... -> the format; None for any other name."""
    match = KMEANS.fullmatch(name)
    if match is None:
        return None
    bits, rows = int(match["bits"]), 1 if match["whole"] == "channel" else None
    table = Plane("table", "f16", rows=rows, columns=None, entries=1 << bits)
    return KMeans(name, 1, (code_plane(bits), table), bits, Cells(rows, None))


for _parse in (parse_normal, parse_pow2, parse_kmeans):
    FORMATS.add_parser(_parse)
for _name in (
    *("nf4", "nf4_dq", "fp4", "fp4_dq", "pow2_3_g128", "pow2_4_g128"),
    *(f"kmeans{b}_{c}" for b in (2, 3, 4) for c in ("channel", "tensor")),
):
    FORMATS.add(_name, FORMATS.get(_name))
_rows = (code_plane(8), Plane("absmax", "f32", columns=None))
FORMATS.add("int8_absmax", ScaledLevels("int8_absmax", 1, _rows, INT8, 8, Cells(1, None)))
