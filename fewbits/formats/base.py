"""Format and Grid: the meaning of the bits, and the representable values.

Error feedback needs the three steps of quantizing separately, so a format offers them separately:

    fit(w, importance)   (n, k) f32 -> Grid      choose block parameters: scale, offset, table entry
    Grid.round(w, cols)  (n, c) f32 -> (n, c)    nearest code, for all or some columns
    pack(grid, codes)    (n, k)     -> QTensor   codes and parameters as bytes

`encode` is all three (a format may fuse them in C++), `decode` is the inverse.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, ClassVar

from ..dtypes import BF16, DTYPES, F16, F32, DType
from ..errors import FormatError
from ..lazy import torch
from ..qtensor import Plane, QTensor
from ..registry import Registry

# The number types of scales, by name.
SCALE_TYPES = tuple(dtype.name for dtype in (F32, F16, BF16))
# Weights encoded at once if rows are independent. A search takes some 100 bytes for each.
CHUNK = 2**20
# Weights that a matrix product decodes at once: 16 MiB in f32, which malloc reuses. More would be mapped anew
# each time, and new pages take ten times as long as decoding.
AT_ONCE = 2**22


def spread(
    parameter: torch.Tensor, group: int, columns: slice, k: int, index: torch.Tensor | None = None
) -> torch.Tensor:
    """`(n, g)` group parameters -> `(n, c)`, one for each of the given columns; `(n, 1)` if they share one.
    index: the group of each column if it is not column // group."""
    if parameter.shape[1] == 1:
        return parameter
    if index is not None:
        return parameter[:, index[columns]]
    start, stop, stride = columns.indices(k)
    # Without a gather, which takes longer; but its gradient is summed more exactly.
    if stride == 1 and start % group == 0 and stop - start > group and not parameter.requires_grad:
        whole = parameter[:, start // group : math.ceil(stop / group)]
        return whole.repeat_interleave(group, 1)[:, : stop - start]
    if stride > 0 and stop > start and start // group == (stop - 1) // group:
        return parameter[:, start // group : start // group + 1]
    return parameter[:, torch.arange(start, stop, stride, device=parameter.device) // group]


def _there(value: Any, device: torch.device) -> Any:
    if isinstance(value, (Grid, torch.Tensor)):
        return value.to(device)
    return {name: part.to(device) for name, part in value.items()} if isinstance(value, dict) else value


class Grid(ABC):
    """The representable values of one weight once its block parameters are chosen.

    Every grid is linear in the parameters of its groups of columns:

        value = scale * level(code) + offset     scale, offset (n, g): one for each row and group

    (an integer zero point is part of the level). Refitting in closed form relies on this. `value` is this
    expression bit for bit, evaluated in f32 in this order.

    Group j covers the columns j * group to (j + 1) * group - 1; the last group may be shorter. In act order
    it does not: there `index (k,)` int64 gives the group of each column. `group_of`, `members`, `sums` and
    `spread` work for both. If codes are points of a lattice, `vector` columns are rounded together, and a
    slice of columns must consist of whole vectors.
    """

    group: int
    vector: int = 1
    index: torch.Tensor | None = None
    half: int = 0  # the code in the middle, of a grid with offsets

    def to(self, device: torch.device) -> Any:
        """The same grid with its tensors there."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        return replace(self, **{name: _there(value, device) for name, value in own.items()})  # type: ignore[type-var]

    def group_of(self, columns: torch.Tensor) -> torch.Tensor:
        """`(c,)` columns -> the group of each."""
        return columns // self.group if self.index is None else self.index[columns]

    def members(self, k: int) -> list[slice] | list[torch.Tensor]:
        """The columns of each group."""
        if self.index is None:
            return [slice(start, min(start + self.group, k)) for start in range(0, k, self.group)]
        return [torch.where(self.index == j)[0] for j in range(math.ceil(k / self.group))]

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """`(n, k)` -> `(n, g)`: the sum over the columns of each group."""
        n, k = x.shape
        if self.index is not None:
            return x.new_zeros(n, math.ceil(k / self.group)).index_add_(1, self.index, x)
        x = torch.nn.functional.pad(x, (0, -k % self.group)) if k % self.group else x
        return x.reshape(n, -1, self.group).sum(2)

    def spread(self, parameter: torch.Tensor, k: int) -> torch.Tensor:
        """`(n, g)` -> `(n, k)`: the parameter of each column's group."""
        return spread(parameter, self.group, slice(None), k, self.index).expand(-1, k)

    def weighted(self, importance: torch.Tensor) -> Grid:
        """This grid for an importance `(k,)`, which weights the errors inside a vector of a lattice.
        Grids that round single columns ignore it."""
        return self

    @abstractmethod
    def round(self, w: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """`(n, c)` f32 -> `(n, c)` codes: the nearest representable of each weight of `columns`."""

    @abstractmethod
    def value(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """`(n, c)` codes -> `(n, c)` f32: exactly what `decode` gives for them."""

    @abstractmethod
    def level(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        """`(n, c)` codes -> `(n, c)` f32: the value before scale and offset."""

    @abstractmethod
    def groups(self, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """-> scale `(n, g)` and offset `(n, g)` or None, f32."""

    @abstractmethod
    def refitted(
        self, scale: torch.Tensor, offset: torch.Tensor | None, weight: torch.Tensor | None = None
    ) -> Grid:
        """The grid of the same kind whose stored groups come nearest to scale and offset `(n, g)`.

        offset is None if `groups` returns None. weight `(n, g)`: weights the error of each group if several
        groups share a parameter. A plain float type has no parameters and returns itself."""

    def with_zero(self, scale: torch.Tensor | None = None) -> Grid:
        """The grid with 0 among its values, where that is a choice: see `zero.py`. scale `(n, g)`: of a grid
        with offsets, the wanted scales (default: its own)."""
        return self

    @abstractmethod
    def parameters(self) -> dict[str, torch.Tensor]:
        """The continuous parameters behind scales and offsets: f16 scales, or d and dmin of a K block.

        Each is `(rows, entries)` f32. The table is empty if scales are powers of two or if there are none."""

    @abstractmethod
    def replaced(self, parameters: dict[str, torch.Tensor]) -> Grid:
        """The same grid with other parameters, which are not rounded to their stored type (`pack` does that).
        `value` of the result is differentiable with respect to them."""


@dataclass(frozen=True)
class Distortion:
    """The error of a quantized weight: sum of squared errors, sum of squares of the weight, largest error."""

    squared: float
    energy: float
    largest: float

    @staticmethod
    def between(before: torch.Tensor, after: torch.Tensor) -> Distortion:
        """The distortion of a float tensor and its quantized values, both f32; sums are in f64."""
        error = after - before
        squared, energy = (float((part * part).sum(dtype=torch.float64)) for part in (error, before))
        return Distortion(squared, energy, float(error.abs().max()))

    def __add__(self, other: Distortion) -> Distortion:
        largest = max(self.largest, other.largest)
        return Distortion(self.squared + other.squared, self.energy + other.energy, largest)

    @property
    def relative_error(self) -> float:
        """|w' - w| / |w|, Frobenius. For a zero weight: 0 if w' is zero too, else infinite."""
        if self.squared == 0:
            return 0.0
        return math.inf if self.energy == 0 else math.sqrt(self.squared / self.energy)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise ratio in dB; None if the noise or the signal is zero."""
        if self.squared == 0 or self.energy == 0:
            return None
        return 10 * math.log10(self.energy / self.squared)


@dataclass(frozen=True)
class Format(ABC):
    """A number format. Each subclass is a family, whose variation is data.

    `block` is the number of columns that are encoded together: a row length must be a multiple of it.
    """

    name: str
    block: int
    planes: tuple[Plane, ...]

    # The number of columns that are rounded together; see Grid.
    vector: ClassVar[int] = 1

    @property
    def largest(self) -> float:
        """The largest magnitude that a weight may have. Squared errors of a group are summed in f32: 2^112
        leaves room for 2^15 of them."""
        return 2.0**56

    @abstractmethod
    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> Grid:
        """`(n, k)` f32 -> Grid.

        importance: `(k,)` or `(n, k)` f32, not negative: the weight of each squared error. search:
        minimize the (weighted) squared error; without it, the plain min-max rule of the format.
        """

    @abstractmethod
    def pack(self, grid: Any, codes: torch.Tensor) -> QTensor:
        """`(n, k)` codes -> QTensor."""

    @abstractmethod
    def unpack(self, q: QTensor) -> tuple[Any, torch.Tensor]:
        """QTensor -> (Grid, codes `(n, k)`): the inverse of `pack`."""

    def decode(self, q: QTensor) -> torch.Tensor:
        """QTensor -> `(n, k)` f32."""
        grid, codes = self.unpack(q)
        return grid.value(codes)

    @property
    def ordered(self) -> Format | None:
        """For a format in act order: the format with the same groups whose columns are in order, from which
        `arranged` makes a weight in act order. None for all other formats."""
        return None

    def arranged(self, q: QTensor, order: torch.Tensor) -> QTensor:
        """A weight `(n, k)` in the format `ordered` -> the same weight in this format. Column j of the given
        weight becomes column order[j]. FormatError unless this is a format in act order."""
        raise FormatError(f"{self.name} keeps columns in order; only a format in act order moves them")

    def column_block(self, k: int) -> int | None:
        """How many columns can be fitted and packed alone: the widest cell of any plane. None if a
        plane has cells of whole rows, of several rows, or of the flattened tensor; then the grid of the
        whole weight must be fitted first."""
        widths = []
        for plane in self.planes:
            if plane.flat is not None or plane.rows != 1 or plane.columns is None:
                return None
            widths.append(plane.columns)
        width = math.lcm(self.block, *widths)
        return width if k % width == 0 else None

    @property
    def rows_alone(self) -> bool:
        """Whether every plane belongs to one row, so that rows can be encoded one by one and exchanged."""
        return all(plane.flat is None and plane.rows == 1 for plane in self.planes)

    @property
    def rows_movable(self) -> bool:
        """Whether no cell spans several rows (`QTensor.take_rows`); what all rows share there may be."""
        return all(plane.flat is None and plane.rows in (1, None) for plane in self.planes)

    def encode(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> QTensor:
        """`(n, k)` float -> QTensor: fit, round and pack, a few rows at a time if rows are independent."""
        self.check(w)
        n, k = w.shape
        importance = checked_importance(importance, n, k)
        step = max(1, CHUNK // k) if self.rows_alone else n
        parts = []
        for start in range(0, n, step):
            rows = slice(start, start + step)
            x = w[rows].float()
            part = importance if importance is None or importance.ndim == 1 else importance[rows]
            grid = self.fit(x, part, search)
            parts.append(self.pack(grid, grid.round(x)))
        return QTensor.join_rows(parts)

    def distortion(self, w: torch.Tensor, q: QTensor) -> Distortion:
        """The distortion of `q` against `w`."""
        total = Distortion(0.0, 0.0, 0.0)
        for rows, value in self.decoded_rows(q):
            total = total + Distortion.between(w[rows].float(), value)
        return total

    def decoded_rows(self, q: QTensor, count: int = CHUNK) -> Iterator[tuple[slice, torch.Tensor]]:
        """`(n, k)` -> rows and their values, f32: about `count` at once if rows are independent."""
        n, k = q.shape
        step = max(1, count // k) if self.rows_movable else n
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            yield rows, (q if step >= n else q.take_rows(rows)).decode()

    def check(self, w: torch.Tensor, name: str = "tensor") -> None:
        """Raise FormatError unless this format can represent a weight of w's shape and values."""
        self.check_matrix(w, name)
        self.check_values(w, name)

    def check_matrix(self, w: torch.Tensor, name: str = "tensor") -> None:
        if w.ndim != 2 or 0 in w.shape:
            raise FormatError(f"{name}: {self.name} holds two-dimensional weights, not {tuple(w.shape)}")
        self.check_shape(w.shape[0], w.shape[1], name)

    def check_values(self, w: torch.Tensor, name: str = "tensor") -> None:
        """Raise FormatError for NaN, infinity, or magnitudes whose squared errors overflow f32."""
        if w.is_meta:
            raise FormatError(f"{name}: a tensor on the meta device has no values to quantize")
        low, high = (float(edge) for edge in torch.aminmax(w))  # NaN if any weight is
        if max(-low, high) <= self.largest:
            return
        bad = int((~torch.isfinite(w)).sum())
        if bad:
            raise FormatError(
                f"{name}: {bad} of {w.numel()} weights are NaN or infinite; repair the checkpoint"
            )
        raise FormatError(
            f"{name}: the largest magnitude {max(-low, high):g} exceeds {self.largest:g}, the limit of "
            f"{self.name}; rescale the weight, or keep it in bf16 or f32"
        )

    def check_shape(self, n: int, k: int, name: str = "tensor") -> None:
        if k % self.block:
            raise FormatError(
                f"{name}: row length {k} is not a multiple of {self.block}, the block of {self.name}; "
                "use a format with a block that divides it (q8_0, int4_g32) or add a rule for this tensor"
            )

    def nbytes(self, n: int, k: int) -> int:
        return sum(plane.nbytes(n, k) for plane in self.planes)

    def bits_per_weight(self, n: int = 4096, k: int = 4096) -> Fraction:
        return Fraction(8 * self.nbytes(n, k), n * k)


def checked_importance(importance: torch.Tensor | None, n: int, k: int) -> torch.Tensor | None:
    """`(k,)` or `(n, k)` -> the same in f32; None, which means equal importance, if all are zero."""
    if importance is None:
        return None
    if importance.shape not in ((k,), (n, k)):
        raise FormatError(
            f"importance has shape {tuple(importance.shape)}; a weight {(n, k)} takes {(k,)} or {(n, k)}"
        )
    importance = importance.float()
    if not bool(((importance >= 0) & torch.isfinite(importance)).all()):
        raise FormatError("importance has negative, NaN or infinite entries; it weights squared errors")
    return importance if bool(importance.any()) else None


FORMATS: Registry[Format] = Registry("format", FormatError)


Kind = DType | Format  # storage of a tensor: a number type, or a format


def kind_of(name: str) -> Kind:
    """The name of a number type or a format -> Kind; FormatError for an unknown one, with similar names."""
    return DTYPES.get(name) or FORMATS.get(name)
