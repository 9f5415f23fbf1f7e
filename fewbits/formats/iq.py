"""The IQ types of llama.cpp: codes are points of a lattice for eight or four weights.

    value = d * unit * (2 scale + 1) * level        d f16 a block of 256, scale 4 bits (IQ1: 3) a group
    level = sign * table[code]                      IQ2, IQ3: a lattice of magnitudes, signs apart
          = table[code] +- 1/8                      IQ1: -1, 0, 1, shifted up or down together

    type      weights a point   points   signs                  group   shift
    iq3_s     4                 512      free                   32
    iq3_xxs   4                 256      even number of minus   32
    iq2_s     8                 1024     free                   16
    iq2_xs    8                 512      even                   16
    iq2_xxs   8                 256      even                   32
    iq1_m     8                 2048     -                      16      of 8 weights
    iq1_s     8                 2048     -                      32      of 32

The code of a weight is its level index in the low bits and its sign above them. Only some vectors of codes
are points, so `vector` columns are rounded together, with the importance for which the grid was fitted.
Sources: the block structs of ggml-common.h (llama.cpp); the `gguf` package, whose tables these are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property

from .. import core
from ..errors import FormatError
from ..lazy import torch
from ..qtensor import Plane, QTensor
from .base import FORMATS, Grid, checked_importance, spread
from .ggml import Ggml
from .ggml_fit import RECODE_STARTS, to_half
from .ggml_layout import Field, Half, Values
from .iq_fit import Tile, fit_block, nearest_odd, points_of
from .iq_lattice import Lattice


@dataclass(frozen=True)
class Words:
    """Little-endian words of `bits` bits, made of pieces (name, bits, shift), the first in the lowest bits.
    A piece stores `bits` bits, from bit `shift` on, of the next element of that name."""

    bits: int
    pieces: tuple[tuple[str, int, int], ...]
    name: str = "words"

    def pack(self, values: Values) -> torch.Tensor:
        used, at, words = Counter[str](), 0, None
        count = Counter(piece[0] for piece in self.pieces)
        for name, bits, shift in self.pieces:
            every = values[name].long()[:, used[name] :: count[name]]
            part = ((every >> shift) & (2**bits - 1)) << at
            words = part if words is None else words | part
            used[name] += 1
            at += bits
        assert words is not None
        places = torch.arange(0, self.bits, 8, device=words.device)
        return ((words[..., None] >> places) & 255).flatten(1).to(torch.uint8)

    def unpack(self, data: torch.Tensor, values: Values) -> None:
        per = self.bits // 8
        places = torch.arange(0, self.bits, 8, device=data.device)
        words = (data.long().reshape(len(data), -1, per) << places).sum(-1)
        used, at = Counter[str](), 0
        count = Counter(piece[0] for piece in self.pieces)
        for name, bits, shift in self.pieces:
            if name not in values:
                shape = len(data), words.shape[1] * count[name]
                values[name] = torch.zeros(shape, dtype=torch.int32, device=data.device)
            part = ((words >> at) & (2**bits - 1)) << shift
            values[name][:, used[name] :: count[name]] |= part.to(torch.int32)
            used[name] += 1
            at += bits

    def nbytes(self, counts: dict[str, int]) -> int:
        name = self.pieces[0][0]
        return counts[name] // sum(piece[0] == name for piece in self.pieces) * self.bits // 8


@dataclass(frozen=True)
class IqGrid(Grid):
    """The grid of every block for its d, scales and shifts. weight: the importance inside a vector."""

    format: Iq
    values: Values = field(repr=False)
    n: int
    k: int
    weight: torch.Tensor | None = field(default=None, repr=False)

    @property
    def group(self) -> int:  # type: ignore[override]
        return self.format.group

    @property
    def vector(self) -> int:  # type: ignore[override]
        return self.format.vector

    @property
    def dtype(self) -> torch.dtype:
        """Of `d` in files."""
        return torch.float16

    @cached_property
    def scale(self) -> torch.Tensor:
        """`(n, groups)` f32."""
        odd = 2 * self.values["scale"] + 1
        return (self.values["d"] * self.format.unit * odd.float()).reshape(self.n, -1)

    def weighted(self, importance: torch.Tensor) -> IqGrid:
        return replace(self, weight=checked_importance(importance, self.n, self.k))

    def _shift(self, columns: slice) -> torch.Tensor | None:
        if not self.format.shift:
            return None
        return spread(self.values["shift"].reshape(self.n, -1), self.format.shift, columns, self.k)

    def round(self, w: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        fmt, v = self.format, self.format.vector
        n, c = w.shape
        scale = spread(self.scale, fmt.group, columns, self.k).expand(n, c)[:, ::v].reshape(-1)
        weight = None
        if self.weight is not None:
            weight = self.weight.expand(n, self.k)[:, columns].reshape(-1, 1, v)
        shift = self._shift(columns)
        if shift is not None:
            shift = shift.expand(n, c)[:, ::v].reshape(1, -1)
        tile = Tile.of(fmt, w.reshape(-1, 1, v), weight)
        places = points_of(fmt, tile, scale, shift).places
        digits = fmt.lattice.on(w.device).points[places].transpose(1, 2).reshape(v, -1)
        codes = digits | tile.minus.long() << fmt.level_bits
        return codes.T.reshape(n, c).to(torch.uint8)

    def value(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return spread(self.scale, self.group, columns, self.k) * self.level(codes, columns)

    def level(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        fmt, codes = self.format, codes.long()
        level = fmt.lattice.on(codes.device).levels[codes & (2**fmt.level_bits - 1)]
        shift = self._shift(columns)
        if shift is not None:
            return level + (1 - 2 * shift) * fmt.delta
        return torch.where(codes >> fmt.level_bits > 0, -level, level)

    def groups(self, n: int) -> tuple[torch.Tensor, None]:
        return self.scale, None

    def refitted(
        self, scale: torch.Tensor, offset: torch.Tensor | None, weight: torch.Tensor | None = None
    ) -> IqGrid:
        """Per block, the d and odd integers with the least sum of weight * (d * unit * odd - scale)^2.
        The old ones are a candidate."""
        fmt = self.format
        shape = -1, fmt.block // fmt.group
        scale = scale.reshape(shape)
        w = torch.ones_like(scale) if weight is None else weight.reshape(shape)
        best_d, best = self.values["d"][:, 0], (2 * self.values["scale"] + 1).float()
        hi = 2 * fmt.scale_top + 1
        least = ((best_d[:, None] * fmt.unit * best - scale).square() * w).sum(1)
        starts = [best_d, *(to_half(scale.amax(1) / (share * hi * fmt.unit)) for share in RECODE_STARTS)]
        for d in starts:
            for _ in range(2):
                odd = nearest_odd(scale, d * fmt.unit, hi)
                up, down = (w * odd * scale).sum(1), (w * odd * odd).sum(1)
                d = torch.where((up > 0) & (down > 0), to_half(up / down / fmt.unit), d)
                now = ((d[:, None] * fmt.unit * odd - scale).square() * w).sum(1)
                better = now < least
                best_d, least = torch.where(better, d, best_d), torch.where(better, now, least)
                best = torch.where(better[:, None], odd, best)
        coded = {"d": best_d[:, None], "scale": ((best - 1) / 2).to(torch.int32)}
        return replace(self, values={**self.values, **coded})

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"d": self.values["d"].reshape(self.n, -1)}

    def replaced(self, parameters: dict[str, torch.Tensor]) -> IqGrid:
        return replace(self, values={**self.values, "d": parameters["d"].reshape(-1, 1)})


@dataclass(frozen=True)
class Iq(Ggml):
    """One IQ type. signs: free | even | none. unit: scale = d * unit * an odd integer. shift: the number of
    weights that share a shift, 0 if there is none. last: the level of the largest weight in the plain fit.
    starts: where the search for a group's scale starts, as shares of its largest weight.
    """

    signs: str = "free"
    unit: float = 1.0
    shift: int = 0
    last: float = 15.0
    starts: tuple[float, ...] = ()
    delta: float = 0.125

    @cached_property
    def lattice(self) -> Lattice:
        return Lattice.of(self.type_name)

    def lattice_table(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For the C++ core: levels, points, and the level of the plain fit before the starts."""
        return self.lattice.levels, self.lattice.points, torch.tensor([self.last, *self.starts])

    @property
    def vector(self) -> int:  # type: ignore[override]
        """The number of columns that are rounded together."""
        return self.lattice.dim if self.signs != "even" else 8

    @property
    def scale_top(self) -> int:
        assert self.scale_range is not None
        return self.scale_range[1]

    @property
    def level_bits(self) -> int:
        return (len(self.lattice.levels) - 1).bit_length()

    @property
    def _counts(self) -> dict[str, int]:
        shifts = self.block // self.shift if self.shift else 0
        groups = self.block // self.group
        points = self.block // self.lattice.dim
        return {"index": points, "sign": self.block // 8, "scale": groups, "shift": shifts, "nibble": 4}

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> IqGrid:  # type: ignore[override]
        n, k = w.shape
        if core.takes(w, importance):
            values = self.values(self.encode(w, importance, search))
            return IqGrid(self, values, n, k, checked_importance(importance, n, k))
        return self.fit_reference(w, importance, search)

    def fit_reference(  # type: ignore[override]
        self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True
    ) -> IqGrid:
        self.check(w)
        n, k = w.shape
        x = w.float().reshape(-1, self.block // self.group, self.group)
        weight = checked_importance(importance, n, k)
        spread_out = None if weight is None else weight.expand(n, k).reshape(x.shape)
        return IqGrid(self, fit_block(self, x, spread_out, search), n, k, weight)

    def pack(self, grid: IqGrid, codes: torch.Tensor) -> QTensor:  # type: ignore[override]
        """FormatError if the codes of a vector are no point of the lattice."""
        n, k = codes.shape
        whole = codes.reshape(-1, self.block).long()
        lattice = self.lattice.on(codes.device)
        index = lattice.index((whole & (2**self.level_bits - 1)).unflatten(1, (-1, lattice.dim)))
        minus = (whole >> self.level_bits).unflatten(1, (-1, 8))
        sign = (minus << torch.arange(8, device=minus.device)).sum(-1)
        odd = self.signs == "even" and bool((minus.sum(-1) % 2).any())
        if odd or bool((index < 0).any()):
            raise FormatError(
                f"{self.name}: some codes are not points of its lattice; round {self.vector} columns together"
            )
        values = {**grid.values, "index": index, "sign": sign}
        d = values["d"].clamp(-65504, 65504).to(torch.float16).view(torch.int16).int()
        values["nibble"] = d >> torch.arange(0, 16, 4, device=d.device)
        blocks = torch.cat([part.pack(values) for part in self.fields], 1)
        return QTensor(self, (n, k), {"blocks": blocks.reshape(n, -1)})

    def values(self, q: QTensor, codes: bool = False) -> Values:
        data = q.planes["blocks"].reshape(-1, self.planes[0].entries)
        sizes = [part.nbytes(self._counts) for part in self.fields]
        values: Values = {}
        for part, piece in zip(self.fields, data.split(sizes, 1), strict=True):
            part.unpack(piece, values)
        if "nibble" in values:
            nibbles = values.pop("nibble")
            bits = (nibbles << torch.arange(0, 16, 4, device=data.device)).sum(1, keepdim=True)
            values["d"] = bits.to(torch.int16).view(torch.float16).float()
        index, sign = values.pop("index"), values.pop("sign", None)
        if codes:
            values["code"] = self.lattice.on(data.device).points[index.long()].flatten(1)
            if sign is not None:
                values["code"] |= self._minus(sign) << self.level_bits
        return values

    def _minus(self, sign: torch.Tensor) -> torch.Tensor:
        """`(N, vectors)` sign masks -> `(N, block)` 0 or 1. Of seven bits, an eighth makes their sum even."""
        minus = (sign.long()[..., None] >> torch.arange(8, device=sign.device)) & 1
        if self.signs == "even":
            minus[..., 7] = minus[..., :7].sum(-1) % 2
        return minus.flatten(1)

    def grid(self, values: Values, n: int, k: int) -> IqGrid:  # type: ignore[override]
        return IqGrid(self, values, n, k)


def words(bits: int, *pieces: tuple[str, int, int]) -> Words:
    return Words(bits, pieces)


def iq(name: str, nbytes: int, group: int, fields: tuple[Field, ...], scales: int = 16, **row: object) -> Iq:
    planes = (Plane("blocks", "u8", columns=256, entries=nbytes),)
    return Iq(name, 256, planes, "lattice", group, scale_range=(0, scales - 1), fields=fields, **row)  # type: ignore[arg-type]


D = Half("d")
INDEX, HIGH = ("index", 8, 0), ("index", 3, 8)
SIGN7, SCALE, SHIFT = ("sign", 7, 0), ("scale", 4, 0), ("shift", 1, 0)
LOW, SIGNS, SCALES = words(8, INDEX), words(8, ("sign", 8, 0)), words(8, SCALE, SCALE)
SCALE3 = ("scale", 3, 0)


def starts(*levels: float) -> tuple[float, ...]:
    """Starts of the search for a scale, given by the level of the largest weight. A level above the
    table's largest clips the weight; the lowest level suits weights that are all equal."""
    return tuple(1 / level for level in levels)


STARTS2 = starts(43, 50, 58, 36, 68, 30, 80, 8)
STARTS1 = starts(1.6, 2.1, 1.25)

IQ_TYPES = (
    iq("iq3_s", 110, 32, (D, LOW, words(8, *[("index", 1, 8)] * 8), SIGNS, SCALES),
       starts=starts(15, 16.2, 17.4, 13.8, 12.6, 1)),
    iq("iq3_xxs", 98, 32, (D, LOW, words(32, *[SIGN7] * 4, SCALE)), signs="even", unit=0.25, last=62.0,
       starts=starts(62, 66, 70, 75, 80, 57, 52, 4)),
    iq("iq2_s", 82, 16, (D, LOW, SIGNS, words(8, *[("index", 2, 8)] * 4), SCALES), unit=0.125, last=43.0,
       starts=starts(43, 50, 58, 36, 68, 8)),
    iq("iq2_xs", 74, 16, (D, words(16, ("index", 9, 0), SIGN7), SCALES), signs="even", unit=0.125,
       last=43.0, starts=STARTS2),
    iq("iq2_xxs", 66, 32, (D, words(64, *[INDEX] * 4, *[SIGN7] * 4, SCALE)), signs="even", unit=0.125,
       last=43.0, starts=STARTS2),
    iq("iq1_s", 50, 32, (D, LOW, words(16, *[HIGH] * 4, SCALE3, SHIFT)), scales=8, signs="none", shift=32,
       last=1.0, starts=STARTS1),
    iq("iq1_m", 56, 16, (LOW, words(8, HIGH, SHIFT, HIGH, SHIFT), words(16, *[SCALE3] * 4, ("nibble", 4, 0))),
       scales=8, signs="none", shift=8, last=1.0, starts=STARTS1),
)  # fmt: skip

for row in IQ_TYPES:
    FORMATS.add(row.name, row)
    core.LATTICES[row.name] = row.lattice_table
