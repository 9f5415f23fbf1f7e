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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ..formats.base import Grid
from .inputs import FakeInput

FLOOR = 0.1  # least size of a number, as a share of its row's mean magnitude
LEAST = 1e-12
FAR = 1e30  # beyond the ends of every grid


def size_of(value: torch.Tensor) -> torch.Tensor:
    """The size of each number, at least FLOOR of its row's mean."""
    size = value.detach().abs()
    return size.maximum(FLOOR * size.mean(-1, keepdim=True))


class GridLinear(torch.nn.Module):
    """y = x W^T + bias, `(..., k) -> (..., n)`, with W on a grid: fixed codes, trainable block parameters.

    `block_parameters`: names of `grid.parameters()` -> f32 nn.Parameter of the same shape. `input`,
    `output`: what quantizes x, and y, if it is set.
    """

    def __init__(self, grid: Grid, codes: torch.Tensor, bias: torch.nn.Parameter | None):
        super().__init__()
        self.grid, self.bias = grid, bias
        self.codes = codes
        self.input: FakeInput | None = None
        self.output: FakeInput | None = None
        self.block_parameters = torch.nn.ParameterDict(
            {name: torch.nn.Parameter(value.float().clone()) for name, value in grid.parameters().items()}
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GridLinear:
        """`.to(...)`, `.cuda()`: what is no parameter moves too, and is never cast."""
        super()._apply(fn, recurse)
        self._move(fn(torch.empty(0, device=self.codes.device)).device)
        return self

    def _move(self, device: torch.device) -> None:
        self.grid, self.codes = self.grid.to(device), self.codes.to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.input is None else self.input(x)
        parameters = dict(self.block_parameters)
        y = _Multiply.apply(x, self.grid, self.codes, tuple(parameters), *parameters.values())
        return self._finished(y)

    def _finished(self, y: torch.Tensor) -> torch.Tensor:
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y if self.output is None else self.output(y)


class LatentLinear(GridLinear):
    """The same with codes that are trained too: those to which `latent` `(n, k)` f32 is rounded. A weight
    more than a gap beyond the ends of its grid gets no gradient that would take it farther. gap `(n, k)`: the
    spacing of the grid near each weight. It is rounded at each pass; within `rounded_once` only at the
    first."""

    def __init__(
        self, grid: Grid, latent: torch.Tensor, gap: torch.Tensor, bias: torch.nn.Parameter | None
    ) -> None:
        super().__init__(grid, torch.empty(0, device=latent.device), bias)
        self.latent, self.gap = torch.nn.Parameter(latent), gap
        self.middle, self.reach = _ends(grid, gap)
        self.units: dict[str, torch.Tensor] = {}
        self.keep = False
        self._kept: _Rounded | None = None

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        self.gap, self._kept = self.gap.to(device), None
        self.middle, self.reach = self.middle.to(device), self.reach.to(device)
        self.units = {name: unit.to(device) for name, unit in self.units.items()}

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
        now = dict(self.block_parameters)
        if self.units:
            now = {name: value * self.units[name] for name, value in now.items()}
        return as_stored(self.grid, now)

    def relative(self) -> None:
        """Block parameters become multiples of their size now, so that a loop's one learning rate, which
        suits weights, moves scales by small shares of themselves."""
        for name, value in self.block_parameters.items():
            self.units[name] = size_of(value).clamp(min=LEAST)
            value.data.div_(self.units[name])
        for fake in (self.input, self.output):
            if fake is not None:
                fake.relative()

    @torch.no_grad()
    def rounded(self, kind: torch.dtype) -> _Rounded:
        """The weight that a pass multiplies with, in the type of the product."""
        if self._kept is not None and self._kept.weight.dtype == kind:
            return self._kept
        grid = self.grid_now()
        codes = grid.round(self.latent)
        found = _Rounded(codes, grid.value(codes).to(kind), *self._beyond())
        self._kept = found if self.keep else None
        return found

    def _beyond(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The places of latent weights beyond the ends of their grid, and on which side."""
        (n, k), groups = self.latent.shape, self.middle.shape[1]
        if k == groups * self.grid.group and self.grid.index is None:
            off = self.latent.view(n, groups, -1) - self.middle[:, :, None]
            there = off.abs() > self.reach[:, :, None]
        else:
            off = self.latent - self.grid.spread(self.middle, k)
            there = off.abs() > self.grid.spread(self.reach, k)
        beyond = there.flatten().nonzero()[:, 0]
        return beyond, off.flatten()[beyond].sign()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.input is None else self.input(x)
        parameters = self._stored()
        rounded = self.rounded(product_type(x))
        y = _Trained.apply(x, rounded, self.grid, tuple(parameters), self.latent, *parameters.values())
        return self._finished(y)


@contextmanager
def rounded_once(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within, latent weights do not change: each is rounded once for all passes."""
    trained = [module for module in modules if isinstance(module, LatentLinear)]
    try:
        for module in trained:
            module.keep = True
        yield
    finally:
        for module in trained:
            module.keep, module._kept = False, None


@dataclass(frozen=True)
class _Rounded:
    """A latent weight on its grid: codes; weight `(n, k)` in the type of products; the places (in the
    flattened weight) of latent numbers beyond the ends of their grid, and on which side, +1 or -1."""

    codes: torch.Tensor
    weight: torch.Tensor
    beyond: torch.Tensor
    side: torch.Tensor

    def inward(self, to_w: torch.Tensor) -> torch.Tensor:
        """A gradient `(n, k)`, in place, without the part that would take weights farther beyond."""
        flat = to_w.view(-1)
        there = flat[self.beyond]
        # Descent moves against the gradient: outward where both have different signs.
        flat[self.beyond] = torch.where(there * self.side < 0, 0.0, there)
        return to_w


@torch.no_grad()
def _ends(grid: Grid, gap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The middle of the values of each group `(n, g)`, and the distance from it that is a gap beyond its
    ends: infinite for lattices, where the ends of one weight depend on its neighbours.

    Scales that are trained move by a few percent, and the ends with them, which the gap allows for."""
    counts = grid.sums(torch.ones_like(gap[:1]))
    if grid.vector > 1:
        reach = torch.full((len(gap), counts.shape[1]), torch.inf, device=gap.device)
        return torch.zeros_like(reach), reach
    far = torch.full_like(gap, FAR)
    ends = [grid.sums(grid.value(grid.round(side))) / counts for side in (-far, far)]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    return (low + high) / 2, (high - low) / 2 + grid.sums(gap) / counts


def as_stored(grid: Grid, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Block parameters rounded to the type that a file has them in; their gradient passes through."""
    kind = stored_type(grid)
    return {name: value + (value.to(kind).float() - value).detach() for name, value in parameters.items()}


def stored_type(grid: Grid) -> torch.dtype:
    """Of a grid's block parameters in files."""
    given: torch.dtype = getattr(grid, "dtype", torch.float32)
    return given


class _Multiply(torch.autograd.Function):
    """x W^T in the type of x, or of autocast, with fixed codes. Kept for the backward pass: x, codes and
    block parameters (values, one for each of `names`), but not W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        grid: Grid,
        codes: torch.Tensor,
        names: tuple[str, ...],
        *values: torch.Tensor,
    ) -> torch.Tensor:
        ctx.grid, ctx.names, ctx.came = grid, names, x.dtype
        x = x.to(product_type(x))
        ctx.save_for_backward(x, codes, *values)
        return functional.linear(x, _weight(_replaced(grid, names, values), codes).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, codes, *values = ctx.saved_tensors
        leaves, grid, groups = _leaves(ctx.grid, ctx.names, values, len(codes))
        to_x = None
        if ctx.needs_input_grad[0]:
            with torch.no_grad():
                to_x = (gradient @ _weight(grid, codes).to(gradient.dtype)).to(ctx.came)
        if not values:
            return (to_x, None, None, None)
        to_w = _to_weight(gradient, x)
        return (to_x, None, None, None, *_to_leaves(grid, codes, groups, leaves, to_w))


class _Trained(torch.autograd.Function):
    """The same with the codes of a latent weight, which gets the gradient of the rounded one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        rounded: _Rounded,
        grid: Grid,
        names: tuple[str, ...],
        latent: torch.Tensor,
        *values: torch.Tensor,
    ) -> torch.Tensor:
        ctx.rounded, ctx.grid, ctx.names, ctx.came = rounded, grid, names, x.dtype
        x = x.to(rounded.weight.dtype)
        ctx.save_for_backward(x, *values)
        return functional.linear(x, rounded.weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *values = ctx.saved_tensors
        rounded = ctx.rounded
        to_x = (gradient @ rounded.weight).to(ctx.came) if ctx.needs_input_grad[0] else None
        to_w = _to_weight(gradient, x)
        leaves, grid, groups = _leaves(ctx.grid, ctx.names, values, len(to_w))
        to_leaves = _to_leaves(grid, rounded.codes, groups, leaves, to_w) if leaves else ()
        return (to_x, None, None, None, rounded.inward(to_w), *to_leaves)


def _to_weight(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`(n, k)` f32: the gradient of W in x W^T."""
    rows = gradient.flatten(0, -2)
    return (rows.T @ x.flatten(0, -2).to(rows.dtype)).float()


def _leaves(
    grid: Grid, names: Sequence[str], values: Sequence[torch.Tensor], n: int
) -> tuple[list[torch.Tensor], Grid, list[torch.Tensor]]:
    """Block parameters as leaves of a new graph, the grid that they make, and its groups for n rows."""
    leaves = [value.detach().requires_grad_() for value in values]
    with torch.enable_grad():
        grid = _replaced(grid, names, leaves)
        return leaves, grid, [part for part in grid.groups(n) if part is not None]


def product_type(x: torch.Tensor) -> torch.dtype:
    """In which a matrix product of x is computed: that of autocast where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


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


def _weight(grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    groups = [part for part in grid.groups(codes.shape[0]) if part is not None]
    return _spread(grid, grid.level(codes), *groups) if groups else grid.value(codes)


def _replaced(grid: Grid, names: Sequence[str], values: Sequence[torch.Tensor]) -> Grid:
    return grid.replaced(dict(zip(names, values, strict=True))) if names else grid


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
