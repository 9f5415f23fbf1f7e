"""The rounding of a weight's input in llama.cpp, by the weight's type.

    q4_0 q5_0 q8_0 q4_1 q5_1 iq4_nl mxfp4      Q8_0, Q8_1: int8 codes, one f16 scale for 32 values
    K, IQ and TQ types                         Q8_K: int8 codes, one f32 scale for 256 values
    f16, bf16, f32                             the type itself

A few channels of some inputs are a hundred times larger than the rest, and one such value sets the scale of
its whole block. Then this rounding costs more than that of the weights. (Q8_1 also stores the sum of a block
in f16, with no visible effect.) Source: ggml, quantize_row_q8_0_ref, quantize_row_q8_K_ref;
tests/engines/test_types.py compares with the engine itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..dtypes import DTYPES
from ..files.checkpoint import Checkpoint
from ..formats import FORMATS
from .simulate import Change


def rounded_32(x: torch.Tensor) -> torch.Tensor:
    """`(..., k)` f32 -> its values in Q8_0."""
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    return ((blocks * inverse).round() * (largest / 127).half().float()).flatten(-2)


def rounded_256(x: torch.Tensor) -> torch.Tensor:
    """`(..., k)` f32 -> its values in Q8_K: that of largest magnitude gets code -127 for either sign."""
    blocks = x.unflatten(-1, (-1, 256))
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = torch.where(extreme != 0, -127 / extreme, 0.0)
    codes = (blocks * scale).round().clamp(max=127)
    return torch.where(scale != 0, codes / scale, 0.0).flatten(-2)


def rounding(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The rounding of the inputs of a weight in format `name`."""
    if name in DTYPES:
        return lambda x: x.to(DTYPES[name].torch).float()
    return rounded_32 if FORMATS.get(name).block == 32 else rounded_256


def engine_rounding(checkpoint: Checkpoint) -> Change:
    """For `simulate.changed_inputs`: the inputs of a GGUF file's weights, rounded like in its engine."""

    def change(site: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        tensor = checkpoint.tensors.get(site)  # a fused tensor of experts is not listed
        return x if tensor is None else rounding(tensor.dtype)(x.float()).to(x.dtype)

    return change
