"""learn_block(): the codes and scales of a block, trained on the output of the float block.

Error feedback makes up for one weight matrix at a time; what matters is the error of the block's output, with
what the errors of earlier blocks in its input do to it. Each weight becomes a latent float that every pass
rounds, and is trained together with the block parameters:

    w' = round(v; p) on the format's grid    v starts at the code that it is given (`latent_of`), p as it is
    minimize mean (block(x; w') - y)^2       by AdamW, v in spacings of the grid, p in units of its size

Gradients pass the rounding straight through (`ste.py`). Some of the inputs are not trained on; the packed
result has less error on them, or the start is returned.

From codes that are the nearest, steps must be large enough to reach others; from codes of error feedback,
small errors need small steps. On blocks of the demo model GPTQ's error, relative to what the block adds to
its input, of 0.07 and 0.12 (q4_0, q2_k) falls with steps of 0.004 to 0.008 spacings and rises with 0.02; one
of 0.69 (int2_g64) falls by 4 % with 0.008, 7 % with 0.02 and 9 % with 0.04. So lr_codes follows the error.

Sources: Block-AP of EfficientQAT, arXiv 2407.11062, section 3.2; before it AutoRound, arXiv 2309.05516, which
learns a bounded offset of each weight by signed gradients: in int2_g64 twice the time for half of the gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, cos, isfinite, pi, sqrt
from typing import Protocol

import torch

from ..errors import CalibrationError, raise_all
from ..formats.base import Format, Grid
from ..qtensor import QTensor
from .optimizer import TINY, optimizer_of
from .ste import as_stored, size_of, straight_through

START = 0.6  # of the way from its code's value to the float weight, half a gap at most: where a latent starts
HELD_OUT = 8  # one of so many inputs judges
PER_ERROR, LIMITS = 0.06, (0.006, 0.03)  # lr_codes by the error relative to what the block adds
SCALES = 2e-3  # lr from codes that an algorithm has chosen
FROM_NEAREST = (0.02, 3e-4)  # lr_codes and lr from codes that are the nearest
CHOSEN = 0.01  # least share of codes that are not, where an algorithm has chosen them


@dataclass(frozen=True)
class RoundingSettings:
    """Duration and learning rates.

    steps: on `batch` of the inputs each, and at least `passes` over those trained on. lr_codes: of the latent
    weights, in spacings of the grid; lr: the largest relative change of a block parameter in one step; None:
    by the start. Both rise over a tenth of the steps and fall to 0 on a cosine. keep_zeros: weights
    that are 0 at the start, as pruned ones are, stay 0."""

    steps: int = 200
    passes: float = 2
    lr_codes: float | None = None
    lr: float | None = None
    batch: int = 1
    seed: int = 0
    keep_zeros: bool = False

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)}; at least 1"
            for name in ("steps", "batch")
            if getattr(self, name) < 1
        ]
        faults += [
            f"{name} is {getattr(self, name)}; 0 or more"
            for name in ("passes", "lr_codes", "lr")
            if (getattr(self, name) or 0) < 0
        ]
        raise_all(CalibrationError, "learned rounding", faults)

    def steps_for(self, inputs: int) -> int:
        """The number of steps for so many inputs to train on."""
        return max(self.steps, ceil(self.passes * inputs / self.batch))


EFFORTS = {"light": RoundingSettings(steps=50, passes=1), "best": RoundingSettings()}


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

    start: the initial codes; other weights are rounded to nearest. The last of the inputs judge (all of them
    where there are few): on these the packed result is never worse than the start. Raises CalibrationError,
    naming the block, if inputs and targets do not match or an error is not finite."""
    settings = settings or EFFORTS["best"]
    where = getattr(block, "name", "block")
    if not inputs or len(inputs) != len(targets):
        raise CalibrationError(f"{where}: {len(inputs)} inputs and {len(targets)} targets; 1 each at least")
    if not formats:
        return {}
    device = getattr(block, "device", torch.device("cpu"))
    there = {name: weights[name].to(device, torch.float32) for name in formats}
    learned = {
        name: LearnedWeight(w, start[name].to(device) if name in start else formats[name].encode(w))
        for name, w in there.items()
    }
    if settings.keep_zeros:
        for weight in learned.values():
            weight.hold_zeros()
    return _Descent(block, learned, inputs, targets, settings, where).found()


