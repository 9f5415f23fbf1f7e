"""Round to nearest: each weight to the nearest value of its block, after a search of scales and offsets.

Data-free. The search and the closed-form refit of scale and offset are in formats/search.py. With
search=False the format's min-max rule is used.
"""

from __future__ import annotations

import torch

from ..calibrate.stats import Stats
from ..formats import Format
from ..qtensor import QTensor


def rtn(w: torch.Tensor, format: Format, stats: Stats | None = None, search: bool = True) -> QTensor:
    """`(n, k)` float -> QTensor. Statistics are not used: see `weighted`."""
    return format.encode(w, None, search)
