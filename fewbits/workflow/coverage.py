"""Coverage: the share of the weights in a model's blocks that got what was asked for."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from math import prod
from typing import Any

from ..algorithms import CalibrationWarning
from ..files.checkpoint import Checkpoint
from ..files.output import Job
from ..formats.lossless import holders
from ..model.sites import TOWER, block_matrices, sites
from ..release.receipt import TensorRow
from .task import KEPT

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


def trained_notes(rows: Sequence[TensorRow]) -> tuple[str, ...]:
    """Weights on the grid of a format, for which they were trained: kept so, or, with a warning, not."""
    notes = []
    for kept in (True, False):
        found = [row for row in rows if row.options.get("grid") and (row.algorithm == KEPT) == kept]
        if not found:
            continue
        grids = Counter(str(row.options["grid"]) for row in found)
        grid = grids.most_common(1)[0][0]
        text = f"{len(found)} weights, such as {found[0].name}, lie on the grid of {grid}: trained for it"
        if kept:
            notes.append(f"{text}; their codes are kept")
            continue
        text += f". {found[0].format} does not hold these values; --to {holders(grid)} keeps every code"
        warnings.warn(text, CalibrationWarning, stacklevel=3)
        notes.append(text)
    return tuple(notes)


def outside_notes(
    checkpoint: Checkpoint, jobs: Sequence[Job], rows: Sequence[TensorRow], walked: Collection[str] | None
) -> tuple[str, ...]:
    """What text does not reach: modules that stay in float, with their share of the model; and weights that
    a run over the blocks has not come to, which is a warning too. walked: those it has; None: no such run."""
    seen = {site.name: site for site in sites(checkpoint)}
    towers = [name for name, each in checkpoint.seen.items() if each.role == TOWER]
    quantized, blind = set(), []
    for job, row in zip(jobs, rows, strict=True):
        known = [seen[name] for name in job.sources if name in seen]
        quantized |= set(job.sources) if job.quantized else set()
        inside = any(site.block is not None or site.role == TOWER for site in known)
        left = walked is not None and not any(name in walked for name in job.sources)
        if job.quantized and inside and left and row.algorithm == "rtn":
            blind.append(row)
    notes = []
    if floats := [name for name in towers if name in checkpoint.tensors and name not in quantized]:
        share = sum(prod(checkpoint.tensors[name].shape) for name in floats) / checkpoint.numel
        notes.append(
            f"{share:.1%} of the model's numbers are in {len(floats)} tensors of modules that no text goes "
            f"through, such as {floats[0]}: they stay in float unless a rule names them"
        )
    if blind:
        text = (
            f"{len(blind)} weights, such as {blind[0].name}, are rounded without calibration: no text of the "
            f"calibration reaches them"
        )
        warnings.warn(text, CalibrationWarning, stacklevel=3)
        notes.append(text)
    return tuple(notes)


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
