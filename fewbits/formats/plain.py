"""Float types as formats, for algorithms that choose values: a pruned weight stays in its float type.

The codes are the values themselves. There is no scale, so nothing is fitted. These formats are not
registered: files store such a weight as a plain tensor (`stored`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dtypes import DType, dtype_of
from ..lazy import torch
from ..qtensor import Plane, QTensor
from .base import Format, Grid, Kind
from .grids import saturate


@dataclass(frozen=True)
class PlainGrid(Grid):
    """value = code: the numbers of a float type. one: `(1, 1)`, the scale of all rows."""

    dtype: torch.dtype
    group: int
    one: torch.Tensor

    def round(self, w: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return saturate(w, self.dtype)

    def value(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return codes.float()

    def level(self, codes: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
        return codes.float()

    def groups(self, n: int) -> tuple[torch.Tensor, None]:
        return self.one.expand(n, 1), None

    def refitted(
        self, scale: torch.Tensor, offset: torch.Tensor | None, weight: torch.Tensor | None = None
    ) -> PlainGrid:
        return self

    def parameters(self) -> dict[str, torch.Tensor]:
        return {}

    def replaced(self, parameters: dict[str, torch.Tensor]) -> PlainGrid:
        return self


@dataclass(frozen=True)
class Plain(Format):
    """f32, f16 or bf16."""

    dtype: torch.dtype

    @staticmethod
    def of(kind: DType) -> Plain:
        return Plain(kind.name, 1, (Plane("values", kind.name),), kind.torch)

    def column_block(self, k: int) -> None:
        """Columns have nothing in common, so there is nothing to do block by block."""

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> PlainGrid:
        return PlainGrid(self.dtype, w.shape[1], torch.ones(1, 1, device=w.device))

    def pack(self, grid: PlainGrid, codes: torch.Tensor) -> QTensor:
        return QTensor(self, (codes.shape[0], codes.shape[1]), {"values": codes})

    def unpack(self, q: QTensor) -> tuple[PlainGrid, torch.Tensor]:
        values = q.planes["values"]
        return self.fit(values), values


def as_format(kind: Kind) -> Format:
    """A format, or the float type as one."""
    return Plain.of(kind) if isinstance(kind, DType) else kind


def stored(q: QTensor) -> QTensor | torch.Tensor:
    """What a file has of a weight: the numbers themselves for a float type."""
    return q.planes["values"] if isinstance(q.format, Plain) else q


def unstored(value: QTensor | torch.Tensor) -> QTensor:
    """The inverse: float numbers `(n, k)` as a QTensor of their type."""
    if isinstance(value, QTensor):
        return value
    return QTensor(Plain.of(dtype_of(value.dtype)), (value.shape[0], value.shape[1]), {"values": value})
