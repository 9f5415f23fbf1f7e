"""Coverage: the share of the weights in a model's blocks that got what was asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from ..files.checkpoint import Checkpoint
from ..files.output import Job
from ..model.sites import block_matrices
from ..release.receipt import TensorRow

PROMISED = 0.95


class CoverageWarning(UserWarning):
    """Less than PROMISED of the weights in blocks got the requested format."""


def coverage_of(
    checkpoint: Checkpoint, jobs: Sequence[Job], rows: Sequence[TensorRow], asked: str | None
) -> dict[str, Any]:
    """The receipt's `coverage`: weights in blocks, those with the requested format, and what the others are.

    Empty if no format is asked for, or no tensor has a block number. rows: those of the jobs, in their order.
    What a rule names counts, and so does a type that a row length falls back to. Warns below PROMISED.
    """
    sizes = block_matrices(checkpoint)
    if asked is None or not sizes:
        return {}
    covered = 0
    left: dict[str, dict[str, Any]] = {}
    for job, row in zip(jobs, rows, strict=True):
        weights = sum(sizes.get(source, 0) for source in job.sources)
        if job.quantized or row.rule or row.format == asked:
            covered += weights
        elif weights:
            found = left.setdefault(row.reason or "no reason given", {"weights": 0, "tensors": []})
            found["weights"] += weights
            found["tensors"].append(row.name)
    total = sum(sizes.values())
    share = covered / total
    coverage = {"asked": asked, "weights": total, "covered": covered, "share": share, "left": left}
    if share < PROMISED:
        warnings.warn(shortfall_of(coverage), CoverageWarning, stacklevel=3)
    return coverage


def shortfall_of(coverage: dict[str, Any]) -> str:
    """What is not covered, and why."""
    left = [
        f"{found['weights'] / coverage['weights']:.1%} in {len(found['tensors'])} tensors such as "
        f"{found['tensors'][0]} ({reason})"
        for reason, found in sorted(coverage["left"].items(), key=lambda row: -row[1]["weights"])
    ]
    return (
        f"only {coverage['share']:.1%} of the weights in blocks got {coverage['asked']}; the rest: "
        f"{'; '.join(left)}"
    )
