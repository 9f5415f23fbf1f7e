"""distill(): train a quantized model on its reference's distribution, with fixed codes.

Error feedback considers one weight at a time, but not the quantized model's logits. Distillation trains the
continuous numbers of the quantized model on the reference's logits:

    tokens -> reference -> p  --.
                             +--> mean over positions of KL(p || q) -> Adam -> scales, offsets (codes fixed)
    tokens -> quantized model  -> q  --'                                              -> norms, biases

Every number is trained relative to its own size, x = x0 + unit * a with a = 0 at the start, so that one
learning rate suits all: unit is |x0|, at least a tenth of its row's mean. All `a` are in one flat vector, and
so are Adam's moments. These and the best `a` so far are the whole state; a resumed run equals an
uninterrupted one.

Every few steps the numbers are packed as in a file (scales rounded to f16, norms to their stored dtype), and
that model's KL divergence is measured on held-out windows. The best state is returned, or the start if no
step improved it.

Learning rate: a start far from its reference allows large steps, codes of error feedback small ones. A 163M
model in q4_0, 64 windows of 256 tokens, 4 per step, KL divergence on 8 held-out windows:

    rounded to nearest   0.575 -> 0.219 in 40 steps at lr 2e-3     (other text: 0.553 -> 0.244)
    GPTQ                 0.0947 -> 0.0880 in the first 8 of 24 steps at 6e-4, -> 0.0908 at 2e-3

The reference runs once, one block in memory at a time. Its last hidden states are kept, and only its output
layer is used again.

Sources: Hinton et al., arXiv 1503.02531 (distillation); Kingma and Ba, arXiv 1412.6980 (Adam); EfficientQAT,
arXiv 2407.11062, whose second phase trains only block scales.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from math import ceil, cos, isfinite, pi
from pathlib import Path
from typing import Any

import torch

from ..adapters.transformers import load_model
from ..errors import CalibrationError, FileError, raise_all
from ..files.checkpoint import Checkpoint
from ..qtensor import QTensor
from ..runtime.decode import faster_dtype
from ..storage.atomic import write_atomic
from .objective import LOSSES
from .optimizer import optimizer_of
from .rounding import shuffled
from .settings import AT_ONCE, DistillSettings, settings_faults
from .student import Goals, Student
from .teacher import Teacher, teacher_of

Progress = Callable[[str, int, int], None]
STATE = ("a", "best")
TINY = 1e-12
FROZEN = 0.85  # of the steps: then codes are fixed, and what swings between two no longer does
PRECISIONS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Judgement:
    """After `step` steps: mean KL divergence on the training windows since the last evaluation, and on the
    held-out windows."""

    step: int
    learned: float | None
    held_out: float


@dataclass(frozen=True)
class Distilled:
    """tensors: the changed ones by name: QTensors with the same codes, vectors in their stored dtype."""

    tensors: dict[str, QTensor | torch.Tensor]
    history: tuple[Judgement, ...]
    notes: tuple[str, ...]

    @property
    def before(self) -> float:
        return self.history[0].held_out

    @property
    def after(self) -> float:
        return min(judgement.held_out for judgement in self.history)


def distill(
    reference: Checkpoint,
    quantized: Checkpoint,
    tokens: torch.Tensor,
    settings: DistillSettings | None = None,
    progress: Progress | None = None,
) -> Distilled:
    """Tokens `(w, c)` int64 -> the block parameters and vectors with which the quantized model's logits are
    nearest to the reference's.

    Raises CalibrationError for too few windows, a quantized model without trainable numbers, or a loss that
    is not finite; FileError for the state of another run."""
    settings, progress = settings or DistillSettings(), progress or _silent
    _check(tokens, settings)
    device = torch.device(settings.device)
    teacher = teacher_of(reference, tokens, settings, lambda done, total: progress("reference", done, total))
    floats = reference if settings.lr_codes else None
    student = Student(load_model(quantized), quantized, tokens[0], device, floats)
    run = _Run(teacher, student, tokens, settings)
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
    return run.result()


def _check(tokens: torch.Tensor, settings: DistillSettings) -> None:
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        faults = [f"tokens are {tuple(tokens.shape)} {tokens.dtype}, windows (w, c) int64 are needed"]
    else:
        faults = settings_faults(settings, len(tokens))
    raise_all(CalibrationError, "distill", faults)


class _Run:
    """One training run: its state and its best evaluation."""

    def __init__(self, teacher: Teacher, student: Student, tokens: torch.Tensor, settings: DistillSettings):
        self.teacher, self.student, self.tokens, self.settings = teacher, student, tokens, settings
        self.train = len(tokens) - settings.held_out
        if settings.recompute:
            student.halves.recompute()
        self.start, self.unit, self.spans = student.read(), student.units(), student.spans()
        self.a = torch.zeros_like(self.start)
        self.best = self.a.clone()
        device = self.start.device
        self.compute = arithmetic(settings.precision, device)
        # Parts of `a`, which the optimizer changes in place.
        self.parts = [torch.nn.Parameter(self.a[at]) for at, _ in self.spans]
        groups = [
            {"params": [part], "kind": kind} for part, (_, kind) in zip(self.parts, self.spans, strict=True)
        ]
        self.optimizer = optimizer_of(settings.optimizer, groups, device)
        scales = self.compute == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scales)
        self.step, self.skipped = 0, 0
        self.history: list[Judgement] = []
        self.losses: list[float] = []
        self.saved = self.begun = time.monotonic()
        self.resumed = 0
        self.judge()

    def advance(self) -> None:
        """One step of the optimizer on `batch` windows."""
        settings = self.settings
        self.student.write(self.start + self.unit * self.a)
        windows = self.chosen(self.step)
        goals = Goals(
            parent=lambda i: self.teacher.distributions(windows[i]),
            share=LOSSES[settings.loss],
            temperature=settings.temperature,
            factor=float(self.scaler.scale(torch.ones((), device=self.start.device))),
            compute=self.compute,
            micro=settings.micro or max(1, AT_ONCE // self.tokens.shape[1]),
        )
        loss = self.student.learn(self.tokens[windows], goals)
        self.losses.append(loss)
        self.check(loss, f"the loss of step {self.step + 1}", windows)
        whole = self.student.gradient().mul_(self.unit)
        self.step += 1
        for part, group, (at, kind) in zip(self.parts, self.optimizer.param_groups, self.spans, strict=True):
            part.grad, group["lr"] = whole[at], self.rate(kind)
        self.scaler.unscale_(self.optimizer)
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(self.parts, settings.clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < scale
        if settings.damp and settings.lr_codes:
            self.calm()

    @torch.no_grad()
    def calm(self) -> None:
        """Draw latent weights a little to what they are rounded to (Nagel et al., arXiv 2203.08550)."""
        share = self.settings.damp * self.rate("latent") * self.step / self.settings.steps
        self.student.write(self.start + self.unit * self.a)
        for (at, kind), part in zip(self.spans, self.student.parts, strict=True):
            if kind == "latent":
                off = (self.student.weight_of(part) - part.value).flatten()
                self.a[at] += off.mul_(share).div_(self.unit[at].clamp(min=TINY))

    @property
    def stage(self) -> str:
        """For people, with the figures of now where the whole model is trained."""
        if not self.settings.lr_codes:
            return "distill"
        best = min(judgement.held_out for judgement in self.history)
        now = f"{self.losses[-1]:.4f}" if self.losses else "-"
        tokens = (self.step - self.resumed) * self.settings.batch * self.tokens.shape[1]
        speed = tokens / max(time.monotonic() - self.begun, 1e-9)
        return f"train: {self.settings.loss} {now}, KL held out {best:.4f}, {speed:.0f} tokens/s"

    def rate(self, kind: str) -> float:
        """The learning rate of a kind of number at this step."""
        if kind == "latent":
            return self.settings.lr_codes * max(0.0, self.schedule() - self.schedule(FROZEN))
        return self.schedule() * (self.settings.lr if kind == "block" else self.settings.lr_vectors)

    def chosen(self, step: int) -> list[int]:
        """The windows of a step: every window once in each pass, each pass shuffled by its own seed."""
        places = range(step * self.settings.batch, (step + 1) * self.settings.batch)
        n, seed = self.train, self.settings.seed
        return [shuffled(n, seed, place // n)[place % n] for place in places]

    def schedule(self, at: float | None = None) -> float:
        """The factor of the learning rates at a share of the steps (default: now): linear over the first
        tenth, then down to a tenth on a cosine."""
        step = self.step if at is None else at * self.settings.steps
        warm = ceil(self.settings.steps / 10)
        if step <= warm:
            return step / warm
        done = (step - warm) / max(1, self.settings.steps - warm)
        return 0.1 + 0.45 * (1 + cos(pi * done))

    def judge(self) -> None:
        """The KL divergence of the packed model on the held-out windows; keeps the best state."""
        self.student.write(self.student.rounded(self.start + self.unit * self.a))
        judges = range(self.train, len(self.tokens))
        divergences = [self.student.divergence(self.tokens[i], self.teacher.log_p(i)) for i in judges]
        held_out = sum(divergences) / len(divergences)
        self.check(held_out, f"the KL divergence held out, after {self.step} steps,", [self.train])
        learned = sum(self.losses) / len(self.losses) if self.losses else None
        if self.history and held_out < min(judgement.held_out for judgement in self.history):
            self.best = self.a.clone()
        self.history.append(Judgement(self.step, learned, held_out))
        self.losses = []

    def check(self, value: float, what: str, windows: list[int]) -> None:
        if isfinite(value):
            return
        sites = [self.student.blame(self.tokens[i]) for i in windows]
        where = next(
            (f"; the first output that is not finite is that of {site}" for site in sites if site), ""
        )
        raise CalibrationError(
            f"distill: {what} is {value}{where}; use a smaller lr than {self.settings.lr}, or check the "
            "checkpoint with `fewbits evaluate`"
        )

    def result(self) -> Distilled:
        """The best state, without tensors that it leaves unchanged."""
        packed, start = (
            {name: value.to("cpu") for name, value in self.student.pack(self.start + self.unit * a).items()}
            for a in (self.best, 0 * self.best)
        )
        changed = {name: value for name, value in packed.items() if not _same(value, start[name])}
        first, best = self.history[0].held_out, min(judgement.held_out for judgement in self.history)
        judged_on = f"on {self.settings.held_out} windows held out"
        notes = [f"distill: KL divergence {first:.4g} -> {best:.4g} {judged_on}"]
        if not changed:
            notes = [
                f"distill: no step improved the KL divergence of {first:.4g} {judged_on}; nothing is changed"
            ]
        if self.student.fixed:
            names = self.student.fixed
            notes.append(
                f"distill: {len(names)} quantized tensors are unchanged, no linear layer with free "
                f"parameters of its own: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            )
        return Distilled(changed, tuple(self.history), tuple(notes))

    # ---- the state

    def fingerprint(self) -> str:
        """Digest of settings, tokens, the student's start and the teacher's hidden states, which decide the
        result."""
        away = ("state", "minutes")
        settings = {key: value for key, value in asdict(self.settings).items() if key not in away}
        settings["precision"] = str(self.compute)
        digest = sha256(repr(sorted(settings.items())).encode())
        for part in (self.tokens, self.start, self.teacher.hidden(len(self.tokens) - 1)):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the state, atomically."""
        from safetensors.torch import save

        record = {
            "step": self.step,
            "skipped": self.skipped,
            "history": [asdict(judgement) for judgement in self.history],
            "losses": self.losses,
            "scaler": self.scaler.state_dict(),
        }
        about = {"distill": json.dumps(record), "fingerprint": self.fingerprint()}
        state = {name: getattr(self, name).cpu() for name in STATE} | self.moments()
        write_atomic(path, save(state, about))
        self.saved = time.monotonic()

    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's own tensors, by part and name."""
        found = {}
        for i, part in enumerate(self.parts):
            for key, value in self.optimizer.state.get(part, {}).items():
                number = value if isinstance(value, torch.Tensor) else torch.tensor(value)
                found[f"optimizer.{i}.{key}"] = number.cpu().contiguous()
        return found

    def resume(self, path: Path) -> None:
        """Resume from a state; FileError for one that is damaged or of another run."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise FileError(f"{path}: not a distill state ({error}); delete it to start again") from error
        if about.get("fingerprint") != self.fingerprint():
            raise FileError(
                f"{path}: of a run with another model, text or settings; delete it to start again"
            )
        record = json.loads(about["distill"])
        self.step, self.history = record["step"], [Judgement(**row) for row in record["history"]]
        self.resumed, self.skipped, self.losses = self.step, record["skipped"], record["losses"]
        self.scaler.load_state_dict(record["scaler"])
        for name in STATE:
            getattr(self, name).copy_(state.pop(name))
        held: dict[int, dict[str, Any]] = {}
        for name, value in state.items():
            _, i, key = name.split(".", 2)
            held.setdefault(int(i), {})[key] = value
        given = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": held, "param_groups": given["param_groups"]})


def arithmetic(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products for a setting; auto: bf16 where the device has it, faster than f32."""
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return faster_dtype() if device.type == "cpu" else torch.float32


def _same(value: QTensor | torch.Tensor, other: QTensor | torch.Tensor) -> bool:
    if isinstance(value, QTensor) and isinstance(other, QTensor):
        return all(torch.equal(plane, other.planes[name]) for name, plane in value.planes.items())
    return isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(value, other)


def _silent(stage: str, done: int, total: int) -> None:
    pass
