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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from math import ceil, cos, isfinite, pi
from pathlib import Path

import torch

from ..adapters.transformers import load_model
from ..errors import CalibrationError, FileError, raise_all
from ..files.checkpoint import Checkpoint
from ..qtensor import QTensor
from ..runtime.runner import Blockwise
from ..storage.atomic import write_atomic
from .rounding import shuffled
from .student import Student
from .teacher import Teacher

Progress = Callable[[str, int, int], None]
BETAS = (0.9, 0.95)
STATE = ("a", "mean", "square", "best")
FROZEN = 0.85  # of the steps: then codes are fixed, and what swings between two no longer does
TINY = 1e-12  # added to Adam's root mean square: gradients of single scales are as small as 1e-8


@dataclass(frozen=True)
class DistillSettings:
    """Duration and learning rates.

    steps: of `batch` windows each. lr: the largest relative change of a block parameter in one step;
    lr_vectors: the same for norms and biases. Both rise over a tenth of the steps and fall to a tenth on a
    cosine. held_out: number of windows at the end that are used for evaluation only; every: steps between two
    evaluations. state: file to resume a killed run from, written at each evaluation; the caller deletes
    it. device: of the quantized model as a whole, and of the reference's blocks in turn. lr_codes: of the
    float weights that codes are rounded from, in spacings of the grid; 0: codes are fixed. It falls to 0 at
    FROZEN of the steps, after which only the other numbers move. keep_zeros: weights that are 0 at the start,
    as pruned ones are, stay 0."""

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
    keep_zeros: bool = False


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
    runner = Blockwise(reference, device=device)
    teacher = Teacher(runner, tokens, lambda done, total: progress("reference", done, total))
    floats = reference if settings.lr_codes else None
    student = Student(load_model(quantized), quantized, tokens[0], device, floats)
    if settings.keep_zeros:
        student.hold_zeros()
    run = _Run(teacher, student, tokens, settings)
    if settings.state is not None and settings.state.exists():
        run.resume(settings.state)
    while run.step < settings.steps:
        run.advance()
        progress(run.stage, run.step, settings.steps)
        if run.step % settings.every == 0 or run.step == settings.steps:
            run.judge()
            if settings.state is not None:
                run.save(settings.state)
    return run.result()


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
    return faults


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
        self.start, self.unit, self.spans = student.read(), student.units(), student.spans()
        self.a, self.mean, self.square = (torch.zeros_like(self.start) for _ in range(3))
        self.best = self.a.clone()
        self.step = 0
        self.history: list[Judgement] = []
        self.losses: list[float] = []
        self.judge()

    def advance(self) -> None:
        """One step of Adam on `batch` windows."""
        self.student.write(self.start + self.unit * self.a)
        windows = self.chosen(self.step)
        loss = self.student.learn(self.tokens[windows], lambda i: self.teacher.log_p(windows[i]))
        self.losses.append(loss)
        self.check(loss, f"the loss of step {self.step + 1}")
        whole = self.student.gradient()
        self.step += 1
        first, second = BETAS
        for at, kind in self.spans:  # part by part: a model's weights are many
            gradient = whole[at].mul_(self.unit[at])
            self.mean[at].lerp_(gradient, 1 - first)
            self.square[at].lerp_(gradient.square_(), 1 - second)
            root = (self.square[at] / (1 - second**self.step)).sqrt_().add_(TINY)
            self.a[at].addcdiv_(self.mean[at], root, value=-self.rate(kind) / (1 - first**self.step))

    @property
    def stage(self) -> str:
        """For people, with the figures of now where the whole model is trained."""
        if not self.settings.lr_codes:
            return "distill"
        best = min(judgement.held_out for judgement in self.history)
        now = f"{self.losses[-1]:.4f}" if self.losses else "-"
        return f"train: KL {now}, held out {best:.4f}"

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
        self.check(held_out, f"the KL divergence held out, after {self.step} steps,")
        learned = sum(self.losses) / len(self.losses) if self.losses else None
        if self.history and held_out < min(judgement.held_out for judgement in self.history):
            self.best = self.a.clone()
        self.history.append(Judgement(self.step, learned, held_out))
        self.losses = []

    def check(self, value: float, what: str) -> None:
        if not isfinite(value):
            raise CalibrationError(
                f"distill: {what} is {value}; use a smaller lr than {self.settings.lr}, or check the "
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
        settings = {key: value for key, value in asdict(self.settings).items() if key != "state"}
        digest = sha256(repr(sorted(settings.items())).encode())
        for part in (self.tokens, self.start, self.teacher.hidden(len(self.tokens) - 1)):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the state, atomically."""
        from safetensors.torch import save

        record = {"step": self.step, "history": [asdict(judgement) for judgement in self.history]}
        about = {"distill": json.dumps(record), "fingerprint": self.fingerprint()}
        state = {name: getattr(self, name).cpu() for name in STATE}
        write_atomic(path, save(state, about))

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
        for name in STATE:
            getattr(self, name).copy_(state[name])


def _same(value: QTensor | torch.Tensor, other: QTensor | torch.Tensor) -> bool:
    if isinstance(value, QTensor) and isinstance(other, QTensor):
        return all(torch.equal(plane, other.planes[name]) for name, plane in value.planes.items())
    return isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(value, other)


def _silent(stage: str, done: int, total: int) -> None:
    pass
