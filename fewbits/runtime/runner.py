"""Runner: tokens -> logits, which is all that evaluation, verification and distillation know of a model.

    Whole        a transformers model in memory, float or with its quantized weights packed; has a cache
    Blockwise    one block in memory at a time, read from the mapped file; all windows pass a block together
    InEngine     an engine that users run the file in, in a process of its own

Each says what memory it needs before it starts, from headers alone; `choose` takes the first that fits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..adapters.forward import text_logits
from ..adapters.transformers import load_model
from ..blocks.activations import DEFAULT_LIMIT, Activations
from ..blocks.block import Block
from ..blocks.model import BlockModel
from ..engines import engines_of
from ..engines.process import Process
from ..errors import KernelError, ModelError, PlanError
from ..files.checkpoint import Checkpoint
from ..formats.base import AT_ONCE, Format
from ..memory import free_memory
from ..model.sites import per_block, sites
from .load import load_packed

SLICE = 128  # positions whose logits are computed at once
SPARE = 256 * 2**20  # what a forward pass takes besides: activations, buffers of products


class Runner(ABC):
    """kind: for people. cached: can it continue a text, with a cache of keys and values? seconds: what its
    forward passes have taken. device: where they run."""

    kind: str
    cached = False

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        self.checkpoint, self.dtype, self.seconds = checkpoint, dtype, 0.0
        self.device = torch.device(device)

    @property
    def where(self) -> str:
        """For `kind`."""
        return "" if self.device.type == "cpu" else f" on {self.device}"

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = perf_counter()
        yield
        self.seconds += perf_counter() - began

    @abstractmethod
    def needs(self, windows: int, context: int) -> int:
        """Bytes of memory, of its device, for `windows` windows of `context` tokens, besides what the process
        has now."""

    @abstractmethod
    def logits(self, windows: torch.Tensor, first: int = 0) -> Iterator[torch.Tensor]:
        """`(w, t)` int64 -> for each window in turn, `(t - first, vocabulary)` f32 on its device: of the
        positions from `first` on. ModelError where an output is not finite."""

    @property
    def model(self) -> Any:
        """The transformers model, where there is one in memory."""
        raise ModelError(f"{self.checkpoint.path}: runs {self.kind}; nothing of it is in memory as a whole")


class Whole(Runner):
    """packed: quantized weights stay as they are, and are decoded at each use."""

    cached = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        packed: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(checkpoint, dtype, device)
        self.packed = packed
        self.kind = f"whole, {'packed' if packed else str(dtype).removeprefix('torch.')}{self.where}"

    def needs(self, windows: int, context: int) -> int:
        tensors = self.checkpoint.tensors.values()
        held = sum(
            tensor.nbytes if self.packed and tensor.quantized else self.dtype.itemsize * prod(tensor.shape)
            for tensor in tensors
        )
        largest = max((prod(tensor.shape) for tensor in tensors), default=0)
        decoded = min(largest, AT_ONCE) if self.packed else largest
        return held + 2 * 4 * decoded + context * widest(self.checkpoint) * 8 + SPARE

    @cached_property
    def model(self) -> Any:
        model: Any = (load_packed if self.packed else load_model)(self.checkpoint, self.dtype)
        return model.to(self.device)

    def logits(self, windows: torch.Tensor, first: int = 0) -> Iterator[torch.Tensor]:
        model, kept = self.model, windows.shape[1] - first
        for i, window in enumerate(windows):
            with torch.inference_mode(), self._timed():
                logits = text_logits(model, window[None], kept)
            yield _checked(self.checkpoint, i, logits[0].float())


class Blockwise(Runner):
    """The passes are `start`, `step` for each block, `logits_of` a window; `logits` is all of them. So that
    two models can go side by side, block by block.

    limit: bytes of hidden states in memory; the rest lies in a scratch file in `scratch`.
    """

    kind = "block by block"

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        limit: int = DEFAULT_LIMIT,
        scratch: Path | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(checkpoint, dtype, device)
        self.kind += self.where
        self.limit, self.scratch = limit, scratch
        self.hidden: Activations = Activations((), limit, scratch)

    def needs(self, windows: int, context: int) -> int:
        return needs_side_by_side([self], windows, context)

    def sizes(self, windows: int, context: int) -> tuple[int, int, int, int, int]:
        """Bytes: largest block and table in f32, the largest tensor in its file, hidden states, logits."""
        blocks = per_block(self.checkpoint, lambda site: prod(site.shape))
        outside = [prod(s.shape) for s in sites(self.checkpoint) if s.role in ("embed", "output")]
        width = min((min(s.shape) for s in sites(self.checkpoint) if s.role == "embed"), default=0)
        hidden = min(self.limit, windows * context * width * self.dtype.itemsize)
        stored = max((tensor.nbytes for tensor in self.checkpoint.tensors.values()), default=0)
        logits = context * widest(self.checkpoint) * 8
        return 4 * max(blocks.values(), default=0), 4 * max(outside, default=0), stored, hidden, logits

    @cached_property
    def blocks(self) -> BlockModel:
        return BlockModel(self.checkpoint, self.dtype, self.device)

    @property
    def n_blocks(self) -> int:
        return self.blocks.n_blocks

    @torch.inference_mode()
    def start(self, windows: torch.Tensor) -> None:
        """`(w, t)` int64: their embeddings."""
        self.hidden.close()
        self.hidden = Activations((), self.limit, self.scratch)
        for window in windows:
            self.hidden.append(self.blocks.embed(window[None]))

    @torch.inference_mode()
    def step(self, i: int) -> None:
        """All windows through block i."""
        with self._timed():
            block: Block = self.blocks.block(i, self.blocks.weights(i))
            for j in range(len(self.hidden)):
                self.hidden[j] = block(self.hidden[j])

    @torch.inference_mode()
    def logits_of(
        self, window: int, first: int = 0, stop: int | None = None, product: torch.dtype | None = None
    ) -> torch.Tensor:
        """After the last block -> `(stop - first, vocabulary)` f32 of one window. product: the type of the
        output layer's matrix product under autocast."""
        with self._timed():
            rows = self.hidden[window][0, first:stop]
            # A slice of a batch would have strides for which torch copies the output's weight each time.
            parts = [self.blocks.head(part[None], product)[0].float() for part in rows.split(SLICE)]
        return _checked(self.checkpoint, window, torch.cat(parts))

    def forget(self) -> None:
        """Free hidden states and the output layer."""
        self.hidden.close()
        self.blocks.forget_head()

    def logits(self, windows: torch.Tensor, first: int = 0) -> Iterator[torch.Tensor]:
        self.start(windows)
        for i in range(self.n_blocks):
            self.step(i)
        for j in range(len(windows)):
            yield self.logits_of(j, first)
        self.hidden.close()


