"""Optimizers by name: torch's AdamW, and those of bitsandbytes with moments in 8 bits, where it is installed.

adamw                 8 bytes of moments for each number
adamw_8bit            2 bytes                            (Dettmers et al., arXiv 2110.02861)
paged_adamw_8bit      the same, which CUDA moves to the CPU's memory when a GPU's is short
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from ..errors import CalibrationError

OPTIMIZERS = {"adamw": "", "adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
BETAS = (0.9, 0.95)
TINY = 1e-12  # added to Adam's root mean square: gradients of single scales are as small as 1e-8


def missing(name: str) -> str | None:
    """What a known optimizer needs and is not installed, with the way out."""
    if not OPTIMIZERS[name] or find_spec("bitsandbytes") is not None:
        return None
    return (
        f"optimizer {name} is of bitsandbytes, which is not installed; pip install bitsandbytes, or use adamw"
    )


def optimizer_of(
    name: str, groups: Sequence[Mapping[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    """Parameter groups, as torch has them -> an optimizer without weight decay. CalibrationError where
    bitsandbytes is needed and not there."""
    given: Any = [dict(group) for group in groups]
    more: dict[str, Any] = {"lr": 0.0, "betas": BETAS, "eps": TINY, "weight_decay": 0.0}
    if not OPTIMIZERS[name]:
        return torch.optim.AdamW(given, fused=device.type in ("cpu", "cuda"), **more)
    if fault := missing(name):
        raise CalibrationError(fault)
    import bitsandbytes

    # Its own eps keeps 8-bit moments from dividing by what they rounded to nothing.
    more["eps"] = 1e-8
    made: torch.optim.Optimizer = getattr(bitsandbytes.optim, OPTIMIZERS[name])(given, **more)
    return made
