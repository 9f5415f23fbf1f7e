"""Function-preserving rewrites of the float model, checked numerically before they are used.

Pair transforms, of one block's weights:      find_pairs -> smooth | awq | equalize -> checked -> applied
A rotation, of a whole checkpoint, lazily:    rotate
Directly before plain rounding, and not function-preserving:                 clipped

The pair transforms share one signature: (weights, pairs, stats, formats, **options) -> [(Pair, scale)].
"""

from ..errors import PlanError
from ..registry import Registry
from .awq import awq
from .check import checked
from .clip import clipped
from .equalize import equalize
from .pairs import Choice, Pair, applied, apply, find_pairs, rescaled, scaled
from .rotate import rotate
from .smooth import smooth

TRANSFORMS: Registry = Registry("transform", PlanError)
TRANSFORMS.add("smooth", smooth)
TRANSFORMS.add("awq", awq)
TRANSFORMS.add("equalize", equalize)

__all__ = [
    "TRANSFORMS", "Choice", "Pair", "applied", "apply", "awq", "checked", "clipped", "equalize", "find_pairs",
    "rescaled", "rotate", "scaled", "smooth",
]  # fmt: skip
