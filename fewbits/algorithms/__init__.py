"""Which codes are chosen? One module an algorithm; importing this package registers every one.

An algorithm is a pure function `(w, format, stats, **options) -> QTensor` of a float weight `(n, k)`;
its keyword arguments are the options that a plan may set. NEEDS says what it must know of the weight's
input: "nothing", "mean_square" or "hessian". Without statistics an algorithm that needs them raises
CalibrationError; nothing falls back in silence.

What they share: `hessian` (the loss, the Hessian and its factor), `columns` (columns rounded one after the
other), `blocked` (the same at the speed of matrix products), `descent` (better codes and scales for any
QTensor, in closed form).
"""

from ..errors import PlanError
from ..registry import Registry
from .descent import descend
from .gptq import gptq
from .hessian import CalibrationWarning
from .hqq import hqq
from .rtn import rtn
from .weighted import weighted

ALGORITHMS: Registry = Registry("algorithm", PlanError)
NEEDS: dict[str, str] = {}
for _algorithm, _needs in ((rtn, "nothing"), (hqq, "nothing"), (weighted, "mean_square"), (gptq, "hessian")):
    ALGORITHMS.add(_algorithm.__name__, _algorithm)
    NEEDS[_algorithm.__name__] = _needs

# How far the loss may differ for another internal block size (columns.UNIT, gptq.PIECE, formats.base.CHUNK):
# none changes a bit, but in gptq, where products of matrices sum in another order and a weight that lies
# between two codes may take the other one. Measured: 10 of 74 formats differ at all, int7_g128 by 2.4 %.
BLOCK_TOLERANCE = {"rtn": 0.0, "hqq": 0.0, "weighted": 0.0, "gptq": 0.03}

__all__ = [
    "ALGORITHMS",
    "BLOCK_TOLERANCE",
    "NEEDS",
    "CalibrationWarning",
    "descend",
    "gptq",
    "hqq",
    "rtn",
    "weighted",
]
