"""QTensor: the quantized weight that formats, algorithms, files and kernels exchange.

A weight `(n, k)` = (out, in) in some format consists of a few arrays, its *planes*: packed codes,
scales, zero points, codebooks. A `Plane` describes one of them; shapes, bytes, bits per weight,
validation and the names on disk are all derived from these descriptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod
from typing import TYPE_CHECKING

from .dtypes import DTYPES
from .errors import FormatError, raise_all
from .lazy import torch

if TYPE_CHECKING:
    from .formats.base import Format


@dataclass(frozen=True)
class Plane:
    """One array of a format.

    type: a name of DTYPES: "u8", "f16".
    The weight `(n, k)` is cut into cells of `rows` x `columns`; each cell owns `entries` numbers
    of that type, laid along the last axis:

        shape = (ceil(n / rows), ceil(k / columns) * entries)         None = all rows / all columns

    int4 codes two to a byte: columns=2. f16 scale of a group of 128: columns=128. The 144 bytes
    of a Q4_K block: columns=256, entries=144. With `flat`, cells of that many weights are cut
    from the flattened tensor instead, and the shape is one-dimensional.
    """

    name: str
    type: str
    rows: int | None = 1
    columns: int | None = 1
    entries: int = 1
    flat: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.type].torch

    def shape(self, n: int, k: int) -> tuple[int, ...]:
        if self.flat is not None:
            return (ceil(n * k / self.flat) * self.entries,)
        down = 1 if self.rows is None else ceil(n / self.rows)
        across = 1 if self.columns is None else ceil(k / self.columns)
        return (down, across * self.entries)

    def nbytes(self, n: int, k: int) -> int:
        return prod(self.shape(n, k)) * DTYPES[self.type].itemsize

    def empty(self, n: int, k: int) -> torch.Tensor:
        return torch.empty(self.shape(n, k), dtype=self.dtype)


@dataclass(frozen=True)
class QTensor:
    """A quantized weight: a format, the `(n, k)` shape of the weight, and its planes."""

    format: Format
    shape: tuple[int, int]
    planes: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        n, k = self.shape
        faults = []
        for plane in self.format.planes:
            if plane.name not in self.planes:
                faults.append(f"plane {plane.name!r} is missing")
                continue
            got = self.planes[plane.name]
            if tuple(got.shape) != plane.shape(n, k) or got.dtype != plane.dtype:
                faults.append(
                    f"plane {plane.name!r} is {tuple(got.shape)} {got.dtype}, "
                    f"{self.format.name} {self.shape} needs {plane.shape(n, k)} {plane.dtype}"
                )
        extra = set(self.planes) - {plane.name for plane in self.format.planes}
        faults += [f"plane {name!r} is not one of {self.format.name}" for name in sorted(extra)]
        raise_all(FormatError, f"{self.format.name} tensor {self.shape}", faults)

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes.values())

    @property
    def bits_per_weight(self) -> Fraction:
        return Fraction(8 * self.nbytes, self.shape[0] * self.shape[1])

    def decode(self) -> torch.Tensor:
        """-> `(n, k)` f32."""
        return self.format.decode(self)

    def to(self, device: str | torch.device) -> QTensor:
        """The same with its planes on a device."""
        planes = {name: plane.to(device) for name, plane in self.planes.items()}
        return QTensor(self.format, self.shape, planes)

    def take_rows(self, order: torch.Tensor | slice) -> QTensor:
        """The same weight with reordered rows; exact, because no plane mixes rows. A slice shares memory.

        Raises FormatError for a format whose planes span several rows (128x128 blocks, nested
        scales): their rows cannot move without quantizing again.
        """
        n = len(range(self.shape[0])[order]) if isinstance(order, slice) else order.numel()
        moved = {}
        for plane in self.format.planes:
            value = self.planes[plane.name]
            if plane.flat is not None or plane.rows not in (1, None):
                raise FormatError(
                    f"{self.format.name}: plane {plane.name!r} spans several rows, so rows cannot be "
                    "reordered exactly; use a format whose planes belong to one row"
                )
            moved[plane.name] = value if plane.rows is None else value[order]
        return QTensor(self.format, (n, self.shape[1]), moved)

    @staticmethod
    def join_rows(parts: Sequence[QTensor]) -> QTensor:
        """Weights `(n_i, k)` of one format, one below another -> `(sum of n_i, k)`. Planes are concatenated,
        so this is exact. Raises FormatError if a cell spans several rows, or what all rows share differs."""
        if len(parts) == 1:
            return parts[0]
        format, k = parts[0].format, parts[0].shape[1]
        faults = [
            f"part {i} is {part.format.name} of {part.shape[1]} columns, part 0 {format.name} of {k}"
            for i, part in enumerate(parts)
            if (part.format, part.shape[1]) != (format, k)
        ]
        faults += [
            f"plane {plane.name!r} has cells of several rows"
            for plane in format.planes
            if plane.flat is not None or plane.rows not in (1, None)
        ]
        shared = [plane.name for plane in format.planes if plane.rows is None and not faults]
        faults += [
            f"plane {name!r} of part {i} differs from part 0"
            for name in shared
            for i, part in enumerate(parts)
            if not torch.equal(part.planes[name], parts[0].planes[name])
        ]
        raise_all(FormatError, f"{format.name}: parts cannot be joined; quantize the whole weight", faults)
        planes = {
            plane.name: torch.cat([part.planes[plane.name] for part in parts[: None if plane.rows else 1]])
            for plane in format.planes
        }
        return QTensor(format, (sum(part.shape[0] for part in parts), k), planes)

    def decode_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """`(m,)` int -> `(m, k)` f32: some rows. All are decoded for them where a cell spans several."""
        if self.format.rows_movable:
            return self.take_rows(rows).decode()
        return self.decode()[rows]

    @staticmethod
    def join_columns(parts: Sequence[QTensor]) -> QTensor:
        """Weights `(n, k_i)` of one format side by side -> `(n, sum of k_i)`. The planes are concatenated, so
        this is exact. Raises FormatError if a cell of a plane would span two parts."""
        format, n = parts[0].format, parts[0].shape[0]
        k = sum(part.shape[1] for part in parts)
        faults = [
            f"part {i} is {part.format.name} of {part.shape[0]} rows, part 0 {format.name} of {n}"
            for i, part in enumerate(parts)
            if (part.format, part.shape[0]) != (format, n)
        ]
        for plane in format.planes:
            if plane.flat is not None or plane.rows != 1 or plane.columns is None:
                faults.append(f"plane {plane.name!r} has cells of several rows or of whole rows")
                continue
            faults += [
                f"part {i} has {part.shape[1]} columns, plane {plane.name!r} cells of {plane.columns}"
                for i, part in enumerate(parts[:-1])
                if part.shape[1] % plane.columns
            ]
        raise_all(FormatError, f"{format.name}: parts cannot be joined; quantize the whole weight", faults)
        planes = {
            plane.name: torch.cat([part.planes[plane.name] for part in parts], 1) for plane in format.planes
        }
        return QTensor(format, (n, k), planes)
