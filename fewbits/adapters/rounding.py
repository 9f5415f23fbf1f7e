"""How engines round the input of a weight before they multiply, by the weight's type.

    llama.cpp
    q4_0 q5_0 q8_0 q4_1 q5_1 iq4_nl mxfp4      Q8_0, Q8_1: int8 codes, one f16 scale for 32 values
    K, IQ and TQ types                         Q8_K: int8 codes, one f32 scale for 256 values
    f16, bf16, f32                             the type itself
    bitsandbytes
    int8_absmax                                int8 codes, one scale a token; columns in which any token
                                               exceeds 6 stay as they are (LLM.int8(), arXiv 2208.07339)

A few channels of some inputs are a hundred times larger than the rest, and one such value takes the scale of
its whole block: then this costs more than the weights' own rounding. (Q8_1 also keeps the sum of a block in
f16, of which nothing is to be seen beside that.) Source: ggml, quantize_row_q8_0_ref, quantize_row_q8_K_ref,
held by tests/engines/test_types.py against the engine itself; bitsandbytes 0.50, backends/default/ops.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..files.base import Checkpoint
from ..formats import FLOATS, FORMATS

OUTLIER = 6.0  # llm_int8_threshold where a config says none
Change = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


def rounded_32(x: torch.Tensor) -> torch.Tensor:
    """`(..., k)` f32 -> what Q8_0 holds of it."""
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    return ((blocks * inverse).round() * (largest / 127).half().float()).flatten(-2)


def rounded_256(x: torch.Tensor) -> torch.Tensor:
    """`(..., k)` f32 -> what Q8_K holds: the value of largest magnitude gets code -127, whatever its sign."""
    blocks = x.unflatten(-1, (-1, 256))
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = torch.where(extreme != 0, -127 / extreme, 0.0)
    codes = (blocks * scale).round().clamp(max=127)
    return torch.where(scale != 0, codes / scale, 0.0).flatten(-2)


def rounding(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the engine does to the inputs of a weight in format `name`."""
    if name in FLOATS:
        return lambda x: x.to(FLOATS[name]).float()
    return rounded_32 if FORMATS.get(name).block == 32 else rounded_256


def rounded_token(x: torch.Tensor) -> torch.Tensor:
    """`(..., k)` f32 -> what LLM.int8() holds of it."""
    kept = (x.abs() > OUTLIER).reshape(-1, x.shape[-1]).any(0)
    inner = torch.where(kept, 0.0, x)
    scale = inner.abs().amax(-1, keepdim=True) / 127
    return torch.where(kept, x, (inner / torch.where(scale > 0, scale, 1.0)).round() * scale)


def engine_rounding(checkpoint: Checkpoint) -> Change | None:
    """For `simulate.changed_inputs`: the inputs of a file's weights, rounded as its engine does. None for a
    file type whose engine rounds none, or as its own directory says."""
    if checkpoint.kind == "gguf":
        return _changed(checkpoint, rounding)
    if checkpoint.metadata.get("layout") == "bitsandbytes":
        return _changed(checkpoint, lambda name: rounded_token if name == "int8_absmax" else None)
    return None


def _changed(
    checkpoint: Checkpoint, of: Callable[[str], Callable[[torch.Tensor], torch.Tensor] | None]
) -> Change:
    def change(site: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        tensor = checkpoint.tensors.get(site)  # a fused tensor of experts has no row here
        rounded = None if tensor is None else of(tensor.dtype)
        return x if rounded is None else rounded(x.float()).to(x.dtype)

    return change
