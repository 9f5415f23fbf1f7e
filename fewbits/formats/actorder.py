"""Act order: columns belong to groups by how much they count, and not by where they lie.

    int{bits}_g{columns}[_asym]_actorder[_f16 | _bf16 | _f32]

    int4_g128_actorder        int4_g128 whose groups are of any columns
    int4_g128_asym_actorder   the same of int4_g128_asym

    w[i, j] = scale[i, g_idx[j]] * (code[i, j] - zero[i, g_idx[j]])

    codes, scale, zero    as the format in order has them, the codes where their columns are
    g_idx    i32 (1, k)   the group of each column, the same for all rows

Columns sorted by falling importance are cut into groups: those that matter most share scales with one
another, and error feedback, which takes columns in that order, fits a scale when it comes to its group
(see algorithms/gptq.py). Which group a column is in depends on the input alone, so that weights with one
input (q, k and v) have one g_idx: vLLM, which makes one matrix of them, keeps only one. Without importance
columns stay in order, and all is as in the format in order. A g_idx of another tool may be any: groups
of different sizes, or none of their columns.

AutoGPTQ and GPTQModel call it desc_act, compressed-tensors actorder "group".
Source: the option --act-order of the code of GPTQ (arXiv 2210.17323); GPTQModel 7.7, quantization/gptq.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..errors import FormatError
from ..lazy import torch
from ..qtensor import Plane, QTensor
from .affine import Affine
from .affine import parse as parse_affine
from .base import FORMATS, Format, checked_importance
from .grids import AffineGrid

SUFFIX = "_actorder"
INDEX = "g_idx"


@dataclass(frozen=True)
class ActOrder(Format):
    """plain: the format of the same groups, of columns in order."""

    plain: Affine

    @property
    def ordered(self) -> Affine:
        return self.plain

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> AffineGrid:
        order, importance = self.order(w, importance)
        grid = self.plain.fit(w[:, order], importance, search)
        return replace(grid, index=self.index(order).long())

    def encode(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> QTensor:
        """Rows stand alone once the order is known."""
        self.check_matrix(w)
        order, importance = self.order(w, importance)
        if importance is None:
            return self.joined(self.plain.encode(w, None, search), self.index(order))
        return self.arranged(self.plain.encode(w[:, order], importance, search), order)

    def order(
        self, w: torch.Tensor, importance: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """-> columns `(k,)` by falling importance, of equals the first, and the importance so sorted."""
        importance = checked_importance(importance, *w.shape)
        if importance is None:
            return torch.arange(w.shape[1], device=w.device), None
        counts = importance if importance.ndim == 1 else importance.sum(0)
        order = counts.argsort(descending=True, stable=True)
        return order, importance[..., order]

    def index(self, order: torch.Tensor) -> torch.Tensor:
        """Columns as they are cut into groups `(k,)` -> the group of each."""
        groups = torch.arange(len(order), dtype=torch.int32, device=order.device) // self.columns
        return groups[order.argsort()]

    @property
    def columns(self) -> int:
        """Of a group."""
        assert self.plain.cells.columns is not None
        return self.plain.cells.columns

    def arranged(self, q: QTensor, order: torch.Tensor) -> QTensor:
        grid, codes = self.plain.unpack(q)
        grid = replace(grid, index=self.index(order).long())
        return self.pack(grid, codes[:, order.argsort()])

    def pack(self, grid: AffineGrid, codes: torch.Tensor) -> QTensor:
        assert grid.index is not None
        return self.joined(self.plain.pack(grid, codes), grid.index)

    def unpack(self, q: QTensor) -> tuple[AffineGrid, torch.Tensor]:
        plain, index = self.parted(q)
        grid, codes = self.plain.unpack(plain)
        return replace(grid, index=index.long()), codes

    def joined(self, q: QTensor, index: torch.Tensor) -> QTensor:
        """Codes, scales and zeros as a weight in `plain`, and the group of each column `(k,)` -> ours."""
        g_idx = index.to(torch.int32).reshape(1, -1)
        return QTensor(self, q.shape, {**q.planes, INDEX: g_idx})

    def parted(self, q: QTensor) -> tuple[QTensor, torch.Tensor]:
        """The inverse of `joined`. What it gives decodes rightly only where columns are `in_order`."""
        index = q.planes[INDEX][0]
        low, high = (int(edge) for edge in torch.aminmax(index))
        groups = -(-q.shape[1] // self.columns)
        if low < 0 or high >= groups:
            raise FormatError(
                f"{self.name} {q.shape}: {INDEX} names group {high if high >= groups else low}, there are "
                f"{groups}; it is damaged: quantize the float model again"
            )
        return QTensor(self.plain, q.shape, {n: p for n, p in q.planes.items() if n != INDEX}), index

    def in_order(self, index: torch.Tensor) -> bool:
        """Do columns `(k,)` belong to the groups that they would be in without an index?"""
        return torch.equal(index.long(), torch.arange(len(index), device=index.device) // self.columns)


GRAMMAR = re.compile(rf"(?P<head>int[2-8]_g[1-9]\d{{0,5}}(?:_asym)?){SUFFIX}(?P<dtype>_(?:f16|bf16|f32))?")


def parse(name: str) -> ActOrder | None:
    """A name of the grammar -> the format under its canonical name; None for any other name."""
    match = GRAMMAR.fullmatch(name)
    if match is None:
        return None
    dtype = "" if match["dtype"] in (None, "_f16") else match["dtype"]
    plain = parse_affine(match["head"] + dtype)
    assert plain is not None
    planes = (*plain.planes, Plane(INDEX, "int32", rows=None))
    return ActOrder(f"{match['head']}{SUFFIX}{dtype}", 1, planes, plain)


FORMATS.add_parser(parse)
for _name in ("int4_g32_actorder", "int4_g128_actorder", "int4_g128_asym_actorder"):
    FORMATS.add(_name, FORMATS.get(_name))
