"""Rotation: the residual stream is rotated to spread outliers over all channels, and the weights accordingly.

    x' = R^T x           R orthogonal; RMSNorm without weights commutes with R, which preserves the length

    embedding    E R                      q k v gate up router, lm_head    W diag(norm) R
    o, down      R^T W, R^T b             norms                            ones
    v, o         the same with a separate rotation inside each head: values' = R_v^T values

Nothing is computed at run time: the result is an ordinary checkpoint of its architecture (QuaRot, arXiv
2404.00456, without its online rotations; SpinQuant, arXiv 2405.16406, with R not learned). A tied output
layer becomes a separate tensor, because the last norm is folded into the output but not into the embedding. R
is a randomized Hadamard matrix if its order allows (hadamard.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from ..dtypes import F32, DType
from ..errors import ModelError, raise_all
from ..files.checkpoint import Checkpoint, LazyTensor
from ..model.archs import Architecture, architecture
from .hadamard import Rotation, rotation
from .pairs import value_rows
from .rewrite import Change, lazily, rewritten
from .structure import Block, Part, blocks_of

OUTPUT = "lm_head.weight"


@dataclass
class _Plan:
    """The changes of each tensor by name, in order, and its resulting dtype."""

    checkpoint: Checkpoint
    changes: dict[str, list[Change]] = field(default_factory=dict)
    dtypes: dict[str, DType] = field(default_factory=dict)

    def add(self, name: str, change: Change, dtype: DType = F32) -> None:
        self.changes.setdefault(name, []).append(change)
        self.dtypes[name] = dtype

    def stored(self, name: str) -> DType:
        kind = self.checkpoint.tensors[name].kind
        assert isinstance(kind, DType)  # `rewritten` reports the others by name
        return kind


def rotate(
    checkpoint: Checkpoint, seed: int = 0, values: bool = True, residual: bool = True
) -> tuple[Checkpoint, tuple[str, ...]]:
    """The same model, rotated, and notes of what changed; tensors are rewritten when they are loaded.

    residual: the residual stream; values: between v and o, within each head. Rewritten linears and
    biases are f32; embedding, output and norms keep their stored float type.
    ModelError for an architecture whose residual stream cannot be rotated, with the reasons.
    """
    generator = torch.Generator().manual_seed(seed)
    plan = _Plan(checkpoint)
    notes: list[str] = []
    blocks = blocks_of(checkpoint.tensors)
    if residual:
        arch = architecture(checkpoint.config)
        faults = list(_obstacles(checkpoint, arch, blocks))
        raise_all(ModelError, f"{checkpoint.path}: the residual stream cannot be rotated", faults)
        assert arch is not None
        turn = rotation(int(checkpoint.config["hidden_size"]), generator)
        notes.append(f"residual stream rotated: {turn.describe()}, seed {seed}; norms folded into linears")
        for block in blocks:
            _rotate_block(plan, block, turn, arch.norm_offset)
        checkpoint, note = _rotate_ends(plan, blocks, turn, arch)
        notes += note
    if values:
        notes.append(_rotate_values(plan, blocks, generator))
    lossy = {plan.dtypes[name].name for name in plan.changes} - {F32.name}
    if lossy and residual:
        notes.append(f"embedding and output are rounded once more, to {' and '.join(sorted(lossy))}")
    return rewritten(checkpoint, plan.changes, plan.dtypes), tuple(notes)


def _obstacles(checkpoint: Checkpoint, arch: Architecture | None, blocks: list[Block]) -> Iterator[str]:
    if arch is None:
        yield (
            f"architecture {checkpoint.config.get('architectures')} is unknown, so which weights read "
            "and write the residual stream is not certain; use pair transforms instead"
        )
        return
    tensors = checkpoint.tensors
    norms = [norm for block in blocks for norm in (block.attention.norm, block.mlp.norm) if norm]
    if any(norm.removesuffix("weight") + "bias" in tensors for norm in norms):
        yield "LayerNorm subtracts a mean, which no rotation keeps; RMSNorm is needed"
    for block in blocks:
        if block.post_norms:
            yield (
                f"{block.post_norms[0]} scales columns after the linear and before the residual sum, where "
                "nothing linear follows to fold it into; rotate the values alone (residual=False)"
            )
            break
    for block in blocks:
        for part in (block.attention, block.mlp):
            if part.norm is None:
                yield f"{block.name}: the norm before {', '.join(part.readers[:1])} is not found"
            yield from (f"{name}: its relation to the residual stream is unknown" for name in part.strange)
    if not blocks:
        yield "no blocks are found"


def _rotate_block(plan: _Plan, block: Block, turn: Rotation, offset: float) -> None:
    tensors = plan.checkpoint.tensors
    for part in (block.attention, block.mlp):
        for name in part.readers:
            _read(plan, part, name, turn, offset)
        for name in part.writers:
            plan.add(name, turn.rows)
            bias = name.removesuffix("weight") + "bias"
            if bias in tensors:
                plan.add(bias, turn.columns)
    for norm in dict.fromkeys([block.attention.norm, block.mlp.norm]):
        assert norm is not None
        plan.add(norm, _ones(offset), plan.stored(norm))


def _read(plan: _Plan, part: Part, name: str, turn: Rotation, offset: float) -> None:
    assert part.norm is not None
    plan.add(name, _folded(plan.checkpoint.tensors[part.norm], offset))
    plan.add(name, turn.columns)


def _rotate_ends(
    plan: _Plan, blocks: list[Block], turn: Rotation, arch: Architecture
) -> tuple[Checkpoint, list[str]]:
    """Embedding, last norm and output; a tied output becomes a separate tensor."""
    checkpoint, notes = plan.checkpoint, []
    embed, norm, output = arch.ends
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    fold = _folded(checkpoint.tensors[norm], arch.norm_offset)
    plan.add(embed, turn.columns, plan.stored(embed))
    plan.add(norm, _ones(arch.norm_offset), plan.stored(norm))
    if tied:
        source = checkpoint.tensors[embed]
        untied = lazily(source, output, [], plan.stored(embed))
        checkpoint = replace(
            checkpoint,
            tensors={**checkpoint.tensors, output: untied},
            config={**checkpoint.config, "tie_word_embeddings": False},
        )
        notes.append(
            f"{output} is now a separate tensor ({source.nbytes / 2**20:.1f} MiB more before quantizing): "
            "it was tied to the embedding, and the last norm is folded into it alone"
        )
    stored = checkpoint.tensors[output].kind
    assert isinstance(stored, DType)
    plan.add(output, fold, stored)
    plan.add(output, turn.columns, stored)
    return checkpoint, notes


def _rotate_values(plan: _Plan, blocks: list[Block], generator: torch.Generator) -> str:
    """One rotation for the heads of all blocks; returns the number of rotated blocks."""
    done, turn = 0, None
    for block in blocks:
        part = block.attention
        rows = value_rows(plan.checkpoint, part)
        if rows is None or len(part.writers) != 1 or part.strange or part.vectors:
            continue
        name, start, size, head = rows
        turn = rotation(head, generator) if turn is None else turn
        plan.add(name, _value_change(turn, start, size))
        plan.add(part.writers[0], turn.columns)
        bias = name.removesuffix("weight") + "bias"
        if bias in plan.checkpoint.tensors:
            plan.add(bias, _value_change(turn, start, size))
        done += 1
    how = "none" if turn is None else turn.describe()
    return f"values of {done} of {len(blocks)} blocks rotated within each head: {how}"


def _value_change(turn: Rotation, start: int, size: int) -> Change:
    def change(w: torch.Tensor) -> torch.Tensor:
        w, part = w.clone(), slice(start, start + size)
        w[part] = turn.rows(w[part]) if w.ndim == 2 else turn.columns(w[part])
        return w

    return change


def _folded(norm: LazyTensor, offset: float) -> Change:
    """W -> W diag(norm); the norm is read when the weight is."""

    def change(w: torch.Tensor) -> torch.Tensor:
        value = norm.load()
        assert isinstance(value, torch.Tensor)
        return w * (value.float() + offset)

    return change


def _ones(offset: float) -> Change:
    return lambda w: torch.full_like(w, 1.0 - offset)
