"""Teacher: the reference model's distributions over the vocabulary, for windows that are used repeatedly.

Its blocks run once, one in memory at a time. Then either the hidden states are kept, and only the output
layer is used again; or the k most probable tokens of each position, which a file keeps too, so that a run
that is resumed does not run the reference again.

    kept for a token        4 h bytes, h the width of the model         8 k bytes
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch

from ..blocks.activations import Activations
from ..errors import FileError
from ..files.checkpoint import Checkpoint
from ..runtime.runner import Blockwise
from ..storage.atomic import write_atomic
from .objective import Distributions
from .settings import DistillSettings, arithmetic, products


class Teacher:
    """Of a model whose blocks have run."""

    def __init__(self, runner: Blockwise, temperature: float = 1.0, compute: torch.dtype = torch.float32):
        """compute: the type of the output layer's product for `distributions`."""
        self._runner, self.temperature, self.compute = runner, temperature, compute

    def hidden(self, i: int) -> torch.Tensor:
        """Window i -> the input of the output layer, `(1, c, h)`."""
        return self._runner.hidden[i]

    def log_p(self, i: int) -> torch.Tensor:
        """Window i -> log-probabilities `(c, vocab)` f32 of the token after each token."""
        return self._of(i, 1.0, 0).log_p

    def distributions(self, i: int, rows: slice) -> Distributions:
        """Window i -> what is learned from at those positions, at the temperature."""
        with torch.no_grad(), products(self.compute, self._runner.device):
            logits = self._runner.logits_of(i, rows.start, rows.stop, self.compute)
        return Distributions.of(logits, self.temperature, 0)

    def _of(self, i: int, temperature: float, top_k: int) -> Distributions:
        with torch.no_grad():
            return Distributions.of(self._runner.logits_of(i), temperature, top_k)


class TopTeacher(Teacher):
    """The k most probable tokens of all windows but those held out, the last: ids, log p `(w, c, k)`."""

    def __init__(self, runner: Blockwise, temperature: float, log_p: torch.Tensor, ids: torch.Tensor):
        super().__init__(runner, temperature)
        self.kept, self.ids = log_p, ids

    def hidden(self, i: int) -> torch.Tensor:
        return super().hidden(i - len(self.kept))

    def distributions(self, i: int, rows: slice) -> Distributions:
        return Distributions(self.kept[i, rows], self.ids[i, rows].long())

    def _of(self, i: int, temperature: float, top_k: int) -> Distributions:
        return super()._of(i - len(self.kept), temperature, top_k)


def teacher_of(
    reference: Checkpoint,
    tokens: torch.Tensor,
    settings: DistillSettings,
    progress: Callable[[int, int], None],
) -> Teacher:
    """Of windows `(w, c)` int64; those of a state are read, if they are there. FileError for those of other
    windows or settings."""
    runner = Blockwise(reference, device=torch.device(settings.device))
    path = None if settings.state is None else settings.state.with_suffix(".teacher")
    held = len(tokens) - settings.held_out
    digest = sha256(tokens.numpy().tobytes() + f"{settings.top_k} {settings.temperature} {held}".encode())
    if settings.top_k and path is not None and path.exists():
        return _read(path, digest.hexdigest(), runner, settings)
    kind = arithmetic(settings.precision, runner.device)
    # Its loss is not scaled, and its activations may be too large for f16.
    kind = torch.float32 if kind == torch.float16 else kind
    with products(kind, runner.device):
        teacher = run_teacher(runner, tokens, progress, settings.temperature, kind)
    if not settings.top_k:
        return teacher
    kept = [teacher._of(i, settings.temperature, settings.top_k) for i in range(held)]
    parts = {
        "log_p": torch.stack([each.log_p for each in kept]),
        "ids": torch.stack([_ids(each) for each in kept]),
        "hidden": torch.cat([teacher.hidden(i) for i in range(held, len(tokens))]),
    }
    if path is not None:
        from safetensors.torch import save

        held_there = {name: part.cpu().contiguous() for name, part in parts.items()}
        write_atomic(path, save(held_there, {"digest": digest.hexdigest()}))
    return _top(runner, settings, parts)


def run_teacher(
    runner: Blockwise,
    tokens: torch.Tensor,
    progress: Callable[[int, int], None],
    temperature: float = 1.0,
    compute: torch.dtype = torch.float32,
) -> Teacher:
    """All windows `(w, c)` int64 through the blocks."""
    runner.start(tokens)
    for i in range(runner.n_blocks):
        runner.step(i)
        progress(i + 1, runner.n_blocks)
    return Teacher(runner, temperature, compute)


def _ids(kept: Distributions) -> torch.Tensor:
    """Of a vocabulary that k covers, all."""
    if kept.ids is not None:
        return kept.ids.to(torch.int32)
    width = kept.log_p.shape[-1]
    return torch.arange(width, dtype=torch.int32, device=kept.log_p.device).expand(kept.log_p.shape)


def _top(runner: Blockwise, settings: DistillSettings, parts: dict[str, torch.Tensor]) -> TopTeacher:
    runner.hidden.close()
    runner.hidden = Activations(part[None] for part in parts["hidden"])
    return TopTeacher(runner, settings.temperature, parts["log_p"], parts["ids"])


def _read(path: Path, digest: str, runner: Blockwise, settings: DistillSettings) -> TopTeacher:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("digest")
            names = ("log_p", "ids", "hidden")
            parts = {name: file.get_tensor(name).to(settings.device) for name in names}
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{path}: not a parent's distributions ({error}); delete it to run it again"
        ) from error
    if found != digest:
        raise FileError(f"{path}: of other text or settings; delete it to run the parent again")
    return _top(runner, settings, parts)
