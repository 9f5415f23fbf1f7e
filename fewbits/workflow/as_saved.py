"""as_saved(): a checkpoint as transformers' own class saves it, where its loader needs that.

    mlp.experts.gate_up_proj.experts.E.weight (2f, h), floats   ->   mlp.experts.gate_up_proj (e, h, 2f)

transformers joins experts that lie one by one only under the names of its weight conversion mapping. Others
are put together again here, unless they are quantized: `runtime/hf_quantizer.py` joins those when they load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod

import torch

from ..adapters.transformers import decoded, unknown_experts
from ..dtypes import DType
from ..files.checkpoint import Checkpoint, LazyTensor
from ..files.experts import Place, joined
from ..formats.base import Kind


def as_saved(checkpoint: Checkpoint, kinds: Mapping[str, Kind]) -> Checkpoint:
    """The checkpoint with arrays of experts whole, where all of an array's weights are written as floats.

    kinds: of the output's tensors. An array of which some are quantized stays in single weights.
    """
    wholes: dict[str, LazyTensor] = {}
    for name, (places, shape) in unknown_experts(checkpoint).items():
        found = {kinds.get(piece) for piece in places}
        kind = found.pop()
        if found or not isinstance(kind, DType):
            continue
        pieces = {piece: checkpoint.tensors[piece] for piece in places}
        load = partial(_join, pieces, places, shape, kind.torch)
        file = checkpoint.tensors[next(iter(places))].file
        nbytes = prod(shape) * kind.torch.itemsize
        wholes |= dict.fromkeys(places, LazyTensor(name, shape, kind, nbytes, file, load))
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        tensor = wholes.get(name, tensor)
        tensors[tensor.name] = tensor
    return replace(checkpoint, tensors=tensors) if wholes else checkpoint


def _join(
    pieces: Mapping[str, LazyTensor], places: Mapping[str, Place], shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    return joined({name: decoded(tensor.load(), dtype) for name, tensor in pieces.items()}, places, shape)
