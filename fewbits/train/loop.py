"""Loop: the steps of one training run, its evaluations, and the state from which it goes on after a kill.

Every number is trained relative to its own size: x = x0 + unit * a, a = 0 at the start; unit is |x0|, at
least a tenth of its row's mean, or of a latent weight the spacing of its grid. All `a` are one flat vector,
of which the optimizer changes parts in place; it, the optimizer's moments and the best `a` so far are the
whole state; a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from math import ceil, cos, isfinite, pi
from pathlib import Path

import torch

from ..errors import CalibrationError
from .objective import NAMES
from .optimizer import TINY, optimizer_of
from .rounding import windows_of
from .settings import AT_ONCE, DistillSettings, arithmetic, products
from .state import moments_of, put_back, read_state, write_state
from .student import Goals, Student
from .teacher import Teacher

STATE = ("a", "best")
FROZEN = 0.85  # of the steps: then codes are fixed, and what swings between two no longer does


@dataclass(frozen=True)
class Judgement:
    """After `step` steps: the mean loss on the training windows since the last evaluation, and on the
    held-out windows."""

    step: int
    learned: float | None
    held_out: float


class Loop:
    """One training run: its state and its best evaluation. teacher: None where the parent is not asked."""

    def __init__(
        self, teacher: Teacher | None, student: Student, tokens: torch.Tensor, settings: DistillSettings
    ):
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
        settings, teacher = self.settings, self.teacher
        self.student.move(self.start, self.unit, self.a)
        windows = windows_of(self.step, settings.batch, self.train, settings.seed)
        goals = Goals(
            parent=None if teacher is None else lambda i, rows: teacher.distributions(windows[i], rows),
            share=settings.share,
            temperature=settings.temperature,
            factor=float(self.scaler.scale(torch.ones((), device=self.start.device))),
            compute=self.compute,
            micro=settings.micro or max(1, AT_ONCE // self.tokens.shape[1]),
        )
        loss = self.student.learn(self.tokens[windows], goals)
        self.losses.append(loss)
        self.check(loss, f"the loss of step {self.step + 1}", windows)
        gradients = self.student.gradients()
        self.step += 1
        for i, (group, (at, kind)) in enumerate(zip(self.optimizer.param_groups, self.spans, strict=True)):
            self.parts[i].grad, group["lr"] = gradients[i].mul_(self.unit[at]), self.rate(kind)
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
        self.student.move(self.start, self.unit, self.a)
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
        return f"train: {self.settings.loss} {now}, held out {best:.4f}, {speed:.0f} tokens/s"

    @property
    def judged(self) -> str:
        """For people: what decides."""
        return NAMES[self.settings.loss]

    def rate(self, kind: str) -> float:
        """The learning rate of a kind of number at this step."""
        if kind == "latent":
            return self.settings.lr_codes * max(0.0, self.schedule() - self.schedule(FROZEN))
        return self.schedule() * (self.settings.lr if kind == "block" else self.settings.lr_vectors)

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
        """The loss of the packed model on the held-out windows, without temperature; keeps the best state."""
        self.student.write(self.student.rounded(self.start + self.unit * self.a))
        losses = []
        for i in range(self.train, len(self.tokens)):
            log_p = None if self.teacher is None else self.teacher.log_p(i)
            losses.append(self.student.loss(self.tokens[i], log_p, self.settings.share))
        held_out = sum(losses) / len(losses)
        self.check(held_out, f"the {self.judged} held out, after {self.step} steps,", [self.train])
        learned = sum(self.losses) / len(self.losses) if self.losses else None
        if self.history and held_out < min(judgement.held_out for judgement in self.history):
            self.best = self.a.clone()
        self.history.append(Judgement(self.step, learned, held_out))
        self.losses = []

    def check(self, value: float, what: str, windows: list[int]) -> None:
        if isfinite(value):
            return
        with products(self.compute, self.start.device):
            sites = [self.student.blame(self.tokens[i]) for i in windows]
        where = next(
            (f"; the first output that is not finite is that of {site}" for site in sites if site), ""
        )
        way = f"use a smaller lr than {self.settings.lr}, or check the checkpoint with `fewbits evaluate`"
        if self.compute == torch.float16 and not self.step:
            way = "f16 ends at 65504: use the precision bf16 or f32"
        raise CalibrationError(f"distill: {what} is {value}{where}; {way}")

    # ---- the state

    @cached_property
    def fingerprint(self) -> str:
        """Digest of settings, tokens, the student's start and, if it is asked, the teacher's hidden states:
        what decides the result."""
        away = ("state", "minutes")
        settings = {key: value for key, value in asdict(self.settings).items() if key not in away}
        settings["precision"] = str(self.compute)
        digest = sha256(repr(sorted(settings.items())).encode())
        parts = [self.tokens, self.start]
        parts += [] if self.teacher is None else [self.teacher.hidden(len(self.tokens) - 1)]
        for part in parts:
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the state, atomically."""
        record = {
            "step": self.step,
            "skipped": self.skipped,
            "history": [asdict(judgement) for judgement in self.history],
            "losses": self.losses,
            "scaler": self.scaler.state_dict(),
        }
        state = {name: getattr(self, name) for name in STATE} | moments_of(self.optimizer, self.parts)
        write_state(path, state, record, self.fingerprint)
        self.saved = time.monotonic()

    def resume(self, path: Path) -> None:
        """Resume from a state; FileError for one that is damaged or of another run."""
        state, record = read_state(path, self.fingerprint)
        self.step, self.history = record["step"], [Judgement(**row) for row in record["history"]]
        self.resumed, self.skipped, self.losses = self.step, record["skipped"], record["losses"]
        self.scaler.load_state_dict(record["scaler"])
        for name in STATE:
            getattr(self, name).copy_(state.pop(name))
        put_back(self.optimizer, state)
