"""Fused expert tensors, seen as one weight for each expert.

transformers 5 keeps the experts of a block in two arrays; most checkpoints on disk, and everything
else in this package, have one matrix for each expert and projection:

    mlp.experts.gate_up_proj (e, 2f, h)  ->  mlp.experts.E.gate_proj.weight, .up_proj.weight  (f, h)
    mlp.experts.down_proj    (e, h, f)   ->  mlp.experts.E.down_proj.weight                   (h, f)

mixtral's own names for them are block_sparse_moe.experts.E.w1, w3 and w2, and block_sparse_moe.gate. `pieces`
is this table. `split_experts` applies it in one direction, filling a transformers block in the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from math import prod

from ..errors import ModelError
from ..lazy import torch
from .checkpoint import Checkpoint, LazyTensor

_FUSED = re.compile(r"^(.*)\.(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?$")
_NAMES = {
    "default": ("mlp.experts.{e}.{part}_proj.weight", {"gate": "gate", "up": "up", "down": "down"}),
    "mixtral": ("block_sparse_moe.experts.{e}.{part}.weight", {"gate": "w1", "up": "w3", "down": "w2"}),
}
Place = tuple[int, slice] | tuple[()]


def pieces(name: str, shape: tuple[int, ...], model_type: str | None) -> dict[str, Place]:
    """A tensor of a transformers model -> the tensors of a Checkpoint in it, and the place of
    each: `tensor[place]`. A tensor that is not fused is one piece, as a whole: `()`."""
    kind = "mixtral" if model_type == "mixtral" else "default"
    fused = _FUSED.match(name)
    if fused is None or len(shape) != 3:
        if kind == "mixtral" and name.endswith(".mlp.gate.weight"):
            name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        return {name: ()}
    roles = ("gate", "up") if fused[2] == "gate_up_proj" else ("down",)
    if shape[1] % len(roles):
        raise ModelError(f"{name!r} {shape}: {shape[1]} rows are not {len(roles)} weights of equal size")
    rows = shape[1] // len(roles)
    template, spelling = _NAMES[kind]
    return {
        f"{fused[1]}.{template.format(e=e, part=spelling[role])}": (e, slice(at * rows, (at + 1) * rows))
        for e in range(shape[0])
        for at, role in enumerate(roles)
    }


def split_experts(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with every fused expert tensor split into lazy `(n, k)` weights."""
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        for piece, place in pieces(name, tensor.shape, checkpoint.config.get("model_type")).items():
            tensors[piece] = _cut(tensor, piece, place) if place else replace(tensor, name=piece)
    return replace(checkpoint, tensors=tensors)


def _cut(tensor: LazyTensor, name: str, place: Place) -> LazyTensor:
    if tensor.quantized:
        raise ModelError(
            f"{tensor.file}: {tensor.name!r} {tensor.shape} {tensor.kind.name} cannot be split into experts; "
            "save the model with one float tensor for each expert"
        )
    assert len(place) == 2
    shape = (place[1].stop - place[1].start, tensor.shape[2])
    nbytes = tensor.nbytes * prod(shape) // prod(tensor.shape)
    return replace(tensor, name=name, shape=shape, nbytes=nbytes, load=_loader(tensor, place))


def _loader(tensor: LazyTensor, place: Place) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        whole = tensor.load()
        assert isinstance(whole, torch.Tensor)
        return whole[place]

    return load
