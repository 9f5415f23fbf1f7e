"""Gradients through a grid: exact for its block parameters, straight-through for the rounded weights.

A weight on a grid is value = scale(p) * level(code) + offset(p), smooth in the block parameters p (scales,
offsets) and piecewise constant in the weights that chose the codes. So

    dL/dp     the chain rule with codes fixed: sums over a group of dL/dvalue * level, and of dL/dvalue,
              then from scale and offset to what is stored                                  GridLinear
    dL/dw     that of the identity if w is rounded                        straight_through, LatentLinear

(the straight-through estimator: Bengio et al., arXiv 1308.3432). Neither keeps a dense weight for the
backward pass: it is recomputed from codes (a byte per weight) and parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from ..formats.base import Grid
from ..formats.codebook import LearnedGrid


class GridLinear(torch.nn.Module):
    """y = x W^T + bias, `(..., k) -> (..., n)`, with W on a grid: fixed codes, trainable block parameters.

    `block_parameters`: names of `grid.parameters()` -> f32 nn.Parameter of the same shape.
    """

    def __init__(self, grid: Grid, codes: torch.Tensor, bias: torch.nn.Parameter | None):
        super().__init__()
        self.grid, self.bias = grid, bias
        self.codes = codes
        self.block_parameters = torch.nn.ParameterDict(
            {name: torch.nn.Parameter(value.float().clone()) for name, value in grid.parameters().items()}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parameters = dict(self.block_parameters)
        y = _Multiply.apply(x, self.grid, self.codes, tuple(parameters), *parameters.values())
        return y if self.bias is None else y + self.bias.to(y.dtype)


class LatentLinear(GridLinear):
    """The same with codes that are trained too: those to which `latent` `(n, k)` f32 is rounded at each pass.
    A weight beyond the ends of its grid gets no gradient that would take it farther. gap `(n, k)`: the
    spacing of the grid near each weight."""

    def __init__(
        self, grid: Grid, latent: torch.Tensor, gap: torch.Tensor, bias: torch.nn.Parameter | None
    ) -> None:
        super().__init__(grid, torch.empty(0), bias)
        self.latent, self.gap = torch.nn.Parameter(latent), gap

    @property
    def weight(self) -> torch.Tensor:
        """`(n, k)` f32: what it multiplies with."""
        with torch.no_grad():
            grid = self.grid_now()
            return grid.value(grid.round(self.latent))

    def grid_now(self) -> Grid:
        """The grid of its block parameters, as they are stored."""
        parameters = self._stored()
        return _replaced(self.grid, tuple(parameters), [*parameters.values()])

    def _stored(self) -> dict[str, torch.Tensor]:
        """The block parameters rounded to the type that a file has them in; their gradient passes through."""
        kind = stored_type(self.grid)
        return {
            name: value + (value.to(kind).float() - value).detach()
            for name, value in self.block_parameters.items()
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parameters = self._stored()
        with torch.no_grad():
            codes = self.grid_now().round(self.latent)
        y = _Multiply.apply(
            x, self.grid, codes, tuple(parameters), *parameters.values(), self.latent, self.gap
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)


def stored_type(grid: Grid) -> torch.dtype:
    """Of a grid's block parameters in files: its own, or f16, which GGML blocks and tables have."""
    given = getattr(grid, "dtype", None)
    if isinstance(given, torch.dtype):
        return given
    return torch.float16 if hasattr(grid, "meaning") or isinstance(grid, LearnedGrid) else torch.float32


class _Multiply(torch.autograd.Function):
    """x W^T, keeping x, codes and block parameters for the backward pass, but not W. values: one for each of
    `names`, and the latent weight and its gap, if there is one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        grid: Grid,
        codes: torch.Tensor,
        names: tuple[str, ...],
        *values: torch.Tensor,
    ) -> torch.Tensor:
        ctx.grid, ctx.names = grid, names
        ctx.save_for_backward(x, codes, *values)
        grid = _replaced(grid, names, values[: len(names)])
        return functional.linear(x, _weight(grid, codes))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, codes, *values = ctx.saved_tensors
        latent = values[len(ctx.names) :]
        leaves = [value.detach().requires_grad_() for value in values[: len(ctx.names)]]
        with torch.enable_grad():
            grid = _replaced(ctx.grid, ctx.names, leaves)
            groups = _groups(grid, codes)
        to_x = None
        with torch.no_grad():
            weight = _weight(grid, codes)
        if ctx.needs_input_grad[0]:
            to_x = gradient @ weight.to(gradient.dtype)
        if not values:
            return (to_x, None, None, None)
        rows = gradient.flatten(0, -2)
        to_w = (rows.T @ x.flatten(0, -2).to(rows.dtype)).float()
        to_leaves = _to_leaves(grid, codes, groups, leaves, to_w) if leaves else ()
        to_latent = (_inward(to_w, latent[0] - weight, latent[1]), None) if latent else ()
        return (to_x, None, None, None, *to_leaves, *to_latent)


def _to_leaves(
    grid: Grid,
    codes: torch.Tensor,
    groups: list[torch.Tensor],
    leaves: list[torch.Tensor],
    to_w: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The gradient of the block parameters from that of the weight."""
    if not groups[0].requires_grad:  # the levels themselves are the parameters
        with torch.enable_grad():
            return torch.autograd.grad(grid.value(codes), leaves, to_w)
    sums = [grid.sums(to_w * grid.level(codes).detach())]
    if len(groups) == 2:
        sums.append(grid.sums(to_w))
    return torch.autograd.grad(groups, leaves, sums)


def _inward(to_w: torch.Tensor, off: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """The gradient without the part that would take weights farther beyond the end of the grid."""
    # Descent moves against the gradient: outward where both have different signs.
    return torch.where((off.abs() > gap) & (off * to_w < 0), 0.0, to_w)


def _weight(grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    groups = _groups(grid, codes)
    return _spread(grid, grid.level(codes), *groups) if groups else grid.value(codes)


def _replaced(grid: Grid, names: Sequence[str], values: Sequence[torch.Tensor]) -> Grid:
    return grid.replaced(dict(zip(names, values, strict=True))) if names else grid


def _groups(grid: Grid, codes: torch.Tensor) -> list[torch.Tensor]:
    """Scale and, if there is one, offset: `(n, g)` each."""
    return [part for part in grid.groups(codes.shape[0]) if part is not None]


def _spread(
    grid: Grid, level: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """`(n, k)` levels, `(n, g)` scale and offset -> `(n, k)` values."""
    (n, k), group = level.shape, grid.group
    if grid.index is not None:
        w = level * grid.spread(scale, k)
        return w if offset is None else w + grid.spread(offset, k)
    whole = functional.pad(level, (0, -k % group)) if k % group else level
    w = whole.view(n, -1, group) * scale[..., None]
    return (w if offset is None else w + offset[..., None]).view(n, -1)[:, :k]


def straight_through(grid: Grid, w: torch.Tensor) -> torch.Tensor:
    """`(n, k)` f32 -> the same on the grid. The gradient of w is that of the identity; that of the grid's
    block parameters is exact, if they require one."""
    with torch.no_grad():
        codes = grid.round(w)
    value = grid.value(codes)
    return value + (w - w.detach())
