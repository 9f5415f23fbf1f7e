"""The structure of a block, from the names and shapes of its tensors.

    residual --+-- input_layernorm -- q k v -- attention -- o --+-- post_attention_layernorm -- ... down --
               '------------------------------------------------'

A part (attention, feed-forward) has readers, which read the normalized residual stream, and writers, whose
output is added to it. Unknown names are listed as strange, and transforms skip such parts, because a wrong
guess would change the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..files.checkpoint import Checkpoint, LazyTensor
from ..model.archs import architecture
from ..model.sites import role_of

_BLOCK = re.compile(r"^(?P<prefix>(?:.*\.)?(?:layers|h|blocks)\.(?P<index>\d+))\.(?P<rest>.+)$")
ATTENTION_READERS = ("q", "k", "v", "qkv")
MLP_READERS = ("gate", "up", "gate_up", "router")
# Vectors of a part that are neither between v and o nor between up and down.
_HARMLESS = re.compile(r"(\.bias|\.[qk]_norm\.weight|\.sinks)$")


@dataclass(frozen=True)
class Part:
    """Attention or feed-forward of one block; all are tensor names.

    norm: the input of its readers, None if unknown. strange: matrices of unknown use.
    vectors: one-dimensional tensors that may be between a reader and a writer.
    """

    norm: str | None
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    strange: tuple[str, ...]
    vectors: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """One block. post_norms: norms of the block that no linear reads (they follow a part)."""

    name: str
    index: int
    attention: Part
    mlp: Part
    post_norms: tuple[str, ...]


def blocks_of(tensors: Mapping[str, LazyTensor]) -> list[Block]:
    """Every block of a checkpoint, in order."""
    blocks: dict[tuple[int, str], dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        match = _BLOCK.match(name)
        if match:
            key = (int(match["index"]), match["prefix"])
            blocks.setdefault(key, {})[name] = tensor.shape
    return [_block(prefix, index, shapes) for (index, prefix), shapes in sorted(blocks.items())]


def norm_offset(checkpoint: Checkpoint) -> float:
    """The constant added to a stored norm weight: gemma multiplies by 1 + weight. 0 for an unknown
    architecture."""
    arch = architecture(checkpoint.config)
    return 0.0 if arch is None else arch.norm_offset


def _block(prefix: str, index: int, shapes: Mapping[str, tuple[int, ...]]) -> Block:
    parents = {parent_of(name) for name in shapes if role_of(name) in ATTENTION_READERS}
    inside = tuple(f"{parent}." for parent in parents)
    attention = {name: shape for name, shape in shapes.items() if inside and name.startswith(inside)}
    norms = {name for name, shape in shapes.items() if parent_of(name) == prefix and len(shape) == 1}
    mlp = {name: shape for name, shape in shapes.items() if name not in attention and name not in norms}
    norms = {name.removesuffix(".weight") for name in norms if name.endswith(".weight")}
    first, second = _norm_names(prefix, norms)
    return Block(
        name=prefix,
        index=index,
        attention=_part(first, attention, ATTENTION_READERS, "o"),
        mlp=_part(second, mlp, MLP_READERS, "down"),
        post_norms=tuple(sorted(f"{norm}.weight" for norm in norms - {first, second})),
    )


def _norm_names(prefix: str, norms: set[str]) -> tuple[str | None, str | None]:
    """The norms that attention and feed-forward read. `post_attention_layernorm` is the second's in most
    families, but a norm of the first's output if another one is named after the feed-forward."""
    first = f"{prefix}.input_layernorm"
    before, after = f"{prefix}.pre_feedforward_layernorm", f"{prefix}.post_attention_layernorm"
    if before in norms:
        second: str | None = before
    elif f"{prefix}.post_feedforward_layernorm" in norms:
        second = None
    else:  # a block with one norm computes both parts in parallel
        second = after if after in norms else first
    return (first if first in norms else None), (second if second in norms else None)


def _part(
    norm: str | None, shapes: Mapping[str, tuple[int, ...]], reads: tuple[str, ...], writes: str
) -> Part:
    matrices = [name for name, shape in shapes.items() if len(shape) > 1]
    readers = tuple(name for name in matrices if role_of(name) in reads and name.endswith(".weight"))
    writers = tuple(name for name in matrices if role_of(name) == writes and name.endswith(".weight"))
    return Part(
        norm=None if norm is None else f"{norm}.weight",
        readers=readers,
        writers=writers,
        strange=tuple(name for name in matrices if name not in readers and name not in writers),
        vectors=tuple(name for name in shapes if name not in matrices and not _HARMLESS.search(name)),
    )


def parent_of(name: str) -> str:
    """`a.b.c.weight` -> `a.b`: the module that a tensor's module belongs to."""
    return name.rpartition(".")[0].rpartition(".")[0]
