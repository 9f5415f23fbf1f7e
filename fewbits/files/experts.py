"""Fused expert tensors, seen as one weight for each expert.

transformers 5 keeps the experts of a block in two arrays; most checkpoints on disk, and everything
else in this package, have one matrix for each expert and projection:

    mlp.experts.gate_up_proj (e, 2f, h)  ->  mlp.experts.E.gate_proj.weight, .up_proj.weight  (f, h)
    mlp.experts.down_proj    (e, h, f)   ->  mlp.experts.E.down_proj.weight                   (h, f)

mixtral's own names for them are block_sparse_moe.experts.E.w1, w3 and w2, and block_sparse_moe.gate. Arrays
of other models get names of ours, transposed where the model has (e, in, out):

    feed_forward.experts.gate_up_proj (e, h, 2f)  ->  ...gate_up_proj.experts.E.weight (2f, h)
    ffn.experts.mlp.w2 (e * f, h)                 ->  ...w2.experts.E.weight (h, f)

`split_experts` and `joined` apply these in the two directions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from ..errors import ModelError
from ..lazy import torch
from ..model.sites import SMALLEST, expert_counts, text_config
from .checkpoint import Checkpoint, LazyTensor

_FUSED = re.compile(r"^(.*)\.(mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?$")
_WRITES = re.compile(r"down|output|w2|fc2|o_proj")  # a projection that writes hidden states
_NAMES = {
    "default": ("{parent}.experts.{e}.{part}_proj.weight", {"gate": "gate", "up": "up", "down": "down"}),
    "mixtral": ("block_sparse_moe.experts.{e}.{part}.weight", {"gate": "w1", "up": "w3", "down": "w2"}),
}


class Place(NamedTuple):
    """A part of an array: `whole[at]`, a transposed matrix or not."""

    at: tuple[int | slice, ...] = ()
    transposed: bool = False

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        part = whole[self.at] if self.at else whole
        return part.mT if self.transposed else part


WHOLE = Place()


def place_of(whole: torch.Tensor, part: torch.Tensor) -> Place | None:
    """Where a view lies in a contiguous tensor; None for a view that is no block of it."""
    if part.is_same_size(whole) and part.stride() == whole.stride():
        return WHOLE
    rest, starts = int(part.storage_offset()), []
    for stride in whole.stride():
        start, rest = divmod(rest, max(stride, 1))
        starts.append(start)
    for dropped in [None] if part.ndim == whole.ndim else range(whole.ndim):
        for transposed in (False, True)[: part.ndim]:
            sizes = list(part.mT.shape if transposed else part.shape)
            if dropped is not None:
                sizes.insert(dropped, 1)
            at: list[int | slice] = [slice(a, a + size) for a, size in zip(starts, sizes, strict=False)]
            if dropped is not None:
                at[dropped] = starts[dropped]
            place = Place(tuple(at), transposed)
            seen = place.of(whole)
            if _layout(seen) == _layout(part):
                return place
    return None


def _layout(tensor: torch.Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


def arrays(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, dict[str, Place]]:
    """Arrays of experts among named shapes -> the weights of single experts in each, and their places.

    A stack has a matrix `(n, k)` or its transpose for each expert of the config; the side that equals the
    model's width is the input of what reads hidden states, and the output of what writes them.
    """
    text = text_config(config)
    counts = expert_counts(config)
    width = text.get("hidden_size") or text.get("d_model")
    found: dict[str, dict[str, Place]] = {}
    for name, shape in shapes.items():
        found |= _flat_pieces(name, shape, counts, width)
        stacked = len(shape) == 3 and (shape[0] in counts or (shape[0] == 1 and "experts" in name))
        if not stacked or min(shape[1:]) < SMALLEST or "conv" in name:
            continue
        stacks = [
            other for other in shapes if other.rpartition(".experts.")[0] == name.rpartition(".experts.")[0]
        ]
        turned = _transposed(stacks if ".experts." in name else [name], shapes, width)
        found[name] = (not turned and _known_pieces(name, shape, config.get("model_type"))) or {
            f"{name.removesuffix('.weight')}.experts.{e}.weight": Place((e,), turned) for e in range(shape[0])
        }
    return found


def _flat_pieces(
    name: str, shape: tuple[int, ...], counts: Set[int], width: int | None
) -> dict[str, dict[str, Place]]:
    """The weights in a parameter `(e * f, h)`, below each other; what writes hidden states is transposed."""
    parts = name.split(".")
    if len(shape) != 2 or shape[1] != width or "experts" not in parts or parts[-1] == "weight":
        return {}
    for count in counts:
        rows, rest = divmod(shape[0], count)
        if not rest and rows >= SMALLEST:
            turned = bool(_WRITES.search(name.rpartition(".")[2]))
            places = [Place((slice(e * rows, (e + 1) * rows),), turned) for e in range(count)]
            return {name: {f"{name}.experts.{e}.weight": place for e, place in enumerate(places)}}
    return {}


def _transposed(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], width: int | None) -> bool:
    """Whether stacks `(e, a, b)` of one module have inputs along a."""
    for name in names:
        if len(shapes[name]) == 3 and (shapes[name][1] == width) != (shapes[name][2] == width):
            return (shapes[name][1] == width) != bool(_WRITES.search(name))
    return False


def _known_pieces(name: str, shape: tuple[int, ...], model_type: str | None) -> dict[str, Place] | None:
    """The weights in an array under the names that most checkpoints have."""
    fused = _FUSED.match(name)
    roles = ("gate", "up") if fused and fused[3] == "gate_up_proj" else ("down",)
    if fused is None or shape[1] % len(roles):
        return None
    rows = shape[1] // len(roles)
    template, spelling = _NAMES["mixtral" if model_type == "mixtral" else "default"]
    return {
        f"{fused[1]}.{template.format(parent=fused[2], e=e, part=spelling[role])}": Place(
            (e, slice(at * rows, (at + 1) * rows))
        )
        for e in range(shape[0])
        for at, role in enumerate(roles)
    }


def split_experts(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with every fused expert tensor split into lazy `(n, k)` weights."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if not checkpoint.gguf_keys}
    made_of = arrays(shapes, checkpoint.config)
    mixtral = checkpoint.config.get("model_type") == "mixtral"
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if name in made_of:
            tensors |= {piece: _cut(tensor, piece, place) for piece, place in made_of[name].items()}
        elif mixtral and name.endswith(".mlp.gate.weight"):
            name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
            tensors[name] = replace(tensor, name=name)
        else:
            tensors[name] = tensor
    return replace(checkpoint, tensors=tensors)


def joined(
    pieces: Mapping[str, torch.Tensor], places: Mapping[str, Place], shape: Sequence[int]
) -> torch.Tensor:
    """The array that `arrays` has split into these weights."""
    whole = torch.empty(*shape, dtype=next(iter(pieces.values())).dtype)
    for name, place in places.items():
        place.of(whole).copy_(pieces[name])
    return whole


def _cut(tensor: LazyTensor, name: str, place: Place) -> LazyTensor:
    if tensor.quantized:
        raise ModelError(
            f"{tensor.file}: {tensor.name!r} {tensor.shape} {tensor.kind.name} cannot be split into experts; "
            "save the model with one float tensor for each expert"
        )
    shape = tuple(place.of(torch.empty(tensor.shape, device="meta")).shape)
    nbytes = tensor.nbytes * prod(shape) // prod(tensor.shape)
    return replace(tensor, name=name, shape=shape, nbytes=nbytes, load=_loader(tensor, place))


def _loader(tensor: LazyTensor, place: Place) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        whole = tensor.load()
        assert isinstance(whole, torch.Tensor)
        return place.of(whole)

    return load