class InEngine(Runner):
    """The file as it is, loaded once by an engine that users run it in; logits come as files in `scratch`.

    PlanError where no engine of this name reads the file type, KernelError where it is not installed, or
    fails. kind names its version, and seconds are known, after the last window.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, scratch: Path | None = None) -> None:
        super().__init__(checkpoint)
        engine = engines_of(checkpoint, name)[0]
        if engine.parses:
            raise PlanError(
                f"{checkpoint.path}: {engine.name} is only asked whether it reads the config; it runs nothing"
            )
        self.process, self.scratch = Process(engine, checkpoint, seconds=3600), scratch
        self.kind = f"in {engine.name}"

    def needs(self, windows: int, context: int) -> int:
        """Of this process, for a window's logits; the engine's own has another limit."""
        return context * widest(self.checkpoint) * 8 + SPARE

    def logits(self, windows: torch.Tensor, first: int = 0) -> Iterator[torch.Tensor]:
        try:
            for i, found in enumerate(self.process.logits(windows.tolist(), first, scratch=self.scratch)):
                yield _checked(self.checkpoint, i, torch.from_numpy(found))
        except KernelError as error:
            raise KernelError(f"{self.checkpoint.path}, {self.kind}: {error}") from error
        said = self.process.said
        note = f"; {said['note']}" if said.get("note") else ""
        self.kind, self.seconds = f"{self.kind} ({said['engine']} {said['version']}{note})", said["seconds"]


def choose(
    checkpoint: Checkpoint,
    windows: int,
    context: int,
    memory: int | None = None,
    scratch: Path | None = None,
) -> Runner:
    """The first Runner that fits `memory` bytes (default: what is free): whole in f32, whole and packed,
    block by block. ModelError, with what each needs, where none does."""
    free = free_memory() if memory is None else memory
    kinds: list[Runner] = [Whole(checkpoint)]
    if any(isinstance(tensor.kind, Format) for tensor in checkpoint.tensors.values()):
        kinds.append(Whole(checkpoint, packed=True))
    kinds.append(Blockwise(checkpoint, scratch=scratch))
    needed = {runner.kind: runner.needs(windows, context) for runner in kinds}
    for runner in kinds:
        if needed[runner.kind] <= free:
            return runner
    each = ", ".join(f"{kind} {nbytes / 2**30:.2f} GiB" for kind, nbytes in needed.items())
    raise ModelError(
        f"{checkpoint.path}: {free / 2**30:.2f} GiB of memory are free, running it needs {each}; use a "
        "smaller context, or free memory"
    )


def needs_side_by_side(runners: Sequence[Blockwise], windows: int, context: int) -> int:
    """Bytes of memory for models that go through a block each in turn. The output layers stay, each with its
    hidden states; one block, or what one layer is decoded from, is there at a time."""
    sizes = zip(*(runner.sizes(windows, context) for runner in runners), strict=True)
    blocks, outside, stored, hidden, logits = sizes
    largest = max(*blocks, sum(outside) + max(outside))
    return largest + max(stored) + sum(hidden) + sum(logits) + SPARE


def widest(checkpoint: Checkpoint) -> int:
    """Numbers that a position has at most at once in a forward pass: logits, or the MLP's."""
    return max((max(site.shape) for site in sites(checkpoint)), default=0)


def _checked(checkpoint: Checkpoint, window: int, logits: torch.Tensor) -> torch.Tensor:
    if not bool((logits < torch.inf).all()):  # NaN is not less either
        raise ModelError(
            f"{checkpoint.path}: the output of window {window} is not finite; its weights are damaged"
        )
    return logits
