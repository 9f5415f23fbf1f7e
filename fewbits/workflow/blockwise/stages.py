"""The sites of a block in the order in which inputs reach them, each seeing those before it quantized.

Two ways, the same numbers: `quantize_paused` lets every batch wait inside the block (one pass, more
memory); otherwise `run.py` captures each stage with a pass of its own, as far as that stage.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ...blocks.activations import Activations
from ...blocks.block import Block
from ...calibrate.capture import Capture, Sums, check_output
from ...calibrate.paused import Passes, Paused, observed_groups
from ...errors import CalibrationError
from ...model.sites import Site
from .job import BlockJob
from .settings import Note

Batches = Sequence[torch.Tensor]  # what Activations are, but for slices
_EXPERT = re.compile(r"\.experts\.\d+(?=[.:])")


def stages_of(wanted: Sequence[Site]) -> list[list[Site]]:
    """Sites by the activation they read, experts of a block together, in the order of the modules."""
    stages: dict[str, list[Site]] = {}
    for site in wanted:
        stages.setdefault(_EXPERT.sub(".experts", site.group), []).append(site)
    return list(stages.values())


def read_once(wanted: Sequence[Site], block: Block, x: Activations) -> list[list[str]] | None:
    """The sites by input, in the order of these; None where one of them is used more than once."""
    groups = observed_groups(block, x[0], {site.name for site in wanted})
    names = [name for group in groups for name in group]
    return groups if len(set(names)) == len(names) else None


def quantize_paused(
    job: BlockJob,
    wanted: Sequence[Site],
    groups: list[list[str]],
    reference: Block,
    x: Activations,
    floats: Activations | None,
) -> None:
    """Quantize every site of `wanted` in one pass; x and floats become the block's outputs.

    groups: what `read_once` has found. reference: the block with its float weights, for the float stream.
    """
    sites = {site.name: site for site in wanted}
    unseen = sites.keys() - {name for names in groups for name in names}
    if unseen:
        groups.append(sorted(unseen))
    job.notes += [Note(text) for text in _differences(groups, sites)]
    stops = {names[0] for names in groups}
    none: tuple[torch.Tensor, ...] = ()
    with Passes(job.block, x, stops) as passes, Passes(reference, floats or none, stops) as others:
        for names in groups:
            stage = [sites[name] for name in names]
            if names[0] in unseen:
                job.quantize(stage, Capture({}, tuple(names), ()))
                continue
            sums = Sums(stage[0].shape[1], job.needs_hessian(stage), floats is not None, job.block.device)
            for i, each in enumerate(passes):
                other = _stop(others[i], names[0]) if others else None
                sums.add(_stop(each, names[0]), other)
            if not sums.finite:
                raise CalibrationError(f"{names[0]}: its inputs are not finite; check the blocks before it")
            seen = sums.stats()
            job.quantize(stage, Capture(dict.fromkeys(names, seen), (), ()))
        for stream, block, ended in ((x, job.block, passes), (floats, reference, others)):
            for i, each in enumerate(ended):
                try:
                    _finish(each, block, i, stream)
                except torch.OutOfMemoryError as error:  # inputs are replaced: this block cannot begin again
                    raise CalibrationError(
                        f"{block.name}: out of memory at its end ({str(error).splitlines()[0]}); finished "
                        "blocks are kept: free memory there and run again, or take --device cpu"
                    ) from error


def _stop(each: Paused, name: str) -> torch.Tensor:
    reached = each.next()
    if reached is None or reached[0] != name:
        raise CalibrationError(
            f"a batch reached {reached and reached[0]} where the first one had reached {name}; a block that "
            "changes its course from batch to batch cannot be calibrated in one pass"
        )
    return reached[1]


def _finish(each: Paused, block: Block, i: int, stream: Activations | None) -> None:
    assert stream is not None
    if (reached := each.next()) is not None:
        raise CalibrationError(f"{block.name}: batch {i} reached {reached[0]} twice; it cannot be calibrated")
    assert each.output is not None
    check_output(block, i, stream[i], each.output)
    stream[i] = each.output


def _differences(groups: Sequence[Sequence[str]], sites: dict[str, Site]) -> list[str]:
    """Where the inputs observed differ from what the names of the sites say."""
    by_name: dict[str, set[str]] = {}
    for site in sites.values():
        by_name.setdefault(site.group, set()).add(site.name)
    return [
        f"{', '.join(names)} read one input, their names say otherwise"
        for names in groups
        if set(names) not in by_name.values()
    ]
