"""Floating point formats: plain casts, scaled low-bit floats, and the block-scaled MX and NVFP4.

An element of E exponent and M mantissa bits is stored as its bit pattern, sign first:

    | s | e e e e | m m m |      value = (-1)^s * 2^(e - bias) * (1 + m / 2^M)        e > 0
      7   6     3   2   0                (-1)^s * 2^(1 - bias) * m / 2^M              e = 0, subnormal

Conversion rounds to nearest, ties to the even code, and saturates: no weight becomes inf or NaN.

    name                    planes                                            value
    f32 f16 bf16            values                                            the value
    fp8_e4m3_channel ...    codes, scale f32 per tensor, row or 128x128       scale * element
    fp4_e2m1_g32 ...        codes, scale f16 per group                        scale * element
    mxfp4 mxfp8_e4m3 ...    codes, scale u8 (E8M0) per 32                     2^(scale - 127) * element
    nvfp4                   codes, scale e4m3 per 16, global_scale f32        (global_scale * scale) * element

Names of the second kind follow a grammar: `fp{bits}_{element}_{tensor|channel|block128|g<columns>}`
with an optional `_f16`, `_bf16` or `_f32` for the scale (f32 by default, f16 in groups).

Sources: FP8 Formats for Deep Learning (arXiv 2209.05433), table 1; OCP Microscaling Formats (MX) v1.0,
sections 5 and 6; NVIDIA's NVFP4 as in TensorRT Model Optimizer. Codes of 4 and 6 bits are packed by
`pack`, the first in the low bits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import floor, log2

from ..core.pack import pack, unpack
from ..lazy import torch
from ..qtensor import Plane, QTensor
from .base import FORMATS, Format
from .cells import Cells, choose
from .levels import LevelGrid, Levels, ScaledLevels, code_plane
from .search import fit_table, inverse


@dataclass(frozen=True)
class Element:
    """A small float. special: "none"; "nan" (all ones is NaN); "ieee" (exponent all ones: inf, NaN)."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    special: str = "none"

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @cached_property
    def levels(self) -> Levels:
        return Levels(self.values)

    def values(self) -> torch.Tensor:
        """`(2^bits,)` f32: the value of each code."""
        code = torch.arange(1 << self.bits)
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        exponent = (code >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        significand = torch.where(exponent > 0, mantissa + (1 << self.mantissa_bits), mantissa).double()
        value = torch.ldexp(significand, exponent.clamp(min=1) - self.bias - self.mantissa_bits)
        if self.special != "none":
            last = exponent == (1 << self.exponent_bits) - 1
            ones = last & (mantissa == (1 << self.mantissa_bits) - 1)
            value[ones if self.special == "nan" else last] = torch.nan
            if self.special == "ieee":
                value[last & (mantissa == 0)] = torch.inf
        return torch.where(code >> (self.bits - 1) > 0, -value, value).float()

    @cached_property
    def largest(self) -> float:
        return float(self.levels.sorted[-1])

    @cached_property
    def exponent_max(self) -> int:
        """Exponent of the largest normal value: emax of the MX specification."""
        return floor(log2(self.largest))


ELEMENTS = {
    element.name: element
    for element in (
        Element("e2m1", 2, 1, bias=1),
        Element("e2m3", 2, 3, bias=1),
        Element("e3m2", 3, 2, bias=3),
        Element("e4m3", 4, 3, bias=7, special="nan"),
        Element("e5m2", 5, 2, bias=15, special="ieee"),
    )
}

SCALES = ELEMENTS["e4m3"].levels  # of the block scales of NVFP4


@cache
def e8m0(device: torch.device | str = "cpu") -> torch.Tensor:
    """`(256,)` f32: the value of each E8M0 code, OCP MX v1.0 section 5.4.1: no sign, no zero, 255 is NaN."""
    values = [2.0 ** (code - 127) for code in range(255)] + [torch.nan]
    return torch.tensor(values, dtype=torch.float32).to(device)


def nearest_exponent(scale: torch.Tensor) -> torch.Tensor:
    """f32 -> int32: the e of the nearest 2^e, of two the lower; the lowest exponent of f32 if scale <= 0."""
    mantissa, exponent = torch.frexp(scale)
    return torch.where(scale > 0, exponent - (mantissa <= 0.75).int(), -149)


@dataclass(frozen=True)
class PowerGrid(LevelGrid):
    """A LevelGrid whose scales are powers of two, the largest with exponent `exponent_max`."""

    exponent_max: int

    def refitted(
        self, scale: torch.Tensor, offset: torch.Tensor | None, weight: torch.Tensor | None = None
    ) -> PowerGrid:
        exponent = nearest_exponent(scale).clamp(-127, self.exponent_max)
        return replace(self, scale=e8m0(scale.device)[exponent + 127])

    def parameters(self) -> dict[str, torch.Tensor]:
        return {}

    def replaced(self, parameters: dict[str, torch.Tensor]) -> PowerGrid:
        return self


@dataclass(frozen=True)
class Microscaling(Format):
    """OCP MX: elements in blocks of 32 under a power of two."""

    element: Element

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> LevelGrid:
        """Scale exponent floor(log2(amax)) - emax (section 6.3); the search tries its neighbours."""
        cells = Cells(1, self.block)
        x, weight = cells.gather(w), cells.importance(importance, w)
        rule = torch.frexp(x.abs().amax(-1)).exponent - 1 - self.element.exponent_max
        options = [
            (e8m0(w.device)[(rule + move).clamp(-127, self.scale_exponent_max) + 127],)
            for move in ((0, 1, -1) if search else (0,))
        ]
        levels = self.element.levels
        (scale,) = choose(x, weight, options, lambda x, scale: levels.nearest(x / scale).mul_(scale))
        return self.grid(scale, w.shape[1])

    @property
    def scale_exponent_max(self) -> int:
        """Above it the largest element would overflow f32."""
        return 127 - self.element.exponent_max

    def grid(self, scale: torch.Tensor, k: int) -> PowerGrid:
        levels, dtype = self.element.levels, torch.float32
        return PowerGrid(scale, levels, self.block, k, 1, dtype, self.scale_exponent_max)

    def pack(self, grid: PowerGrid, codes: torch.Tensor) -> QTensor:
        planes = {
            "codes": pack(codes, self.element.bits),
            "scale": torch.searchsorted(e8m0(codes.device)[:255], grid.scale).to(torch.uint8),
        }
        return QTensor(self, (codes.shape[0], codes.shape[1]), planes)

    def unpack(self, q: QTensor) -> tuple[PowerGrid, torch.Tensor]:
        codes = unpack(q.planes["codes"], self.element.bits, q.shape[1])
        return self.grid(e8m0(codes.device)[q.planes["scale"].long()], q.shape[1]), codes


def reciprocal_twice(x: torch.Tensor) -> torch.Tensor:
    """f32 -> 1 / (1 / x), within two ulps of x; x itself if 1 / x overflows.

    The result is the reciprocal of its own reciprocal, so files that store reciprocals keep it exactly."""
    twice = 1 / (1 / x)
    return torch.where(torch.isfinite(1 / x) | (x == 0), twice, x)


@dataclass(frozen=True)
class TwoLevelGrid(LevelGrid):
    """A LevelGrid whose scale is global_scale `(1, 1)` f32 times e4m3 codes `(n, g)` u8."""

    scale_codes: torch.Tensor
    global_scale: torch.Tensor

    def coded(self, scale_codes: torch.Tensor, global_scale: torch.Tensor) -> TwoLevelGrid:
        scale = global_scale * SCALES.of(scale_codes)
        return replace(self, scale=scale, scale_codes=scale_codes, global_scale=global_scale)

    def refitted(
        self, scale: torch.Tensor, offset: torch.Tensor | None, weight: torch.Tensor | None = None
    ) -> TwoLevelGrid:
        """The global scale is unchanged unless a scale divided by it would overflow e4m3."""
        top, widest = float(SCALES.sorted[-1]), scale.amax()
        grows = widest > top * self.global_scale
        global_scale = torch.where(grows, reciprocal_twice(widest / top), self.global_scale)
        codes = SCALES.round(scale.clamp(min=0) * inverse(global_scale))
        return self.coded(codes, global_scale)

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"global_scale": self.global_scale}

    def replaced(self, parameters: dict[str, torch.Tensor]) -> TwoLevelGrid:
        return self.coded(self.scale_codes, reciprocal_twice(parameters["global_scale"]))


