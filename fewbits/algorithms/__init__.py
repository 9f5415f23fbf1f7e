"""Algorithms that choose codes, one per module; importing this package registers all of them.

An algorithm is a pure function `(w, format, stats, **options) -> QTensor` of a float weight `(n, k)`;
its keyword arguments are the options that a plan may set. NEEDS has its requirement on the weight's
input: "nothing", "mean_square" or "hessian". Without statistics an algorithm that needs them raises
CalibrationError; there is no silent fallback.

Shared modules: `hessian` (the loss, the Hessian and its factor), `columns` (columns rounded one after the
other), `blocked` (the same with matrix products), `lockstep` (weights of one shape at once), `descent`
(better codes and scales for any QTensor, in closed form).
"""

from ..errors import PlanError
from ..registry import Registry
from .descent import descend
from .ecsq import ecsq
from .gptq import gptq
from .hessian import CalibrationWarning
from .hqq import hqq
from .rtn import rtn
from .weighted import weighted

ALGORITHMS: Registry = Registry("algorithm", PlanError)
NEEDS: dict[str, str] = {}
for _algorithm, _needs in (
    (rtn, "nothing"), (hqq, "nothing"), (weighted, "mean_square"), (gptq, "hessian"), (ecsq, "hessian"),
):  # fmt: skip
    ALGORITHMS.add(_algorithm.__name__, _algorithm)
    NEEDS[_algorithm.__name__] = _needs

__all__ = [
    "ALGORITHMS",
    "NEEDS",
    "CalibrationWarning",
    "descend",
    "ecsq",
    "gptq",
    "hqq",
    "rtn",
    "weighted",
]
