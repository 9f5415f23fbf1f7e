"""learn_block(): the rounding direction of each weight, learned from the output of the float block.

Rounding to nearest minimizes the error of weights, but the error of the block's output matters. Each weight
gets an offset before it is rounded, each block parameter a factor. Both are trained on the float block's
output:

    w' = round(w + V * gap; p * (1 + a)) on the format's grid      |V| <= 1/2, V = a = 0 at first
    minimize mean (block(x; w') - y)^2        V -= rate * sign(dL/dV)        a -= rate' * sign(dL/da)

gap is the spacing of the grid near a weight: rounding errors are even in +-gap / 2, so a group's root mean
square error times sqrt(12) tells it for any grid, evenly spaced or not. Gradients pass the rounding
straight through (`ste.py`); both rates fall to zero linearly, so that V can just reach either end.

Initial codes that are not the nearest (GPTQ's) get the smallest V that rounds to them and a smaller range, to
keep their balance. On a block of a 163M model in q4_0, the error on new inputs relative to rounding to
nearest was: learned 0.38, GPTQ 0.25, learned from GPTQ's codes 0.22; at the full rate GPTQ's codes did not
improve.

Source: AutoRound, arXiv 2309.05516, sections 3.1-3.3 (signed gradient, clipping ranges as factors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Protocol

import torch

from ..errors import CalibrationError, raise_all
from ..formats.base import Format, Grid
from ..qtensor import QTensor
from .ste import straight_through

REACH = 0.5  # largest offset of a weight before rounding, in gaps
NEAR = 0.1  # the same when starting from codes of error feedback
CHOSEN = 0.01  # least share of codes that are not the nearest, for which NEAR applies


@dataclass(frozen=True)
class RoundingSettings:
    """Duration and range.

    steps: at most, each on `batch` of the inputs. travel: the total range of V in gaps; None: REACH, or NEAR
    from given codes. scale_travel: the range of the factors, as a part of that. checks: how often, evenly
    spread, the error on all inputs is measured; patience: the number of checks without improvement that ends
    training. V fluctuates while steps are large and the best comes late, so a small patience ends good
    runs. keep_zeros: weights that are 0 at the start, as pruned ones are, stay 0."""

    steps: int = 200
    travel: float | None = None
    scale_travel: float = 0.05
    batch: int = 1
    checks: int = 10
    patience: int = 6
    seed: int = 0
    keep_zeros: bool = False

    def __post_init__(self) -> None:
        named = ("steps", "batch", "checks", "patience")
        faults = [f"{name} is {getattr(self, name)}; at least 1" for name in named if getattr(self, name) < 1]
        raise_all(CalibrationError, "learned rounding", faults)


EFFORTS = {"light": RoundingSettings(steps=50, checks=5, patience=3), "best": RoundingSettings()}


class Runs(Protocol):
    """A block's output for other weights, differentiable in them."""

    def __call__(
        self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor: ...


def learn_block(
    block: Runs,
    weights: Mapping[str, torch.Tensor],
    formats: Mapping[str, Format],
    start: Mapping[str, QTensor],
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    settings: RoundingSettings | None = None,
) -> dict[str, QTensor]:
    """Weights `(n, k)` of a block, hidden states in and out `(b, t, h)` -> a QTensor for each of `formats`.

    start: the initial codes; other weights are rounded to nearest. On the given inputs the packed result is
    never worse than the start. Raises CalibrationError, naming the block, if inputs and targets do not match
    or an error is not finite."""
    settings = settings or EFFORTS["best"]
    where = getattr(block, "name", "block")
    if not inputs or len(inputs) != len(targets):
        raise CalibrationError(f"{where}: {len(inputs)} inputs and {len(targets)} targets; 1 each at least")
    device = getattr(block, "device", torch.device("cpu"))
    there = {name: weights[name].to(device, torch.float32) for name in formats}
    roundings = {
        name: LearnedRounding(w, start[name].to(device) if name in start else formats[name].encode(w))
        for name, w in there.items()
    }
    if settings.keep_zeros:
        for rounding in roundings.values():
            rounding.hold_zeros()
    descent = _Descent(block, roundings, inputs, targets, settings, where)
    descent.go()
    return descent.best


class LearnedRounding:
    """The training state of one weight, on its device: V and the factors of its block parameters."""

    def __init__(self, w: torch.Tensor, q: QTensor):
        self.w, self.start = w, q
        self.grid, codes = q.format.unpack(q)
        self.gap = gap_of(self.grid, w)
        self.v = _first(self.grid, w, codes, self.gap)
        self.travel = NEAR if float((self.v != 0).float().mean()) > CHOSEN else REACH
        self.low, self.high = self.v.clamp(max=-REACH), self.v.clamp(min=REACH)
        self.parameters = self.grid.parameters()
        self.factors = {name: torch.zeros_like(value) for name, value in self.parameters.items()}

    def hold_zeros(self) -> None:
        """Weights that are 0 stay 0: their offset cannot leave it."""
        zero = self.start.decode() == 0
        self.w, self.v, self.low, self.high = (
            part.masked_fill(zero, 0.0) for part in (self.w, self.v, self.low, self.high)
        )

    def leaves(self) -> list[torch.Tensor]:
        """V, then the factors, in the order of `step`."""
        return [self.v, *self.factors.values()]

    def weight(self) -> torch.Tensor:
        """-> `(n, k)` f32 on the grid, differentiable in `leaves`."""
        return straight_through(self._grid(), self.w + self.v * self.gap)

    def step(self, gradients: Sequence[torch.Tensor], share: float, settings: RoundingSettings) -> None:
        """Move `leaves` against the sign of their gradients by `share` of the whole range."""
        far = share * (self.travel if settings.travel is None else settings.travel)
        with torch.no_grad():
            self.v.sub_(far * gradients[0].sign()).clamp_(self.low, self.high)
            for factor, gradient in zip(self.factors.values(), gradients[1:], strict=True):
                factor.sub_(far * settings.scale_travel * gradient.sign())

    def pack(self) -> QTensor:
        with torch.no_grad():
            grid = self._grid()
            return self.start.format.pack(grid, grid.round(self.w + self.v * self.gap))

    def _grid(self) -> Grid:
        if not self.factors:
            return self.grid
        return self.grid.replaced({name: p * (1 + self.factors[name]) for name, p in self.parameters.items()})


def gap_of(grid: Grid, w: torch.Tensor) -> torch.Tensor:
    """`(n, k)` -> `(n, k)`: the spacing of representable values, constant in a group."""
    error = (w - grid.value(grid.round(w))).square()
    mean = grid.sums(error) / grid.sums(torch.ones_like(w[:1]))
    return sqrt(12) * grid.spread(mean.sqrt(), w.shape[1])


def spacing_of(grid: Grid, w: torch.Tensor) -> torch.Tensor:
    """`gap_of` for weights that may lie on the grid already, where they say nothing of its spacing: values
    between neighbours do."""
    between = 0.618 * w + 0.382 * w.roll(1, dims=1)
    return torch.maximum(gap_of(grid, w), gap_of(grid, between))


def _first(grid: Grid, w: torch.Tensor, codes: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """The smallest V, of a few tried, that rounds to `codes`; 0 for codes that are the nearest."""
    value = grid.value(codes)
    full = torch.where(gap > 0, (value - w) / gap, 0.0)
    v = torch.zeros_like(w)
    for share in (0.25, 0.5, 0.75, 1.0):
        off = grid.value(grid.round(w + v * gap)) != value
        v = torch.where(off, share * full, v)
    return v


class _Descent:
    def __init__(
        self,
        block: Runs,
        roundings: Mapping[str, LearnedRounding],
        inputs: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        settings: RoundingSettings,
        where: str,
    ):
        self.block, self.roundings, self.inputs, self.targets = block, roundings, inputs, targets
        self.settings, self.where = settings, where
        self.best = {name: rounding.start for name, rounding in roundings.items()}
        self.error = self.measure(self.best)

    def go(self) -> None:
        settings, worse = self.settings, 0
        every = max(1, settings.steps // settings.checks)
        for step in range(settings.steps):
            self.advance(step)
            if (step + 1) % every and step + 1 < settings.steps:
                continue
            packed = {name: rounding.pack() for name, rounding in self.roundings.items()}
            error = self.measure(packed)
            if error < self.error:
                self.best, self.error, worse = packed, error, 0
            else:
                worse += 1
            if worse == settings.patience:
                return

    def advance(self, step: int) -> None:
        """One step of signed gradient descent."""
        settings, n = self.settings, self.settings.steps
        leaves = [leaf.requires_grad_() for rounding in self.roundings.values() for leaf in rounding.leaves()]
        total = [torch.zeros_like(leaf) for leaf in leaves]
        for i in windows_of(step, self.settings.batch, len(self.inputs), self.settings.seed):
            moved = {name: rounding.weight() for name, rounding in self.roundings.items()}
            loss = self.loss(i, moved)
            for sum_, gradient in zip(total, torch.autograd.grad(loss, leaves), strict=True):
                sum_ += gradient
        for leaf in leaves:
            leaf.requires_grad_(False)
        rest = iter(total)
        for rounding in self.roundings.values():
            gradients = [next(rest) for _ in rounding.leaves()]
            rounding.step(gradients, 2 * (settings.steps - step) / (n * (n + 1)), settings)

    def loss(self, i: int, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The mean squared error of the block's output on input i; it must be finite."""
        output, target = self.block(self.inputs[i], weights).float(), self.targets[i]
        error = (output - target.to(output.device, output.dtype)).square().mean()
        if not isfinite(float(error.detach())):
            raise CalibrationError(
                f"{self.where}: the output's error on input {i} of {len(self.inputs)} is {float(error)}; its "
                "weights or inputs are not finite"
            )
        return error

    def measure(self, packed: Mapping[str, QTensor]) -> float:
        """The mean squared error of the block's output over all inputs."""
        weights = {name: q.decode() for name, q in packed.items()}
        with torch.no_grad():
            errors = [float(self.loss(i, weights)) for i in range(len(self.inputs))]
        return sum(errors) / len(errors)


def windows_of(step: int, batch: int, n: int, seed: int) -> list[int]:
    """The windows, or inputs, of a step: each of n once in a pass, each pass shuffled by its own seed."""
    places = range(step * batch, (step + 1) * batch)
    return [shuffled(n, seed, place // n)[place % n] for place in places]


def shuffled(n: int, seed: int, turn: int) -> list[int]:
    """0 ... n - 1 in the order of one pass; the same for the same seed and pass."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
    return torch.randperm(n, generator=generator).tolist()