class LearnedWeight:
    """The training state of one weight, on its device. `moved` and `factors` are what is trained: the way of
    each latent weight in spacings of the grid, of each block parameter in units of its size."""

    def __init__(self, w: torch.Tensor, q: QTensor):
        self.start = q
        self.grid, codes = q.format.unpack(q)
        self.latent, self.gap = latent_of(self.grid, codes, w), spacing_of(self.grid, w)
        near = self.grid.round(w) == codes
        self.nearest = float(near.float().mean()) > 1 - CHOSEN
        if self.nearest:
            self.latent = torch.where(near, w, self.latent)
        self.parameters = self.grid.parameters()
        self.sizes = {name: size_of(value) for name, value in self.parameters.items()}
        self.moved = torch.nn.Parameter(torch.zeros_like(w))
        self.factors = {name: torch.nn.Parameter(torch.zeros_like(size)) for name, size in self.sizes.items()}

    def hold_zeros(self) -> None:
        """Weights that are 0 stay 0: they cannot move."""
        zero = self.start.decode() == 0
        self.latent, self.gap = self.latent.masked_fill(zero, 0.0), self.gap.masked_fill(zero, 0.0)

    def weight(self) -> torch.Tensor:
        """-> `(n, k)` f32 on the grid, differentiable in what is trained."""
        return straight_through(self._grid(), self.latent + self.moved * self.gap)

    @torch.no_grad()
    def pack(self) -> QTensor:
        fmt = self.start.format
        _, codes = fmt.unpack(self.start)
        return packed(fmt, self._grid(), codes, self.latent + self.moved * self.gap)

    def _grid(self) -> Grid:
        if not self.factors:
            return self.grid
        now = {name: value + self.sizes[name] * self.factors[name] for name, value in self.parameters.items()}
        return self.grid.replaced(as_stored(self.grid, now))


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


def latent_of(grid: Grid, codes: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`(n, k)` f32: the float weight, moved so far that it is rounded to `codes`."""
    value, reach = grid.value(codes), gap_of(grid, w) / 2
    # Away from the edge, where error feedback has pushed many: else noise takes them back to the nearest.
    latent = value + START * torch.minimum(torch.maximum(w - value, -reach), reach)
    return torch.where(grid.round(latent) == codes, latent, value)


def packed(fmt: Format, grid: Grid, codes: torch.Tensor, latent: torch.Tensor) -> QTensor:
    """Latent weights `(n, k)` on this grid as a file has it: its parameters are rounded first. codes: any."""
    stored, _ = fmt.unpack(fmt.pack(grid, codes))
    return fmt.pack(stored, stored.round(latent))


class _Descent:
    def __init__(
        self,
        block: Runs,
        learned: Mapping[str, LearnedWeight],
        inputs: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
        settings: RoundingSettings,
        where: str,
    ):
        self.block, self.learned, self.inputs, self.targets = block, learned, inputs, targets
        self.settings, self.where = settings, where
        n = len(inputs)
        held_out = ceil(n / HELD_OUT) if n > HELD_OUT // 2 else 0
        self.train = n - held_out
        self.judges = range(self.train if held_out else 0, n)
        self.start = {name: weight.start for name, weight in learned.items()}
        self.error = self.measure(self.start)
        trained = (
            [weight.moved for weight in learned.values()],
            [factor for weight in learned.values() for factor in weight.factors.values()],
        )
        groups = [
            {"params": params, "rate": rate} for params, rate in zip(trained, self.rates(), strict=True)
        ]
        device = trained[0][0].device
        self.optimizer = optimizer_of("adamw", [group for group in groups if group["params"]], device)

    def rates(self) -> tuple[float, float]:
        """lr_codes and lr as they are set, or by the codes at the start and their error."""
        if all(weight.nearest for weight in self.learned.values()):
            codes, scales = FROM_NEAREST
        else:
            relative = self.error / max(self.added(), TINY)
            codes, scales = min(max(PER_ERROR * relative, LIMITS[0]), LIMITS[1]), SCALES
        given = self.settings
        return codes if given.lr_codes is None else given.lr_codes, scales if given.lr is None else given.lr

    def added(self) -> float:
        """The mean square of what the block adds to the inputs that judge, or of its outputs where these have
        another shape."""
        squares = []
        for i in self.judges:
            x, y = self.inputs[i], self.targets[i]
            squares.append(float((y - x.to(y) if x.shape == y.shape else y).float().square().mean()))
        return sum(squares) / len(squares)

    def found(self) -> dict[str, QTensor]:
        """The result of all steps, or the start if that is better."""
        steps = self.settings.steps_for(self.train)
        for step in range(steps):
            self.advance(step, steps)
        end = {name: weight.pack() for name, weight in self.learned.items()}
        return end if self.measure(end) < self.error else self.start

    def advance(self, step: int, steps: int) -> None:
        for i in windows_of(step, self.settings.batch, self.train, self.settings.seed):
            now = {name: weight.weight() for name, weight in self.learned.items()}
            self.loss(i, now).backward()
        warm = ceil(steps / 10)
        share = min(1.0, (step + 1) / warm) * (1 + cos(pi * step / steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * share
        self.optimizer.step()
        self.optimizer.zero_grad()

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
        """The mean squared error of the block's output over the inputs that judge."""
        weights = {name: q.decode() for name, q in packed.items()}
        with torch.no_grad():
            errors = [float(self.loss(i, weights)) for i in self.judges]
        return sum(errors) / len(errors)


def windows_of(step: int, batch: int, n: int, seed: int) -> list[int]:
    """The windows, or inputs, of a step: each of n once in a pass, each pass shuffled by its own seed."""
    places = range(step * batch, (step + 1) * batch)
    return [shuffled(n, seed, place // n)[place % n] for place in places]


def shuffled(n: int, seed: int, turn: int) -> list[int]:
    """0 ... n - 1 in the order of one pass; the same for the same seed and pass."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
    return torch.randperm(n, generator=generator).tolist()
