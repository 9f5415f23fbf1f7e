"""Weighted: scales and offsets minimize a weighted error, then each weight is rounded to nearest.

mode="diagonal"   sum_j mean(x_j^2) (q_j - w_j)^2 is minimized, as for uncorrelated inputs and as
                  llama.cpp does with an importance matrix (with the search and the refit of
                  formats/search.py, which are ours). Needs mean squares only.
mode="hessian"    then coordinate descent on the whole loss (descent.py), but no error
                  feedback: weights stay near their values.
"""

from __future__ import annotations

import torch

from ..calibrate.stats import Stats
from ..errors import PlanError, raise_all
from ..formats import Format
from ..qtensor import QTensor
from .descent import ROUNDS, descend, keep_better
from .hessian import DAMP, require_stats

MODES = ("diagonal", "hessian")


def weighted(
    w: torch.Tensor,
    format: Format,
    stats: Stats | None = None,
    mode: str = "diagonal",
    damp: float = DAMP,
    rounds: int = ROUNDS,
) -> QTensor:
    """`(n, k)` float -> QTensor. damp and rounds: options of the descent."""
    faults = [] if mode in MODES else [f"mode is {mode!r}; choose one of {', '.join(MODES)}"]
    faults += [] if damp >= 0 else [f"damp is {damp}; it is a share of the mean diagonal, 0 or more"]
    faults += [] if rounds >= 0 else [f"rounds is {rounds}; 0 or more"]
    raise_all(PlanError, "weighted", faults)
    format.check(w)
    stats = require_stats(stats, w, "weighted", hessian=mode == "hessian")
    q = weigh(w, format, stats.mean_square)
    return descend(q, w, stats, rounds, damp) if mode == "hessian" else q


def weigh(w: torch.Tensor, format: Format, importance: torch.Tensor) -> QTensor:
    """Fitted to the weighted errors, unless the plain fit has a lower weighted error (possible in 8 bits)."""
    parts = format.encode(w, importance), format.encode(w)
    lost = [(part.decode() - w).double().square() @ importance.double() for part in parts]
    return keep_better(*parts, *lost)
