"""Statistics without quantizing: the float model is run block by block, and what its weights read is kept.

    tokens -> embeddings -> x
    for each block:   capture(block, x) -> gather -> parts/block-0003.safetensors,   x = block(x)
    join of the parts: mapped, so that no Hessian stays in memory

A block's Hessians are dropped when its part is written; whoever saves the whole reads them group by group.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ...adapters.as_loaded import as_loaded
from ...blocks.activations import Activations
from ...blocks.model import BlockModel
from ...calibrate.capture import capture
from ...calibrate.statistics import Statistics, gather, identify, join
from ...calibrate.store import load_statistics, save_statistics
from ...calibrate.tokens import Tokens
from ...errors import CalibrationError, FileError
from ...files.checkpoint import Checkpoint
from ...model.sites import Site, sites
from .run import Progress
from .settings import Streaming


def collect(
    checkpoint: Checkpoint,
    tokens: Tokens,
    streaming: Streaming,
    parts: Path,
    hessian: bool = True,
    progress: Progress | None = None,
) -> Statistics:
    """Of every weight of the model's blocks. parts: an empty folder that must outlive the result.

    Raises ModelError for a model that cannot be run, CalibrationError naming block and site for
    activations that are not finite, FileError for too small a disk.
    """
    report = progress or (lambda stage, done, total: None)
    checkpoint = as_loaded(checkpoint)
    inside = {site.name: site for site in sites(checkpoint) if site.block is not None}
    if not inside:
        raise CalibrationError(f"{checkpoint.path}: no weight of its blocks is known; nothing to calibrate")
    if hessian:
        _check_disk(inside, parts)
    saved: list[Statistics] = []
    stack, n_stacks = 0, 1
    while stack < n_stacks:
        model = BlockModel(checkpoint, streaming.dtype, streaming.place, stack)
        saved += _of_stack(model, inside, tokens, streaming, (parts, len(saved), hessian), report)
        stack, n_stacks = stack + 1, model.n_stacks
    return join(saved)


def _of_stack(
    model: BlockModel,
    inside: dict[str, Site],
    tokens: Tokens,
    streaming: Streaming,
    place: tuple[Path, int, bool],
    report: Progress,
) -> list[Statistics]:
    """Of the blocks of one stack. place: folder of parts, number of the first, whether with Hessians."""
    parts, first, hessian = place
    saved = []
    with torch.no_grad(), Activations((), streaming.activation_memory, streaming.scratch) as x:
        widest = max(max(site.shape) for site in inside.values())
        for batch in tokens.windows.split(streaming.rows(tokens.windows.shape[1], widest)):
            x.append(model.embed(batch))
        for i in range(model.n_blocks):
            report("block", i, model.n_blocks)
            block = model.block(i, model.weights(i))
            wanted = [inside[name] for name in model.names(i) if name in inside]
            seen = capture(block, x, wanted, hessian, outputs=x)
            part = gather(
                identify(model.checkpoint), tokens.source, tokens.count, seen.stats, seen.unseen,
                tokens.notes + seen.notes,
            )  # fmt: skip
            path = parts / f"block-{first + i:04d}.safetensors"
            save_statistics(part, path)
            saved.append(load_statistics(path))
            del block, seen, part
        report("block", model.n_blocks, model.n_blocks)
    return saved


def _check_disk(inside: dict[str, Site], folder: Path) -> None:
    """FileError unless the Hessians fit twice: in parts, and joined."""
    columns = {site.group: site.shape[1] for site in inside.values()}
    needed = 2 * sum(4 * k * (k + 1) // 2 for k in columns.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FileError(
            f"{folder.parent}: the Hessians of {len(columns)} inputs need {needed} bytes of disk, {free} are "
            "free; choose another output, or leave them out (--no-hessian)"
        )
