"""Fused expert tensors, seen as one weight for each expert.

transformers 5 keeps the experts of a block in two arrays; most checkpoints on disk, and everything
else in this package, have one matrix for each expert and projection:

    mlp.experts.gate_up_proj (e, 2f, h)  ->  mlp.experts.E.gate_proj.weight, .up_proj.weight  (f, h)
    mlp.experts.down_proj    (e, h, f)   ->  mlp.experts.E.down_proj.weight                   (h, f)

mixtral's own names for them are block_sparse_moe.experts.E.w1, w3 and w2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch

from ..errors import ModelError
from .base import Checkpoint, LazyTensor

_FUSED = re.compile(r"^(.*)\.(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?$")
_NAMES = {
    "default": ("mlp.experts.{e}.{part}_proj.weight", {"gate": "gate", "up": "up", "down": "down"}),
    "mixtral": ("block_sparse_moe.experts.{e}.{part}.weight", {"gate": "w1", "up": "w3", "down": "w2"}),
}


def split_experts(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with every fused expert tensor cut into lazy `(n, k)` weights."""
    kind = "mixtral" if checkpoint.config.get("model_type") == "mixtral" else "default"
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        fused = _FUSED.match(name)
        if fused and len(tensor.shape) == 3:
            tensors |= _parts(tensor, fused[1], fused[2], kind)
        elif kind == "mixtral" and name.endswith(".mlp.gate.weight"):
            name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
            tensors[name] = replace(tensor, name=name)
        else:
            tensors[name] = tensor
    return replace(checkpoint, tensors=tensors)


def _parts(tensor: LazyTensor, block: str, fused: str, kind: str) -> dict[str, LazyTensor]:
    experts, n, k = tensor.shape
    roles = ("gate", "up") if fused == "gate_up_proj" else ("down",)
    if n % len(roles) or tensor.quantized:
        raise ModelError(
            f"{tensor.file}: {tensor.name!r} {tensor.shape} {tensor.dtype} cannot be cut into experts; "
            "save the model with one float tensor for each expert"
        )
    rows = n // len(roles)
    template, spelling = _NAMES[kind]
    found = {}
    for e in range(experts):
        for place, role in enumerate(roles):
            name = f"{block}.{template.format(e=e, part=spelling[role])}"
            found[name] = replace(
                tensor,
                name=name,
                shape=(rows, k),
                nbytes=tensor.nbytes * rows * k // prod(tensor.shape),
                load=_loader(tensor, e, place * rows, rows),
            )
    return found


def _loader(tensor: LazyTensor, expert: int, start: int, rows: int) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        whole = tensor.load()
        assert isinstance(whole, torch.Tensor)
        return whole[expert, start : start + rows]

    return load
