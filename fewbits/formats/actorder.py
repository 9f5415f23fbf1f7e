"""Act order: columns are put into groups by their importance, not by their position.

    int{bits}_g{columns}[_asym]_actorder[_f16 | _bf16 | _f32]

    int4_g128_actorder        int4_g128, but a group may consist of any 128 columns
    int4_g128_asym_actorder   int4_g128_asym, likewise

    w[i, j] = scale[i, g_idx[j]] * (code[i, j] - zero[i, g_idx[j]])

    codes, scale, zero    as in the format in order; codes stay at the position of their column
    g_idx    i32 (1, k)   the group of each column, the same for all rows

Columns are sorted by falling importance and cut into groups, so the most important columns share scales
with one another. Error feedback takes columns in the same order and fits the scale of a group when it
reaches it (see algorithms/gptq.py). The group of a column depends on the input alone, so weights with the
same input (q, k and v) have the same g_idx: vLLM fuses them into one matrix and keeps a single g_idx.
Without importance, columns stay in order, and g_idx is j // group. Other tools may write any g_idx, with
groups of different sizes and even empty groups.

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
    """plain: the format with the same groups whose columns are in order."""

    plain: Affine

    @property
    def ordered(self) -> Affine:
        return self.plain

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> AffineGrid:
        order, importance = self.order(w, importance)
        grid = self.plain.fit(w[:, order], importance, search)
        return replace(grid, index=self.index(order).long())

    def encode(self, w: torch.Tensor, importance: torch.Tensor | None = None, search: bool = True) -> QTensor:
        """`(n, k)` float -> QTensor. The order is fixed first, then rows are independent."""
        self.check_matrix(w)
        order, importance = self.order(w, importance)
        if importance is None:
            return self.with_index(self.plain.encode(w, None, search), self.index(order))
        return self.arranged(self.plain.encode(w[:, order], importance, search), order)

    def order(
        self, w: torch.Tensor, importance: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """-> columns `(k,)` by falling importance (a stable sort), and the importance in that order."""
        importance = checked_importance(importance, *w.shape)
        if importance is None:
            return torch.arange(w.shape[1], device=w.device), None
        counts = importance if importance.ndim == 1 else importance.sum(0)
        order = counts.argsort(descending=True, stable=True)
        return order, importance[..., order]

    def index(self, order: torch.Tensor) -> torch.Tensor:
        """The order of columns `(k,)` in which they are cut into groups -> the group of each column."""
        groups = torch.arange(len(order), dtype=torch.int32, device=order.device) // self.columns
        return groups[order.argsort()]

    @property
    def columns(self) -> int:
        """The number of columns of a group."""
        assert self.plain.cells.columns is not None
        return self.plain.cells.columns

    def arranged(self, q: QTensor, order: torch.Tensor) -> QTensor:
        grid, codes = self.plain.unpack(q)
        grid = replace(grid, index=self.index(order).long())
        return self.pack(grid, codes[:, order.argsort()])

    def pack(self, grid: AffineGrid, codes: torch.Tensor) -> QTensor:
        assert grid.index is not None
        return self.with_index(self.plain.pack(grid, codes), grid.index)

    def unpack(self, q: QTensor) -> tuple[AffineGrid, torch.Tensor]:
        plain, index = self.without_index(q)
        grid, codes = self.plain.unpack(plain)
        return replace(grid, index=index.long()), codes

    def with_index(self, q: QTensor, index: torch.Tensor) -> QTensor:
        """A weight in `plain` and the group of each column `(k,)` -> the same weight in this format."""
        g_idx = index.to(torch.int32).reshape(1, -1)
        return QTensor(self, q.shape, {**q.planes, INDEX: g_idx})

    def without_index(self, q: QTensor) -> tuple[QTensor, torch.Tensor]:
        """The inverse of `with_index`. The weight in `plain` has the same values only if columns are
        `in_order`. FormatError if an index is no group."""
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
        """Is the group of every column `(k,)` the one that it has in `plain`?"""
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
