"""How codes are chosen for weights without a rule, and its three presets: fast, good, best.

Method        an algorithm with its options, the transforms before and the training after
EFFORTS       fast | good | best: the method of each preset; docs/methods.md has the figures
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..algorithms import NEEDS
from ..algorithms.prune import PRUNERS, Pruning
from ..errors import PlanError, raise_all
from ..transforms import TRANSFORMS
from .rules import Option

LR_CODES = 0.005  # spacings of the grid a step; weights start a fifth of one away from the next code at least
REWRITES = ("rotate", *TRANSFORMS)


@dataclass(frozen=True)
class Method:
    """How weights without a rule are quantized.

    algorithm, options: of `algorithms/`. transforms: rewrites of the float model, in this order. sequential:
    the inputs of a site are measured after the earlier sites of its block are quantized, instead of in the
    float block. gptaq: each site approximates the float model's output (mismatch is collected). learn: None,
    "light" or "best": rounding learned by gradients after the algorithm. distill: steps of distilling block
    scales and norms after all blocks; train: steps of the same that train codes too, in its place, with
    train_options (fields of train.settings.DistillSettings). sparsity: the share of the weights in blocks
    that become 0; prune, sparsity_pattern: which, as in algorithms.prune (default: by what the algorithm
    needs)."""

    algorithm: str = "rtn"
    options: Mapping[str, Option] = field(default_factory=dict)
    transforms: tuple[str, ...] = ()
    transform_options: Mapping[str, Option] = field(default_factory=dict)
    sequential: bool = False
    gptaq: bool = False
    learn: str | None = None
    distill: int = 0
    train: int = 0
    train_options: Mapping[str, Option] = field(default_factory=dict)
    sparsity: float = 0.0
    prune: str | None = None
    sparsity_pattern: str = "unstructured"

    def __post_init__(self) -> None:
        faults = [
            f"unknown transform {name!r}; known: {', '.join(REWRITES)}"
            for name in self.transforms
            if name not in REWRITES
        ]
        if self.learn not in (None, "light", "best"):
            faults.append(f"learn is {self.learn!r}; it is light or best")
        for name in ("distill", "train"):
            if getattr(self, name) < 0:
                faults.append(f"{name} is {getattr(self, name)} steps; it is 0 or more")
        if self.pruning is None and self.prune is not None:
            faults.append(f"prune {self.prune} needs a sparsity, such as 0.5")
        if self.pruning is None and self.sparsity_pattern != "unstructured":
            faults.append(f"sparsity pattern {self.sparsity_pattern} needs a sparsity; 2:4 and 4:8 take 0.5")
        raise_all(PlanError, "method", faults)

    @property
    def pruning(self) -> Pruning | None:
        """What is pruned; by default sparsegpt where there is a Hessian, wanda where there is a mean square,
        else magnitude."""
        if not self.sparsity:
            return None
        needs = NEEDS.get(self.algorithm)
        default = next(name for name, its in PRUNERS.items() if its == needs)
        return Pruning(self.sparsity, self.prune or default, self.sparsity_pattern)

    def settings(self) -> dict[str, Any]:
        """The differences from plain rounding as plain data, for the receipt and a run's fingerprint."""
        plain = asdict(Method())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}

    @property
    def streams(self) -> bool:
        """Whether the model must be run, so that saved statistics are not enough."""
        moved = set(self.transforms) - {"rotate"}
        return bool(self.sequential or self.gptaq or self.learn or self.trains or moved)

    @property
    def trains(self) -> int:
        """Steps of training the whole model, codes or only scales."""
        return self.train or self.distill

    @property
    def copies(self) -> int:
        """Of the model's numbers in f32 that training holds at most: weights; where codes are trained
        gradients, Adam's moments, the best, units and buffers too."""
        return 15 if self.train else 2

    def training(self) -> dict[str, Any]:
        """Fields of the settings of that training besides its steps."""
        return {"lr_codes": LR_CODES, "precision": "auto", **self.train_options} if self.train else {}

    @property
    def training_name(self) -> str:
        return "train" if self.train else "distill"

    @property
    def needs_data(self) -> bool:
        """Whether it needs text or saved statistics."""
        needs = {NEEDS.get(self.algorithm), "nothing" if self.pruning is None else self.pruning.needs}
        return self.streams or needs != {"nothing"}


EFFORTS = {
    "fast": Method(),
    "good": Method("gptq", sequential=True, gptaq=True),
    "best": Method("gptq", sequential=True, gptaq=True, distill=100),
}

# The values of --method: each algorithm without the additions of an effort, and learned rounding.
METHODS = {name: Method(name, sequential=needs == "hessian") for name, needs in NEEDS.items()}
METHODS["ecsq"] = Method("ecsq", sequential=True, gptaq=True)
METHODS["learned"] = Method("gptq", sequential=True, gptaq=True, learn="light")
