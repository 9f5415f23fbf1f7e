"""What a run over the blocks is asked for, and how the model is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import torch

from ...blocks.activations import DEFAULT_LIMIT
from ...calibrate.tokens import Tokens
from ...devices import AUTO, device_of
from ...files.checkpoint import Checkpoint
from ...plan.method import Method
from ...train.settings import DistillSettings
from ..task import Spec

BEFORE_TRAINING = 524288  # tokens
WIDEST = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Streaming:
    """How a model is run.

    activation_memory: bytes of hidden states kept in memory, the rest lies in a scratch file in `scratch`.
    batch: sequences at once, fewer where a block is wide. device: by name, of the model, its Hessians and the
    choice of codes; "auto": a GPU where there is one with room. dtype: of the model's arithmetic; None: bf16
    on a GPU, f32 on the CPU.
    """

    activation_memory: int = DEFAULT_LIMIT
    scratch: Path | None = None
    batch: int = 8
    device: str = AUTO
    dtype: torch.dtype = None  # type: ignore[assignment]  # never, once it is made
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype is None:
            on_cpu = self.place.type == "cpu"
            object.__setattr__(self, "dtype", torch.float32 if on_cpu else torch.bfloat16)

    @property
    def place(self) -> torch.device:
        """The device itself. KernelError for one that is not here."""
        return device_of(self.device)

    def rows(self, context: int, width: int) -> int:
        """Sequences at once, so that one activation of `width` columns takes WIDEST bytes at most."""
        return min(self.batch, max(1, WIDEST // (4 * context * width)))


@dataclass(frozen=True)
class Note:
    """A line for the receipt. kind: of those that stand there once, with their number; None: by itself."""

    text: str
    kind: str | None = None


@dataclass(frozen=True)
class Run:
    """A calibrated run: what each weight is to get, and what it is done with. strict: too few tokens
    are an error. activations: the scheme of inputs at run time, which training has too."""

    checkpoint: Checkpoint
    specs: Mapping[str, Spec]
    method: Method
    tokens: Tokens
    streaming: Streaming = field(default_factory=Streaming)
    strict: bool = False
    activations: str | None = None

    @property
    def calibration(self) -> torch.Tensor:
        """The windows of the text that codes are chosen on: all, but where the model is trained after that
        none of those held out, and BEFORE_TRAINING tokens at most, spread over the others."""
        windows = self.tokens.windows
        if not self.method.train:
            return windows
        n = max(1, len(windows) - DistillSettings(**self.method.training()).held_out)
        wanted = min(n, max(1, BEFORE_TRAINING // windows.shape[1]))
        return windows[[ceil(i * n / wanted) for i in range(wanted)]]
