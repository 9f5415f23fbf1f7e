"""fit_adapter(): train the low-rank adapter of a PeftModel whose weights are packed and stay so.

    tokens -> blocks (packed W, A, B) -> hidden -> logits of one window at a time -> loss
    AdamW on A and B, gradients clipped: learning rate up over a tenth of the steps, then down on a cosine

    next_token(tokens)    -log q of the token that came                  the text is what is learned
    toward(teacher)       KL(p || q) to the model before quantization    the adapter makes up for the rounding

In memory are the packed weights, A and B four times (values, gradients, Adam's moments) and the best, and the
activations of a batch. Every few steps the adapter is judged on windows held out, and the best is kept.

group: A is held constant in groups of so many columns, so that it sees only the sum of x in each and B A adds
one number for each row and group: formats with a float offset hold the sum of both exactly (QA-LoRA, arXiv
2309.14717). `start_from_error` begins at the quantization error instead of 0 (LoftQ, arXiv 2310.08659).
Sources: LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314; AdamW, arXiv 1711.05101.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass
from hashlib import sha256
from math import ceil, cos, isfinite, pi
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ..adapters.peft import Factors, factors_of
from ..errors import CalibrationError, PlanError, raise_all
from ..memory import freed_memory_kept
from .halves import Halves
from .rounding import windows_of
from .state import moments_of, put_back, read_state, write_state
from .teacher import Teacher

MINUTES = 10  # between two saved states, at most
Progress = Callable[[str, int, int], None]
Objective = Callable[[int, torch.Tensor], torch.Tensor]  # window, its logits (c, v) f32 -> loss


@dataclass(frozen=True)
class LoraSettings:
    """steps: of `batch` windows each. lr: of AdamW, at its highest. clip: the largest norm of a gradient.
    held_out: windows at the end that only judge; every: steps between two judgements. seed: of the order of
    windows and of dropout. group: columns in which A is constant, None: each is free."""

    steps: int = 100
    lr: float = 2e-4
    batch: int = 4
    clip: float = 1.0
    held_out: int = 8
    every: int = 25
    seed: int = 0
    group: int | None = None

    def faults(self) -> list[str]:
        """Settings that mean nothing."""
        faults = [
            f"{name} is {getattr(self, name)}; at least 1 is needed"
            for name in ("steps", "batch", "held_out", "every")
            if getattr(self, name) < 1
        ]
        if self.group is not None and self.group < 1:
            faults.append(f"group is {self.group} columns; at least 1 is needed")
        if not 0 < self.lr < 1 or not self.clip > 0:
            faults.append(f"lr is {self.lr}, clip {self.clip}; lr is between 0 and 1, clip positive")
        return faults

    def check(self, windows: int) -> None:
        """PlanError for settings that mean nothing, CalibrationError for too few windows of text."""
        raise_all(PlanError, "lora", self.faults())
        if windows < self.held_out + self.batch:
            raise CalibrationError(
                f"lora: {windows} windows of text, at least {self.held_out + self.batch} are needed: "
                f"{self.held_out} held out and a batch of {self.batch}; give more text (--tokens), a smaller "
                "--context, or a smaller --batch"
            )


@dataclass(frozen=True)
class Judgement:
    """After `step` steps: the loss on windows held out."""

    step: int
    held_out: float


def next_token(tokens: torch.Tensor) -> Objective:
    """Windows `(w, c)` -> the mean of -log q(token that came) over a window."""

    def loss(i: int, logits: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits[:-1], tokens[i, 1:].to(logits.device))

    return loss


def toward(teacher: Teacher) -> Objective:
    """The mean KL divergence of a window from the teacher's distributions."""

    def loss(i: int, logits: torch.Tensor) -> torch.Tensor:
        log_p = teacher.log_p(i).to(logits.device)
        return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1).mean()

    return loss


def fit_adapter(
    model: Any,
    tokens: torch.Tensor,
    objective: Objective,
    settings: LoraSettings,
    progress: Progress | None = None,
    state: Path | None = None,
) -> tuple[Judgement, ...]:
    """A PeftModel and windows `(w, c)` int64 -> the judgements; the model has the best adapter.

    state: file from which a killed run goes on, written at each judgement and every MINUTES; the caller
    deletes it. Raises PlanError or CalibrationError for settings, too little text, and a loss that is not
    finite; FileError for the state of another run."""
    settings.check(len(tokens))
    run = _Run(model, tokens, objective, settings)
    saved = time.monotonic()
    with torch.random.fork_rng(), freed_memory_kept():
        torch.manual_seed(settings.seed)
        if state is not None and state.exists():
            run.resume(state)
        while run.step < settings.steps:
            run.advance()
            judged = run.step % settings.every == 0 or run.step == settings.steps
            if judged:
                run.judge()
            if state is not None and (judged or time.monotonic() - saved > 60 * MINUTES):
                run.save(state)
                saved = time.monotonic()
            if progress:
                progress(run.stage, run.step, settings.steps)
    run.restore()
    return tuple(run.history)


