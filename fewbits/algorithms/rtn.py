"""Round to nearest: each weight to the nearest value of its block, the block's parameters searched.

Data-free. What is searched, and the closed-form refit of scale and minimum, is in formats/search.py;
with search=False block parameters follow the plain min-max rule of the format.
"""

from __future__ import annotations

import torch

from ..calibrate.stats import Stats
from ..formats import Format
from ..qtensor import QTensor


def rtn(w: torch.Tensor, format: Format, stats: Stats | None = None, search: bool = True) -> QTensor:
    """`(n, k)` float -> QTensor. Statistics are not used: see `weighted`."""
    return format.encode(w, None, search)
