"""A checkpoint whose tensors are rewritten when they are loaded, without a copy in memory.

rewritten(checkpoint, {name: [f, g]}, {name: "bf16"}).tensors[name].load()
    = g(f(checkpoint.tensors[name].load().float())).to(bf16)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from ..dtypes import DType
from ..errors import ModelError
from ..files.checkpoint import Checkpoint, LazyTensor

Change = Callable[[torch.Tensor], torch.Tensor]


def rewritten(
    checkpoint: Checkpoint, changes: Mapping[str, Sequence[Change]], dtypes: Mapping[str, DType]
) -> Checkpoint:
    """The checkpoint with `changes` (f32 -> f32, of the same shape) applied in order to the named tensors,
    which get the types in `dtypes`. ModelError listing tensors that are already quantized."""
    bad = [name for name in changes if checkpoint.tensors[name].quantized]
    if bad:
        raise ModelError(
            f"{checkpoint.path}: {len(bad)} tensors to rewrite are quantized, {bad[0]!r} as "
            f"{checkpoint.tensors[bad[0]].kind.name}; rewrite the float model they were made from"
        )
    tensors = {
        name: lazily(tensor, name, changes[name], dtypes[name]) if name in changes else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def lazily(tensor: LazyTensor, name: str, changes: Sequence[Change], dtype: DType) -> LazyTensor:
    """`tensor` under `name`, changed when it is loaded."""

    def load() -> torch.Tensor:
        value = tensor.load()
        assert isinstance(value, torch.Tensor)
        value = value.float()
        for change in changes:
            value = change(value)
        return value.to(dtype.torch)

    nbytes = prod(tensor.shape) * dtype.itemsize
    return replace(tensor, name=name, kind=dtype, nbytes=nbytes, load=load)
