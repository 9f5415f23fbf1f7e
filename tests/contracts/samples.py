"""Weights, codes and errors on which the contracts of formats and grids are tried."""

from math import lcm

import torch

from fewbits.formats.base import Format, Grid
from fewbits.formats.codebook import LearnedGrid
from fewbits.formats.grids import AffineGrid, TableGrid
from fewbits.formats.levels import LevelGrid
from fewbits.qtensor import QTensor

ROWS = 5


def columns_of(format: Format) -> int:
    """A row length of several blocks, and of several groups of 32, 64 and 128."""
    return lcm(format.block, 256)


def weights(seed: int, n: int, k: int) -> torch.Tensor:
    """`(n, k)` of the size and shape that weights have: rows of different spread, a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * torch.logspace(-2, -1, n)[:, None]
    return w * torch.where(torch.rand(n, k, generator=generator) < 0.01, 4.0, 1.0)


def sample(format: Format, seed: int = 0) -> torch.Tensor:
    return weights(seed, ROWS, columns_of(format))


def uneven(k: int) -> torch.Tensor:
    """`(k,)`: an importance in no order, by which a format may put columns into groups."""
    return torch.rand(k, generator=torch.Generator().manual_seed(2))


def rounding_codes(grid: Grid) -> torch.Tensor | None:
    """The codes that rounding may give, `(L,)`; None if they are too many to list."""
    grid = getattr(grid, "meaning", grid)
    if isinstance(grid, AffineGrid):
        return torch.arange(grid.top + 1, dtype=torch.uint8)
    if isinstance(grid, TableGrid):
        return grid.codes
    if isinstance(grid, LevelGrid):
        return grid.levels.codes
    if isinstance(grid, LearnedGrid):
        return torch.arange(grid.table.shape[1], dtype=torch.uint8)
    return None


def every_code(grid: Grid, n: int, k: int) -> torch.Tensor:
    """`(n, k)` codes among which each that can be stored occurs."""
    generator = torch.Generator().manual_seed(0)
    if grid.vector > 1:  # any bytes are codes
        format = grid.format
        blocks = torch.randint(0, 256, (n, format.nbytes(1, k)), generator=generator, dtype=torch.uint8)
        return format.unpack(QTensor(format, (n, k), {"blocks": blocks}))[1]
    inner = getattr(grid, "meaning", grid)
    codes = torch.arange(len(inner.levels.values)) if isinstance(inner, LevelGrid) else rounding_codes(inner)
    return (
        codes.to(torch.uint8)
        .repeat(-(-n * k // len(codes)))[torch.randperm(n * k, generator=generator)]
        .reshape(n, k)
    )


def error(w: torch.Tensor, decoded: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    """Sum of (weighted) squared errors."""
    square = (w.double() - decoded.double()).square()
    return float((square if importance is None else square * importance).sum())


def same_planes(format: Format, a, b) -> bool:
    return all(torch.equal(a.planes[plane.name], b.planes[plane.name]) for plane in format.planes)


def closed_form(
    w: torch.Tensor, grid: Grid, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The least-squares scale and offset of each group for these codes, and the cost of scale errors."""
    x, v, scale = w.double(), grid.level(codes).double(), grid.groups(ROWS)[0]
    index = grid.group_of(torch.arange(w.shape[1]))

    def total(part: torch.Tensor) -> torch.Tensor:
        return torch.zeros(scale.shape, dtype=torch.float64).index_add_(1, index, part)

    xv, vv = total(x * v), total(v * v)
    if grid.groups(ROWS)[1] is None:
        return torch.where(vv > 0, xv / vv, scale).float(), None, vv.float()
    count, sx, sv = total(torch.ones_like(x)), total(x), total(v)
    vv, xv = vv - sv * sv / count, xv - sx * sv / count
    slope = torch.where(vv > 0, xv / vv, scale)
    return slope.float(), ((sx - slope * sv) / count).float(), vv.float()
