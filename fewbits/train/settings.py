"""DistillSettings: duration, loss, learning rates and arithmetic of training a whole model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..runtime.decode import faster_dtype
from .objective import LOSSES
from .optimizer import OPTIMIZERS, missing

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
PRECISIONS = ("auto", *TYPES)
AT_ONCE = 4096  # tokens that go through the model together, unless `micro` says otherwise


@dataclass(frozen=True)
class DistillSettings:
    """steps: of `batch` windows each, `micro` of them at once (default: AT_ONCE tokens), gradients summed.

    lr: the largest relative change of a block parameter in one step; lr_vectors: the same for norms and
    biases. Both rise over a tenth of the steps and fall to a tenth on a cosine. lr_codes: of the float
    weights that codes are rounded from, in spacings of the grid; 0: codes are fixed. It falls to 0 at FROZEN
    of the steps, after which only the other numbers move. damp: how strongly these weights are drawn to the
    value that they are rounded to, against codes that swing (Nagel et al., arXiv 2203.08550): in one step a
    share of the way of at most `damp` * lr_codes, growing from 0 over the run.

    loss: one of objective.LOSSES. top_k: the parent's k most probable tokens are kept instead of its hidden
    states, the others as one sum; 0: all. temperature: both distributions are softened by it.
    precision: of the matrix products: f32, bf16, f16 with loss scaling, or auto: bf16 where it is faster.
    optimizer: one of optimizer.OPTIMIZERS. clip: the largest norm of the gradient; 0: none. recompute: blocks
    run twice instead of keeping what is inside (gradient checkpointing).

    held_out: number of windows at the end that are used for evaluation only; every: steps between two
    evaluations. state: file to resume a killed run from, written at each evaluation and at least each
    `minutes`; the caller deletes it. device: of the quantized model as a whole, and of the reference's blocks
    in turn. keep_zeros: weights that are 0 at the start, as pruned ones are, stay 0."""

    steps: int = 200
    lr: float = 5e-4
    lr_vectors: float = 5e-4
    batch: int = 2
    seed: int = 0
    held_out: int = 8
    every: int = 25
    state: Path | None = None
    device: str = "cpu"
    lr_codes: float = 0.0
    micro: int | None = None
    damp: float = 0.0
    loss: str = "kl"
    top_k: int = 0
    temperature: float = 1.0
    precision: str = "f32"
    optimizer: str = "adamw"
    clip: float = 0.0
    recompute: bool = False
    minutes: float = 10.0
    keep_zeros: bool = False

    @property
    def share(self) -> float:
        """The part of KL divergence to the parent in the loss; at 0 the parent is not asked."""
        return LOSSES[self.loss]


def settings_faults(settings: DistillSettings, windows: int) -> list[str]:
    """What is wrong with the settings for a text of so many windows."""
    faults = []
    if windows < settings.held_out + settings.batch:
        faults.append(
            f"{windows} windows are too few for batches of {settings.batch} and {settings.held_out} held "
            "out; give more text, a smaller context, or smaller batches"
        )
    for name in ("steps", "batch", "held_out", "every"):
        if getattr(settings, name) < 1:
            faults.append(f"{name} is {getattr(settings, name)}; at least 1 is needed")
    for name in ("lr", "lr_vectors", "lr_codes"):
        if not 0 <= getattr(settings, name) < 1:
            faults.append(f"{name} is {getattr(settings, name)}; it is a share, from 0 up to 1")
    for name in ("damp", "top_k", "clip"):
        if not getattr(settings, name) >= 0:
            faults.append(f"{name} is {getattr(settings, name)}; it is 0 or more")
    if settings.micro is not None and settings.micro < 1:
        faults.append(f"micro is {settings.micro}; at least 1 window at once is needed")
    if not settings.temperature > 0:
        faults.append(f"temperature is {settings.temperature}; it is above 0")
    if settings.optimizer in OPTIMIZERS and (fault := missing(settings.optimizer)):
        faults.append(fault)
    known = {"loss": LOSSES, "precision": PRECISIONS, "optimizer": OPTIMIZERS}
    for name, words in known.items():
        if getattr(settings, name) not in words:
            faults.append(f"{name} is {getattr(settings, name)!r}; known: {', '.join(words)}")
    return faults


def arithmetic(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products for a precision; auto: bf16 where the device has it, faster than f32."""
    if name != "auto":
        return TYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return faster_dtype() if device.type == "cpu" else torch.float32


def products(kind: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Within, matrix products are in this type."""
    return nullcontext() if kind == torch.float32 else torch.autocast(device.type, kind)
