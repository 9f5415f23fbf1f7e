"""Affine integers: value = scale * (code - zero), or scale * code + offset; 2 to 8 bits.

The name of a format states its variation:

    int{bits}[_g{columns} | _channel | _tensor][_asym | _asym_float][_f16 | _bf16 | _f32]

    int4_g128             symmetric, one scale per 128 columns     zero = 2^(bits-1), not stored
    int8_channel          one scale per row; also what `int8` means
    int4_g32_asym         an integer zero in [0, 2^bits - 1] per group
    int4_g64_asym_float   a float offset (plane `minimum`) per group, in the scale's type
    int3_g64_bf16         scales in bf16; f16 is the default

Codes are unsigned and packed by `pack`, the first in the low bits, each row on its own. A symmetric
code q in [-2^(bits-1), 2^(bits-1) - 1] is stored as q + 2^(bits-1), as GPTQ files do; a scale may be
negative, so that the extreme weight of a group gets the longer end of the range.

    codes    u8    8 codes in `bits` bytes (4 bits: 2 codes in a byte)
    scale    f16   one per group
    zero     u8    integer zeros of a row, packed like the codes; a byte each per channel or tensor
    minimum  f16   the offset, instead of zero

Weights are rounded with the scale as stored. The last group of a row may be shorter. Formats whose groups
consist of columns that are not neighbours are in actorder.py.
Source: Jacob et al., Quantization and Training of Neural Networks (arXiv 1712.05877), section 2.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..core.pack import cell, pack, unpack
from ..dtypes import DTYPES
from ..lazy import torch
from ..qtensor import Plane, QTensor
from .base import FORMATS, Format
from .cells import Cells, Choice, choose, tries
from .grids import AffineGrid, saturate
from .levels import code_plane
from .search import fit_affine, fit_symmetric, inverse, lanes, ordered_sum


@dataclass(frozen=True)
class Affine(Format):
    """zero: "none" (symmetric), "int" or "float". scale_type: of scales and offsets, a name of DTYPES.
    zero_bits: of a stored integer zero."""

    bits: int
    cells: Cells
    zero: str
    scale_type: str
    zero_bits: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.scale_type].torch

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> AffineGrid:
        x, weight = self.cells.gather(w), self.cells.importance(importance, w)
        fit = {"none": self.fit_symmetric, "int": self.fit_zero, "float": self.fit_minimum}[self.zero]
        return self.grid(fit(x, weight, search), w.shape[1])

    def grid(self, parameters: tuple[torch.Tensor, ...], k: int) -> AffineGrid:
        """parameters: (scale,), (scale, zero) or (scale, offset), f32 of the scale plane's shape."""
        zero: torch.Tensor | int = 0
        offset = parameters[1] if self.zero == "float" else None
        if self.zero != "float":
            zero = parameters[1] if self.zero == "int" else 1 << (self.bits - 1)
        group = self.cells.columns or k
        return AffineGrid(parameters[0], offset, zero, self.top, group, k, self.dtype, self.zero != "int")

    def stored(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter rounded to the type of its plane, as f32."""
        return saturate(parameter, self.dtype).float()

    def nearest(self, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        """Lanes x `(G, N)` -> x rounded to the grid of the `(N,)` parameters of each group."""
        scale, offset = parameters[0], parameters[1] if self.zero == "float" else None
        low = 0 if self.zero == "float" else -(1 << (self.bits - 1))
        level = (x if offset is None else x - offset).mul(inverse(scale)).round_().clamp_(low, low + self.top)
        return level.mul_(scale) if offset is None else level.mul_(scale).add_(offset)

    def fit_symmetric(
        self, x: torch.Tensor, weight: torch.Tensor | None, search: bool
    ) -> tuple[torch.Tensor, ...]:
        half = 1 << (self.bits - 1)
        options = [
            (self.stored(fit_symmetric(x, weight, -half, half - 1, tried)),) for tried in tries(search)
        ]
        return choose(x, weight, options, self.nearest)

    def fit_zero(
        self, x: torch.Tensor, weight: torch.Tensor | None, search: bool
    ) -> tuple[torch.Tensor, ...]:
        """Integer zero point: the range is extended to include 0, which always is one of the values.

        The search takes the affine fit and its neighbouring zeros, each refitted, and the two zeros
        in the middle; on normal weights it comes within 0.3 % of the error of trying every zero.
        """
        low, high = x.amin(-1).clamp(max=0).flatten(), x.amax(-1).clamp(min=0).flatten()
        plain = self.with_zero((high - low) / self.top, low)
        choice = Choice(lanes(x), None if weight is None else lanes(weight))
        choice.offer(plain, self.levels(choice.x, *plain).mul_(plain[0]))
        if search:
            for scale, zero in (plain, self.with_zero(*map(torch.flatten, fit_affine(x, weight, self.top)))):
                for move in (-1, 0, 1):
                    self.alternate(choice, scale, (zero + move).clamp(0, self.top))
            half = 1 << (self.bits - 1)
            for middle in (half, half - 1):
                scale = fit_symmetric(x, weight, -middle, self.top - middle, signed=False).flatten()
                option = self.stored(scale), torch.full_like(scale, middle)
                choice.offer(option, self.levels(choice.x, *option).mul_(option[0]))
        return tuple(part.reshape(x.shape[:-1]) for part in choice.best)

    def with_zero(self, scale: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.stored(scale)
        return scale, torch.round(-offset * inverse(scale)).clamp(0, self.top)

    def levels(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Lanes x `(G, N)` -> code - zero of each weight."""
        return (x * inverse(scale)).round_().add_(zero).clamp_(0, self.top).sub_(zero)

    def alternate(self, choice: Choice, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Offer the least-squares scale of the codes that (scale, zero) gives, and that of its own codes."""
        x, weight = choice.x, choice.weight
        q, terms = self.levels(x, scale, zero), x.new_empty(x.shape[0], 2, x.shape[1])
        for _ in range(2):
            wq = q if weight is None else torch.mul(q, weight, out=terms[:, 1])
            torch.mul(wq, x, out=terms[:, 0])
            torch.mul(wq, q, out=terms[:, 1])
            cross, square = ordered_sum(terms)
            scale = self.stored(torch.where(square > 0, cross / square, scale))
            q = self.levels(x, scale, zero)
            choice.offer((scale, zero), q * scale)

    def fit_minimum(
        self, x: torch.Tensor, weight: torch.Tensor | None, search: bool
    ) -> tuple[torch.Tensor, ...]:
        options = [
            tuple(self.stored(part) for part in fit_affine(x, weight, self.top, tried))
            for tried in tries(search)
        ]
        return choose(x, weight, options, self.nearest)

    def pack(self, grid: AffineGrid, codes: torch.Tensor) -> QTensor:
        planes = {"codes": pack(codes, self.bits), "scale": saturate(grid.scale, self.dtype)}
        if isinstance(grid.zero, torch.Tensor):
            planes["zero"] = pack(grid.zero.to(torch.uint8), self.zero_bits)
        if grid.offset is not None:
            planes["minimum"] = saturate(grid.offset, self.dtype)
        return QTensor(self, (codes.shape[0], codes.shape[1]), planes)

    def unpack(self, q: QTensor) -> tuple[AffineGrid, torch.Tensor]:
        scale = q.planes["scale"].float()
        parameters: tuple[torch.Tensor, ...] = (scale,)
        if self.zero == "int":
            parameters += (unpack(q.planes["zero"], self.zero_bits, scale.shape[1]).float(),)
        elif self.zero == "float":
            parameters += (q.planes["minimum"].float(),)
        return self.grid(parameters, q.shape[1]), unpack(q.planes["codes"], self.bits, q.shape[1])


GRAMMAR = re.compile(
    r"int(?P<bits>[2-8])(?:_g(?P<group>[1-9]\d{0,5})|_(?P<whole>channel|tensor))?"
    r"(?P<zero>_asym_float|_asym)?(?:_(?P<dtype>f16|bf16|f32))?"
)


def parse(name: str) -> Affine | None:
    """A name of the grammar -> the format under its canonical name; None for any other name."""
    match = GRAMMAR.fullmatch(name)
    if match is None:
        return None
    bits, dtype = int(match["bits"]), match["dtype"] or "f16"
    group = int(match["group"]) if match["group"] else None
    cells = Cells(None if match["whole"] == "tensor" else 1, group)
    canonical = (
        f"int{bits}_" + (f"g{group}" if group else match["whole"] or "channel") + (match["zero"] or "")
    )
    if match["dtype"] not in (None, "f16"):
        canonical += f"_{match['dtype']}"
    planes = [code_plane(bits), Plane("scale", dtype, cells.rows, cells.columns)]
    zero_bits = bits if group else 8
    if match["zero"] == "_asym":
        count, words = cell(zero_bits)
        columns = None if group is None else group * count
        planes.append(Plane("zero", "u8", cells.rows, columns, words))
    elif match["zero"] == "_asym_float":
        planes.append(Plane("minimum", dtype, cells.rows, cells.columns))
    zero = {None: "none", "_asym": "int", "_asym_float": "float"}[match["zero"]]
    return Affine(canonical, 1, tuple(planes), bits, cells, zero, dtype, zero_bits)


NAMED = """
    int2_g32 int2_g64_asym int3_g64 int3_g128 int3_g128_asym
    int4_g32 int4_g64 int4_g128 int4_channel int4_g32_asym int4_g64_asym int4_g128_asym int4_g64_asym_float
    int5_g128 int6_g128 int7_g128 int8_g128 int8_channel int8_tensor int8_channel_asym
"""
FORMATS.add_parser(parse)
for _name in NAMED.split():
    FORMATS.add(_name, FORMATS.get(_name))
