"""Pairs: places where a scale can move from an activation to the weights that read it.

    producers / s  -->  x / s  -->  consumers * s          s (columns,) > 0: the function is the same

    norm     -> q k v              norm' = norm / s,  W' = W diag(s)
    norm     -> gate up router, of every expert
    v        -> o                  rows of v and its bias; one s for each column of a key-value head,
                                   repeated for the query heads that share it
    up       -> down               rows of up: act(gate) * up is linear in up; each expert alone

A norm (or bias) is stored with few bits, so not every s is possible: `settled` rounds norm / s to its stored
type and derives s from the result, so that storing is exact. A producer or consumer in bf16 is rounded when
stored, like any rewritten weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..calibrate.stats import Stats
from ..dtypes import F32, DType
from ..errors import ModelError
from ..files.checkpoint import Checkpoint, LazyTensor
from ..model.archs import complete
from ..model.sites import role_of
from .rewrite import Change, rewritten
from .structure import Block, Part, blocks_of, norm_offset, parent_of

Choice = tuple["Pair", torch.Tensor]
# A wider range of scales could push block scales out of f16.
WIDEST = 2.0**12


@dataclass(frozen=True)
class Vector:
    """A norm weight or bias among the producers, with the effective value weight + offset; dtype: as
    stored."""

    name: str
    dtype: torch.dtype
    start: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class Rows:
    """Rows `start ...` of a weight `(n, k)` among the producers."""

    name: str
    start: int = 0


@dataclass(frozen=True)
class Pair:
    """Producers and consumers of one activation. size: entries of its scale.

    head, repeat: each run of `head` entries applies to `repeat` runs of the consumers' columns.
    """

    name: str
    size: int
    consumers: tuple[str, ...]
    vector: Vector | None = None
    rows: Rows | None = None
    head: int = 1
    repeat: int = 1

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """`(size,)` -> `(size * repeat,)`: one entry for each column of a consumer."""
        return scale.reshape(-1, self.head).repeat_interleave(self.repeat, 0).reshape(-1)

    def gathered(self, columns: torch.Tensor, reduce: str) -> torch.Tensor:
        """`(size * repeat,)` -> `(size,)`: columns that share an entry become their "amax" or "mean"."""
        shared = columns.reshape(-1, self.repeat, self.head)
        return (shared.amax(1) if reduce == "amax" else shared.mean(1)).reshape(-1)

    def names(self) -> list[str]:
        """Every tensor that the pair rewrites."""
        return [part.name for part in (self.vector, self.rows) if part] + list(self.consumers)


def find_pairs(checkpoint: Checkpoint, block: int | None = None) -> list[Pair]:
    """The exact pairs of one block, or of all.

    Left out: a LayerNorm with a bias (two stored vectors cannot both be divided exactly), attention or
    experts with a norm or a matrix of unknown use inside, feed-forwards without a gate.
    """
    pairs = []
    for each in blocks_of(checkpoint.tensors):
        if block is None or each.index == block:
            pairs += _norm_pairs(checkpoint, each)
            pairs += _value_pairs(checkpoint, each)
            pairs += _up_pairs(checkpoint, each.mlp)
    return pairs


def settled(weights: Mapping[str, torch.Tensor], pair: Pair, scale: torch.Tensor) -> torch.Tensor:
    """A scale `(size,)` -> the nearest that can be stored: geometric mean 1, range bounded, and
    exact for the pair's vector. ModelError if it is not positive and finite."""
    scale = scale.float()
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise ModelError(f"{pair.name}: a scale is not positive and finite; check the statistics")
    scale = scale / scale.log().mean().exp()
    scale = scale.clamp(1 / WIDEST, WIDEST)
    if pair.vector is None:
        return scale
    old = _entries(weights[pair.vector.name], pair).float() + pair.vector.offset
    new = _stored(old / scale, pair.vector) + pair.vector.offset
    exact = old / new
    return torch.where(old == 0, scale, torch.where((exact > 0) & torch.isfinite(exact), exact, 1.0))


