"""How codes are chosen where no rule says otherwise, and the three words for it: fast, good, best.

Method        an algorithm with its options, what is done to the model before, and what after
EFFORTS       fast | good | best: which of them each word stands for; docs/methods.md has the figures
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..algorithms import NEEDS
from ..errors import PlanError, raise_all
from ..transforms import TRANSFORMS
from .rules import Option

REWRITES = ("rotate", *TRANSFORMS)


@dataclass(frozen=True)
class Method:
    """What happens to every weight that no rule singles out.

    algorithm, options: of `algorithms/`. transforms: rewrites of the float model, in this order.
    sequential: within a block each site meets its input as the sites quantized before it leave it, not
    as the float block does. gptaq: each site aims at the float model's output, not at its own
    (mismatch is collected). learn: None, "light" or "best": rounding learned by gradients after the
    algorithm. distill: steps of distilling block scales and norms when all blocks are done.
    """

    algorithm: str = "rtn"
    options: Mapping[str, Option] = field(default_factory=dict)
    transforms: tuple[str, ...] = ()
    transform_options: Mapping[str, Option] = field(default_factory=dict)
    sequential: bool = False
    gptaq: bool = False
    learn: str | None = None
    distill: int = 0

    def __post_init__(self) -> None:
        faults = [
            f"unknown transform {name!r}; known: {', '.join(REWRITES)}"
            for name in self.transforms
            if name not in REWRITES
        ]
        if self.learn not in (None, "light", "best"):
            faults.append(f"learn is {self.learn!r}; it is light or best")
        if self.distill < 0:
            faults.append(f"distill is {self.distill} steps; it is 0 or more")
        raise_all(PlanError, "method", faults)

    def asked(self) -> dict[str, Any]:
        """What differs from plain rounding, as plain data: for the receipt and a run's fingerprint."""
        plain = asdict(Method())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}

    @property
    def streams(self) -> bool:
        """Does it need the model to be run, so that saved statistics do not suffice?"""
        moved = set(self.transforms) - {"rotate"}
        return bool(self.sequential or self.gptaq or self.learn or self.distill or moved)

    @property
    def needs_data(self) -> bool:
        """Does it need a text, or statistics taken from one?"""
        return self.streams or NEEDS.get(self.algorithm) != "nothing"


EFFORTS = {
    "fast": Method(),
    "good": Method("gptq", sequential=True, gptaq=True),
    "best": Method("gptq", sequential=True, gptaq=True, distill=100),
}

# The words of --method: each algorithm, without what an effort adds to it, and rounding learned after one.
METHODS = {name: Method(name, sequential=needs == "hessian") for name, needs in NEEDS.items()}
METHODS["learned"] = Method("gptq", sequential=True, gptaq=True, learn="light")
