"""Which codes are chosen? One module an algorithm; importing this package registers every one.

An algorithm is a pure function `(w, format, importance, **options) -> QTensor` of a float weight
`(n, k)`; its keyword arguments are the options that a plan may set.
"""

from ..errors import PlanError
from ..registry import Registry
from .rtn import rtn

ALGORITHMS: Registry = Registry("algorithm", PlanError)
ALGORITHMS.add("rtn", rtn)

__all__ = ["ALGORITHMS", "rtn"]
