"""distill(): train a quantized model on its reference's distribution.

Error feedback considers one weight at a time, but not the quantized model's logits. Distillation trains the
continuous numbers of the quantized model on the reference's logits:

    tokens -> reference -> p  --.
                             +--> mean over positions of KL(p || q) -> Adam -> scales, offsets (codes fixed)
    tokens -> quantized model  -> q  --'                                              -> norms, biases

With `lr_codes` the weights that codes are rounded from are trained too. `loop.py` has the steps: every number
moves relative to its own size, so that one learning rate suits all.

Every few steps the numbers are packed as in a file (scales rounded to f16, norms to their stored dtype), and
that model's KL divergence is measured on held-out windows. The best state is returned, or the start if no
step improved it.

Learning rate: a start far from its reference allows large steps, codes of error feedback small ones. A 163M
model in q4_0, 64 windows of 256 tokens, 4 per step, KL divergence on 8 held-out windows:

    rounded to nearest   0.575 -> 0.219 in 40 steps at lr 2e-3     (other text: 0.553 -> 0.244)
    GPTQ                 0.0947 -> 0.0880 in the first 8 of 24 steps at 6e-4, -> 0.0908 at 2e-3

Sources: Hinton et al., arXiv 1503.02531 (distillation); Kingma and Ba, arXiv 1412.6980 (Adam); EfficientQAT,
arXiv 2407.11062, whose second phase trains only block scales.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..activations.record import activations_of
from ..adapters.transformers import load_model
from ..errors import CalibrationError, raise_all
from ..files.checkpoint import Checkpoint
from ..memory import freed_memory_kept
from ..qtensor import QTensor
from .loop import Judgement, Loop
from .settings import DistillSettings, settings_faults
from .student import Student
from .teacher import Teacher, teacher_of

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Distilled:
    """tensors: the changed ones by name: QTensors, with the same codes unless these were trained, and vectors
    in their stored dtype. activations: the record with trained steps, if one was given."""

    tensors: dict[str, QTensor | torch.Tensor]
    history: tuple[Judgement, ...]
    notes: tuple[str, ...]
    activations: dict[str, Any] | None = None

    @property
    def before(self) -> float:
        return self.history[0].held_out

    @property
    def after(self) -> float:
        return min(judgement.held_out for judgement in self.history)


@freed_memory_kept()
def distill(
    reference: Checkpoint,
    quantized: Checkpoint,
    tokens: torch.Tensor,
    settings: DistillSettings | None = None,
    progress: Progress | None = None,
    activations: Mapping[str, Any] | None = None,
    teacher: Teacher | None = None,
) -> Distilled:
    """Tokens `(w, c)` int64 -> the block parameters and vectors with which the quantized model's logits are
    nearest to the reference's. activations: the record of how inputs of weights are quantized, whose static
    steps are trained too. teacher: the reference's after it ran over these tokens, if it did (`teacher_of`).

    Raises CalibrationError for too few windows, a quantized model without trainable numbers, or a loss that
    is not finite; FileError for the state of another run."""
    settings, progress = settings or DistillSettings(), progress or _silent
    _check(tokens, settings)
    device = torch.device(settings.device)
    if not settings.share:
        teacher = None
    elif teacher is None:
        teacher = teacher_of(reference, tokens, settings, lambda i, n: progress("reference", i, n))
    floats = reference if settings.lr_codes else None
    scheme = None if activations is None else activations_of(activations)
    model, zeros = load_model(quantized), settings.keep_zeros
    student = Student(model, quantized, tokens[0], device, floats, scheme, zeros)
    run = Loop(teacher, student, tokens, settings)
    if settings.state is not None and settings.state.exists():
        run.resume(settings.state)
    while run.step < settings.steps:
        run.advance()
        progress(run.stage, run.step, settings.steps)
        judged = run.step % settings.every == 0 or run.step == settings.steps
        if judged:
            run.judge()
        if settings.state is not None and (judged or time.monotonic() - run.saved > 60 * settings.minutes):
            run.save(settings.state)
    return _result(run, activations)


def _check(tokens: torch.Tensor, settings: DistillSettings) -> None:
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        faults = [f"tokens are {tuple(tokens.shape)} {tokens.dtype}, windows (w, c) int64 are needed"]
    else:
        faults = settings_faults(settings, len(tokens))
    raise_all(CalibrationError, "distill", faults)


def _result(run: Loop, activations: Mapping[str, Any] | None) -> Distilled:
    """The best state, without tensors that it leaves unchanged."""
    packed, start = (
        {name: value.to("cpu") for name, value in run.student.pack(run.start + run.unit * a).items()}
        for a in (run.best, 0 * run.best)
    )
    changed = {name: value for name, value in packed.items() if not _same(value, start[name])}
    first, best = run.history[0].held_out, min(judgement.held_out for judgement in run.history)
    judged_on = f"on {run.settings.held_out} windows held out"
    what = "trained" if run.settings.lr_codes else "distilled"
    notes = [f"{what}: {run.judged} {first:.4g} -> {best:.4g} {judged_on}"]
    if not changed:
        notes = [f"{what}: no step improved the {run.judged} of {first:.4g} {judged_on}; nothing is changed"]
    if run.student.fixed:
        names = run.student.fixed
        notes.append(
            f"{what}: {len(names)} quantized tensors are unchanged, no linear layer with free "
            f"parameters of its own: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        )
    record = None
    if activations is not None:
        trained = run.student.ranges(run.start + run.unit * run.best)
        record = (
            {**activations, "ranges": {**activations["ranges"], **trained}} if trained else {**activations}
        )
    return Distilled(changed, tuple(run.history), tuple(notes), record)


def _same(value: QTensor | torch.Tensor, other: QTensor | torch.Tensor) -> bool:
    if isinstance(value, QTensor) and isinstance(other, QTensor):
        return all(torch.equal(plane, other.planes[name]) for name, plane in value.planes.items())
    return isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(value, other)


def _silent(stage: str, done: int, total: int) -> None:
    pass