class _Run:
    """One training run: its state and its best judgement."""

    def __init__(self, model: Any, tokens: torch.Tensor, objective: Objective, settings: LoraSettings):
        self.model, self.objective, self.settings = model.eval(), objective, settings
        self.train = len(tokens) - settings.held_out
        self.factors: list[Factors] = [found for _, found in factors_of(model)]
        self.parameters = [each for found in self.factors for each in (found.a, found.b)]
        self.tokens = tokens.to(self.parameters[0].device)
        whole = model.get_base_model()
        shell = copy(whole)  # without its blocks it is the head
        shell._modules = dict(whole._modules)
        self.halves = Halves(shell, self.tokens[0])
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr)
        self.step, self.loss = 0, float("nan")
        self.history: list[Judgement] = []
        self.best: list[torch.Tensor] = []
        if settings.group:
            for found in self.factors:
                held_constant(found.a.data, settings.group)
        self.judge()
        self.fingerprint = self._digest()

    def advance(self) -> None:
        """One step on `batch` windows; the logits of one are in memory at a time."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * self.schedule()
        windows = windows_of(self.step, self.settings.batch, self.train, self.settings.seed)
        self.optimizer.zero_grad()
        hidden = self.halves.blocks(self.tokens[windows])
        cut, self.loss = hidden.detach().requires_grad_(hidden.requires_grad), 0.0
        for row, i in enumerate(windows):
            loss = self.objective(i, self.halves.head(cut[row : row + 1])[0].float()) / len(windows)
            loss.backward()
            self.loss += float(loss.detach())
        self.step += 1
        self.check(self.loss, f"the loss of step {self.step}")
        if hidden.requires_grad:
            hidden.backward(cut.grad)
        if self.settings.group:
            for found in self.factors:
                assert found.a.grad is not None
                summed(found.a.grad, self.settings.group)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        if self.settings.group:
            for found in self.factors:
                held_constant(found.a.data, self.settings.group)

    def schedule(self) -> float:
        """The factor of the learning rate of the next step."""
        warm = ceil(self.settings.steps / 10)
        if self.step < warm:
            return (self.step + 1) / warm
        return 0.55 + 0.45 * cos(pi * (self.step - warm) / max(1, self.settings.steps - warm))

    @torch.no_grad()
    def judge(self) -> None:
        """The loss on the windows held out; keeps the best adapter."""
        self.model.eval()
        judges = range(self.train, len(self.tokens))
        losses = [
            float(self.objective(i, self.halves.head(self.halves.blocks(self.tokens[i][None]))[0].float()))
            for i in judges
        ]
        held_out = sum(losses) / len(losses)
        self.check(held_out, f"the loss held out, after {self.step} steps,")
        if not self.history or held_out < min(judgement.held_out for judgement in self.history):
            self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.history.append(Judgement(self.step, held_out))

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, best in zip(self.parameters, self.best, strict=True):
            parameter.copy_(best)
        self.model.eval()

    @property
    def stage(self) -> str:
        best = min(judgement.held_out for judgement in self.history)
        return f"lora: loss {self.loss:.4f}, held out {best:.4f}"

    # ---- the state

    def _digest(self) -> str:
        """Of settings and text, of the adapter's start, and of the loss there, which model and parent
        decide."""
        shapes = [(found.scale, found.dropout) for found in self.factors]
        digest = sha256(repr((self.settings, shapes, self.history[0].held_out)).encode())
        for part in (self.tokens, *(parameter.detach() for parameter in self.parameters)):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the state, atomically."""
        state = moments_of(self.optimizer, self.parameters)
        for i, (now, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            state |= {f"now.{i}": now, f"best.{i}": best}
        state |= self.random()
        record = {"step": self.step, "history": [asdict(judgement) for judgement in self.history]}
        write_state(path, state, record, self.fingerprint)

    @torch.no_grad()
    def resume(self, path: Path) -> None:
        """Resume from a state; FileError for one that is damaged or of another run."""
        state, record = read_state(path, self.fingerprint)
        self.step, self.history = record["step"], [Judgement(**row) for row in record["history"]]
        for i, (now, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            now.copy_(state.pop(f"now.{i}"))
            best.copy_(state.pop(f"best.{i}"))
        torch.set_rng_state(state.pop("random.cpu"))
        if "random.cuda" in state:
            torch.cuda.set_rng_state(state.pop("random.cuda"), self.tokens.device)
        put_back(self.optimizer, state)

    def random(self) -> dict[str, torch.Tensor]:
        """The states of the generators that dropout draws from."""
        found = {"random.cpu": torch.get_rng_state()}
        if self.tokens.device.type == "cuda":
            found["random.cuda"] = torch.cuda.get_rng_state(self.tokens.device)
        return found

    def check(self, value: float, what: str) -> None:
        if not isfinite(value):
            raise CalibrationError(
                f"lora: {what} is {value}; use a smaller --lr than {self.settings.lr}, or check the "
                "model with `fewbits evaluate`"
            )


def held_constant(a: torch.Tensor, group: int) -> None:
    """`(r, k)`: each group of columns gets the values of its first, in place."""
    a.copy_(a[:, ::group].repeat_interleave(group, 1)[:, : a.shape[1]])


def summed(gradient: torch.Tensor, group: int) -> None:
    """`(r, k)`: each column gets the sum over its group, the gradient of the number that the group shares."""
    r, k = gradient.shape
    whole = functional.pad(gradient, (0, -k % group)).view(r, -1, group).sum(2)
    gradient.copy_(whole.repeat_interleave(group, 1)[:, :k])


@torch.no_grad()
def start_from_error(found: Factors, error: torch.Tensor) -> None:
    """A and B such that scale B A is the matrix of that rank nearest to W - W_q `(n, k)`, in place.

    By the eigenvectors of the smaller Gram matrix, in f64. One step of LoftQ, whose W_q is given."""
    rank = found.a.shape[0]
    error = error.double() / found.scale
    tall = error.shape[0] > error.shape[1]
    gram = error.T @ error if tall else error @ error.T
    values, vectors = torch.linalg.eigh(gram)
    basis, sizes = vectors[:, -rank:], values[-rank:].clamp(min=0).pow(0.25)  # roots of singular values
    if tall:
        a, b = basis.T, error @ basis
    else:
        a, b = basis.T @ error, basis
    large = torch.where(sizes > 0, sizes, 1.0)
    found.a.copy_(a * large[:, None] if tall else a / large[:, None])
    found.b.copy_(b / large if tall else b * large)
