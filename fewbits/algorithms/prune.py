"""Pruning: which weights of a matrix become 0. What the others become is up to the algorithm: gptq lets them
make up for those that are dropped, the others leave them as they are.

    magnitude   |w|, compared over the whole weight                Han et al., arXiv 1510.00149, section 2
    wanda       |w| * |x|, compared in each output row             Sun et al., arXiv 2306.11695
    sparsegpt   w^2 / U_jj^2, compared in each block of 128        Frantar and Alistarh, arXiv 2301.00774
                columns when it is reached: columns are taken from left to right, and each dropped weight
                moves the later ones as in gptq

The last is what dropping a weight costs once all later columns make up for it (H^-1 = U^T U, see hessian.py).
Patterns: `unstructured`, as above; `row`, the same share in each output row; `2:4` and `4:8`, two of four or
four of eight neighbours, which sparsegpt chooses when it reaches them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..calibrate.stats import Stats
from ..errors import FormatError, PlanError, raise_all
from ..formats import Format
from ..formats.zero import fit_with_zero, zero_codes
from ..qtensor import QTensor
from .blocked import blocked_update
from .gptq import Settings, gptq, gptq_pruned
from .hessian import DAMP, HessianFactor, require_stats

PRUNERS = {"sparsegpt": "hessian", "wanda": "mean_square", "magnitude": "nothing"}
"""What each needs of a weight's input, as in NEEDS."""
PATTERNS = {"unstructured": 0, "row": 0, "2:4": 4, "4:8": 8}
"""The number of neighbours of which half are kept."""
COLUMNS = 128  # compared at once by sparsegpt, as in the paper
UNIT = 8  # columns between two matrix products


@dataclass(frozen=True)
class Pruning:
    """sparsity: the share of weights that become 0, from 0 up to 1. prune: a name of PRUNERS; pattern: one of
    PATTERNS."""

    sparsity: float
    prune: str = "sparsegpt"
    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        faults = []
        if not 0 <= self.sparsity < 1:
            faults.append(f"sparsity is {self.sparsity:g}; it is the share of weights that become 0, below 1")
        if self.prune not in PRUNERS:
            faults.append(f"prune is {self.prune!r}; choose one of {', '.join(PRUNERS)}")
        if self.pattern not in PATTERNS:
            faults.append(f"sparsity pattern is {self.pattern!r}; choose one of {', '.join(PATTERNS)}")
        elif PATTERNS[self.pattern] and self.sparsity != 0.5:
            faults.append(
                f"sparsity {self.sparsity:g} with pattern {self.pattern}, which keeps half: take 0.5"
            )
        raise_all(PlanError, "pruning", faults)

    @property
    def needs(self) -> str:
        return PRUNERS[self.prune]

    @property
    def group(self) -> int:
        return PATTERNS[self.pattern]

    def check(self, name: str, k: int) -> None:
        """FormatError for rows of k columns that the pattern does not divide."""
        if self.group and k % self.group:
            raise FormatError(
                f"{name}: row length {k} is not a multiple of {self.group}, which pattern {self.pattern} "
                "needs; take pattern row or unstructured"
            )


def kept(
    w: torch.Tensor, pruning: Pruning, stats: Stats | None = None, damp: float = DAMP, gptaq: float = 0.0
) -> torch.Tensor:
    """`(n, k)` -> bool `(n, k)`: False for the weights that become 0. damp, gptaq: as for gptq."""
    pruning.check("weight", w.shape[1])
    if pruning.prune == "magnitude":
        return _least_left(w.float().abs(), pruning, whole=True)
    stats = require_stats(stats, w, pruning.prune, pruning.needs == "hessian")
    if pruning.prune == "wanda":
        return _least_left(w.float().abs() * stats.mean_square.float().sqrt(), pruning, whole=False)
    hessian = HessianFactor.of(stats, damp)
    return _adaptive(hessian.target(w, stats, gptaq), hessian.factor, pruning)


def _least_left(score: torch.Tensor, pruning: Pruning, whole: bool) -> torch.Tensor:
    """Scores `(n, k)` -> what is kept. whole: compared over the whole, unless by rows."""
    n, k = score.shape
    if pruning.group:
        return _without_least(score.reshape(n, -1, pruning.group), pruning.group // 2).reshape(n, k)
    if whole and pruning.pattern == "unstructured":
        return _without_least(score.reshape(1, -1), round(n * k * pruning.sparsity)).reshape(n, k)
    return _without_least(score, round(k * pruning.sparsity))


def _without_least(score: torch.Tensor, count: int) -> torch.Tensor:
    """`(..., m)` -> bool: all but the `count` least of the last axis."""
    least = score.topk(count, dim=-1, largest=False, sorted=False).indices
    return torch.ones_like(score, dtype=torch.bool).scatter_(-1, least, False)


def _adaptive(target: torch.Tensor, factor: torch.Tensor, pruning: Pruning) -> torch.Tensor:
    """Target `(n, k)` and U `(k, k)` -> what sparsegpt keeps."""
    state = target.T.contiguous()
    moves, keep = torch.empty_like(state), torch.ones_like(state, dtype=torch.bool)
    n, unit = len(target), pruning.group or UNIT

    def block(start: int, stop: int) -> None:
        here = slice(start, stop)
        part, moved, keep_here, inner = state[here], moves[here], keep[here], factor[here, here]
        pivot = inner.diagonal()[:, None]
        score = (part / pivot).square()
        if pruning.pattern == "unstructured":
            count = round(n * stop * pruning.sparsity) - round(n * start * pruning.sparsity)
            keep_here.copy_(_without_least(score.reshape(-1), count).view_as(part))
        elif pruning.pattern == "row":
            count = round(stop * pruning.sparsity) - round(start * pruning.sparsity)
            keep_here.copy_(_without_least(score.T, count).T)

        def drop(first: int, last: int) -> None:
            if pruning.group:
                score = (part[first:last] / pivot[first:last]).square()
                keep_here[first:last] = _without_least(score.T, pruning.group // 2).T
            for j in range(first, last):
                moved[j] = part[j].masked_fill(keep_here[j], 0.0) / pivot[j]
                part[j + 1 : last] -= inner[j, j + 1 : last, None] * moved[j]

        blocked_update(part, inner, moved, drop, unit)

    blocked_update(state, factor, moves, block, COLUMNS)
    return keep.T.contiguous()


def quantize_pruned(
    algorithm: Any,
    w: torch.Tensor,
    format: Format,
    stats: Stats | None,
    keep: torch.Tensor,
    options: Mapping[str, Any],
) -> QTensor:
    """`(n, k)` float and what is kept of it -> QTensor, by an algorithm of ALGORITHMS; all other weights get
    the code nearest to 0, in grids that hold 0 where the format can."""
    if algorithm is gptq:
        return gptq_pruned(w, format, stats, keep, Settings(**options))
    w = w.float() * keep
    q = algorithm(w, format, stats, **options)
    fitted, codes = format.unpack(q)
    grid = fitted.with_zero() if fitted.groups(len(w))[1] is None else fit_with_zero(format, w)
    if grid is not fitted:
        codes = grid.round(w)
    return format.pack(grid, torch.where(keep, codes, zero_codes(grid, w)))