def apply(weights: Mapping[str, torch.Tensor], pair: Pair, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """`{name: tensor}` of a block and a settled scale -> the rewritten entries only, f32."""
    return {name: change(weights[name].float()) for name, change in changes(pair, scale).items()}


def applied(weights: Mapping[str, torch.Tensor], chosen: Sequence[Choice]) -> dict[str, torch.Tensor]:
    """The entries rewritten by several pairs, one after the other."""
    new: dict[str, torch.Tensor] = {}
    for pair, scale in chosen:
        new |= apply({name: new.get(name, weights[name]) for name in pair.names()}, pair, scale)
    return new


def scaled(checkpoint: Checkpoint, chosen: Sequence[Choice]) -> Checkpoint:
    """The same model with pairs scaled, lazily: matrices become f32, vectors keep their dtype."""
    work: dict[str, list[Change]] = {}
    dtypes: dict[str, DType] = {}
    for pair, scale in chosen:
        for name, change in changes(pair, scale).items():
            work.setdefault(name, []).append(change)
            is_vector = pair.vector is not None and name == pair.vector.name
            kind = checkpoint.tensors[name].kind
            dtypes[name] = kind if is_vector and isinstance(kind, DType) else F32
    return rewritten(checkpoint, work, dtypes)


def changes(pair: Pair, scale: torch.Tensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """name -> the function that applies a settled scale to that tensor, f32 -> f32."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    vector, rows = pair.vector, pair.rows

    def divide_vector(w: torch.Tensor) -> torch.Tensor:
        assert vector is not None
        w, part = w.clone(), slice(vector.start, vector.start + pair.size)
        w[part] = _stored((w[part] + vector.offset) / scale, vector)
        return w

    def divide_rows(w: torch.Tensor) -> torch.Tensor:
        assert rows is not None
        w, part = w.clone(), slice(rows.start, rows.start + pair.size)
        w[part] = w[part] / scale[:, None]
        return w

    if vector is not None:
        functions[vector.name] = divide_vector
    if rows is not None:
        functions[rows.name] = divide_rows
    columns = pair.spread(scale)
    return functions | {name: lambda w: w * columns for name in pair.consumers}


def rescaled(stats: Stats, pair: Pair, scale: torch.Tensor) -> Stats:
    """A consumer's statistics after the pair was scaled: those of x / s."""
    s = pair.spread(scale)
    outer = s[:, None] * s
    return replace(
        stats,
        absmax=None if stats.absmax is None else stats.absmax / s,
        mean_square=stats.mean_square / s.square(),
        hessian=None if stats.hessian is None else stats.hessian / outer,
        mismatch=None if stats.mismatch is None else stats.mismatch / outer,
    )


def _entries(vector: torch.Tensor, pair: Pair) -> torch.Tensor:
    assert pair.vector is not None
    return vector[pair.vector.start : pair.vector.start + pair.size]


def _stored(effective: torch.Tensor, vector: Vector) -> torch.Tensor:
    """The effective value of a vector -> its stored value, in f32."""
    return (effective - vector.offset).to(vector.dtype).float()


# ---- discovery -----------------------------------------------------------------------------------


def _norm_pairs(checkpoint: Checkpoint, block: Block) -> list[Pair]:
    tensors, offset = checkpoint.tensors, norm_offset(checkpoint)
    pairs = []
    for norm in dict.fromkeys([block.attention.norm, block.mlp.norm]):
        if norm is None:
            continue
        parts = [part for part in (block.attention, block.mlp) if part.norm == norm]
        readers = tuple(name for part in parts for name in part.readers)
        bias = norm.removesuffix("weight") + "bias" in tensors
        size = tensors[norm].shape[0]
        same = all(tensors[name].shape[1] == size for name in readers)
        if bias or not same or not readers or any(part.strange for part in parts):
            continue
        vector = Vector(norm, _dtype(tensors[norm]), 0, offset)
        pairs.append(Pair(norm.removesuffix(".weight"), size, readers, vector=vector))
    return pairs


def _value_pairs(checkpoint: Checkpoint, block: Block) -> list[Pair]:
    tensors, part = checkpoint.tensors, block.attention
    if len(part.writers) != 1 or part.strange or part.vectors:
        return []
    rows = value_rows(checkpoint, part)
    if rows is None:
        return []
    source, start, size, head = rows
    (o,) = part.writers
    repeat, rest = divmod(tensors[o].shape[1], size)
    if rest or size % head:
        return []
    pair = Pair(
        source.removesuffix(".weight") + " > o",
        size,
        (o,),
        vector=_bias(tensors, source, start),
        rows=Rows(source, start),
        head=head,
        repeat=repeat,
    )
    return [pair]


def value_rows(checkpoint: Checkpoint, part: Part) -> tuple[str, int, int, int] | None:
    """The rows that produce the values of an attention: weight, first row, rows, rows of a head; or None."""
    tensors, config = checkpoint.tensors, complete(checkpoint.config)
    heads, shared, head = (
        int(config.get(field) or 0) for field in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if not (heads and shared and head):
        return None
    values = [name for name in part.readers if role_of(name) == "v"]
    fused = [name for name in part.readers if name.endswith(".qkv_proj.weight")]
    if len(values) == 1 and tensors[values[0]].shape[0] == shared * head:
        return values[0], 0, shared * head, head
    if len(fused) == 1 and tensors[fused[0]].shape[0] == (heads + 2 * shared) * head:
        return fused[0], (heads + shared) * head, shared * head, head
    return None


def _up_pairs(checkpoint: Checkpoint, part: Part) -> list[Pair]:
    """up -> down of every expert with up, down and gate."""
    tensors = checkpoint.tensors
    pairs = []
    for down in part.writers:
        parent = parent_of(down)
        beside = {role_of(name): name for name in part.readers if parent_of(name) == parent}
        size = tensors[down].shape[1]
        between = any(name.startswith(f"{parent}.") for name in part.vectors)
        if "gate" in beside and "up" in beside:
            name, start, rows = beside["up"], 0, size
        elif "gate_up" in beside:  # transformers splits it in halves, the gate first
            name, start, rows = beside["gate_up"], size, 2 * size
        else:
            continue
        if between or tensors[name].shape[0] != rows:
            continue
        pair = Pair(f"{parent}.up > down", size, (down,), _bias(tensors, name, start), Rows(name, start))
        pairs.append(pair)
    return pairs


def _bias(tensors: Mapping[str, LazyTensor], weight: str, start: int) -> Vector | None:
    bias = weight.removesuffix("weight") + "bias"
    return Vector(bias, _dtype(tensors[bias]), start) if bias in tensors else None


def _dtype(tensor: LazyTensor) -> torch.dtype:
    if not isinstance(tensor.kind, DType) or not tensor.kind.weight:
        raise ModelError(
            f"{tensor.name}: a scale cannot be divided into a vector stored as {tensor.dtype}; "
            "use a checkpoint with float norms and biases"
        )
    return tensor.kind.torch
