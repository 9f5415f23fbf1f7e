"""Which weights are pruned, what speaks against it before the run, and what the receipt says of it after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..dtypes import DType
from ..errors import FewbitsError, PlanError, raise_all
from ..files.checkpoint import Checkpoint
from ..files.output import Job
from ..formats.base import Format, Kind
from ..formats.zero import holds_zero, stays_zero
from ..model.sites import block_matrices, sites
from ..plan.choices import STAY
from ..plan.method import Method
from ..release.receipt import TensorRow


def prunable(checkpoint: Checkpoint, method: Method) -> frozenset[str]:
    """The weights that this method prunes: the matrices of the blocks, but for routers. None without a
    sparsity."""
    if method.pruning is None:
        return frozenset()
    return frozenset(
        site.name for site in sites(checkpoint) if site.block is not None and site.role not in STAY
    )


def is_float(kind: Kind) -> bool:
    """Whether weights are kept in this float type."""
    return isinstance(kind, DType) and kind.weight


def check_pruning(checkpoint: Checkpoint, kinds: Mapping[str, Kind], method: Method) -> None:
    """PlanError with every weight that cannot be pruned as asked, or where there is none to prune. kinds: of
    the output, by the names of the checkpoint."""
    pruning = method.pruning
    if pruning is None:
        return
    faults: dict[str, str] = {}
    names = prunable(checkpoint, method) & kinds.keys()
    for name in sorted(names):
        kind = kinds[name]
        try:
            pruning.check(name, checkpoint.tensors[name].shape[-1])
        except FewbitsError as error:
            faults.setdefault("pattern", str(error))
        if not isinstance(kind, Format):
            continue
        if not holds_zero(kind):
            text = (
                "has no value 0, so that pruned weights would not stay 0; take q4_0, q4_k or nf4, for example"
            )
            faults.setdefault(kind.name, f"{kind.name}, of {name}, {text}")
        elif (method.trains or method.learn) and not stays_zero(kind):
            text = "training moves its offsets, so that pruned weights would not stay 0"
            faults.setdefault(kind.name, f"{kind.name}, of {name}: {text}; take q4_0, or leave training out")
    if not names:
        faults["none"] = "no weight matrix in a numbered block, so there is none to prune"
    raise_all(PlanError, str(checkpoint.path), list(faults.values()))


def sparsity_of(
    checkpoint: Checkpoint, jobs: Sequence[Job], rows: Sequence[TensorRow], method: Method
) -> dict[str, Any]:
    """The receipt's `sparsity`: what was asked for, the share of the weights in blocks that were pruned, and
    of their weights those that were dropped, those of them that are not 0 in the file, and all zeros."""
    pruning = method.pruning
    if pruning is None:
        return {}
    sizes = block_matrices(checkpoint)
    found = [
        (row, sum(sizes.get(name, 0) for name in job.sources)) for job, row in zip(jobs, rows, strict=True)
    ]
    pruned = [(row.sparsity, weights) for row, weights in found if row.sparsity is not None]
    weights = sum(count for _, count in pruned)

    def share(what: str) -> float:
        return sum(each[what] * count for each, count in pruned) / max(1, weights)

    return {
        "asked": pruning.sparsity, "prune": pruning.prune, "pattern": pruning.pattern,
        "covered": weights / max(1, sum(sizes.values())),
        **{what: share(what) for what in ("dropped", "not_zero", "zeros")},
    }  # fmt: skip