@dataclass(frozen=True)
class NVFP4(Format):
    """e2m1 in blocks of 16 under an e4m3 scale, and one f32 per tensor that centres those scales."""

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> LevelGrid:
        """Rule: global_scale = amax / (448 * 6), block scale = e4m3(block amax / 6 / global_scale).

        The search adds the best scale of each block and the neighbours of both in e4m3.
        """
        element = ELEMENTS["e2m1"].levels.on(w.device)
        cells = Cells(1, self.block)
        x, weight = cells.gather(w), cells.importance(importance, w)
        rule = fit_table(x, weight, element.sorted, search=False, signed=False)
        top = float(SCALES.sorted[-1])
        global_scale = reciprocal_twice(rule.amax() / top).reshape(1, 1)
        scales = [rule]
        if search:
            scales.append(fit_table(x, weight, element.sorted, signed=False))
        options = [
            ((SCALES.round(scale * inverse(global_scale)).int() + move).clamp(0, 126),)
            for scale in scales
            for move in ((0, 1, -1) if search else (0,))
        ]

        def nearest(x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
            scale = global_scale[0] * SCALES.of(code)
            return element.nearest(x * inverse(scale)).mul_(scale)

        (codes,) = choose(x, weight, options, nearest)
        return self.grid(codes.to(torch.uint8), global_scale, w.shape[1])

    def grid(self, scale_codes: torch.Tensor, global_scale: torch.Tensor, k: int) -> TwoLevelGrid:
        scale = global_scale * SCALES.of(scale_codes)
        shared = (ELEMENTS["e2m1"].levels, self.block, k, 1, torch.float32)
        return TwoLevelGrid(scale, *shared, scale_codes, global_scale)

    def pack(self, grid: TwoLevelGrid, codes: torch.Tensor) -> QTensor:
        planes = {"codes": pack(codes, 4), "scale": grid.scale_codes, "global_scale": grid.global_scale}
        return QTensor(self, (codes.shape[0], codes.shape[1]), planes)

    def unpack(self, q: QTensor) -> tuple[TwoLevelGrid, torch.Tensor]:
        grid = self.grid(q.planes["scale"], q.planes["global_scale"], q.shape[1])
        return grid, unpack(q.planes["codes"], 4, q.shape[1])


GRAMMAR = re.compile(
    r"fp(?P<bits>[468])_(?P<element>e\dm\d)_(?:(?P<whole>tensor|channel|block128)|g(?P<group>[1-9]\d{0,5}))"
    r"(?:_(?P<dtype>f32|f16|bf16))?"
)
CELLS = {"tensor": Cells(None, None), "channel": Cells(1, None), "block128": Cells(128, 128)}


def parse(name: str) -> ScaledLevels | None:
    """`fp8_e4m3_channel`, `fp4_e2m1_g32_bf16` ... -> the format, None for any other name."""
    match = GRAMMAR.fullmatch(name)
    element = ELEMENTS.get(match["element"]) if match else None
    if match is None or element is None or element.bits != int(match["bits"]):
        return None
    cells = Cells(1, int(match["group"])) if match["group"] else CELLS[match["whole"]]
    default = "f16" if match["group"] else "f32"
    dtype = match["dtype"] or default
    canonical = name.removesuffix(f"_{default}")
    scale = Plane("scale", dtype, cells.rows, cells.columns)
    return ScaledLevels(canonical, 1, (code_plane(element.bits), scale), element.levels, element.bits, cells)


FORMATS.add_parser(parse)
for _name in [f"fp8_{element}_{cells}" for element in ("e4m3", "e5m2") for cells in CELLS] + ["fp4_e2m1_g32"]:
    FORMATS.add(_name, FORMATS.get(_name))
for _name, _element in {
    "mxfp4": "e2m1",
    "mxfp6_e2m3": "e2m3",
    "mxfp6_e3m2": "e3m2",
    "mxfp8_e4m3": "e4m3",
    "mxfp8_e5m2": "e5m2",
}.items():
    _scale = Plane("scale", "u8", columns=32)
    FORMATS.add(
        _name,
        Microscaling(_name, 32, (code_plane(ELEMENTS[_element].bits), _scale), ELEMENTS[_element]),
    )
FORMATS.add(
    "nvfp4",
    NVFP4(
        "nvfp4",
        16,
        (
            code_plane(4),
            Plane("scale", "u8", columns=16),
            Plane("global_scale", "f32", rows=None, columns=None),
        ),
    ),
)
