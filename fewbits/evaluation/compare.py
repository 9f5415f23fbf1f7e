"""evaluate(): run the parent, then each child, over the same windows, and compare."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..adapters.transformers import load_model
from ..errors import CalibrationError, FileError, ModelError, raise_all
from ..files.checkpoint import Checkpoint
from ..files.open import open_checkpoint
from ..table import Cell, size, table
from .generation import Continuation, continuation, greedy
from .scores import Fidelity, Measured, TokenScores, compare, fidelity, negative_log_likelihood, perplexity
from .simulated import Simulated, Simulation, simulated
from .text import Text, read_text

Progress = Callable[[str, int, int], None]
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Settings:
    """How to score and what to generate.

    context: tokens in a window. score_from: first position whose prediction counts (default
    context // 2). prompts: how many windows' first `prompt_tokens` are continued by `new_tokens`
    (0: none). scratch: folder for the parent's log-probabilities, f32, windows x scored x vocabulary.
    simulation: quantized activations and cache, of the children only.
    """

    context: int = 512
    score_from: int | None = None
    max_windows: int | None = None
    prompts: int = 4
    prompt_tokens: int = 24
    new_tokens: int = 48
    scratch: Path | None = None
    simulation: Simulation = field(default_factory=Simulation)

    @property
    def first(self) -> int:
        return self.context // 2 if self.score_from is None else self.score_from

    @property
    def scored(self) -> int:
        """Tokens scored in one window: those at first + 1 ... context - 1."""
        return self.context - 1 - self.first


@dataclass(frozen=True)
class ModelScores:
    """One model's figures. seconds: forward passes over the windows only. A parent has no fidelity."""

    name: str
    nbytes: int
    bits_per_weight: float
    perplexity: Measured
    seconds: float
    tokens_per_second: float
    fidelity: Fidelity | None = None
    continuations: tuple[Continuation, ...] = ()
    simulated: Simulated | None = None


@dataclass(frozen=True)
class Evaluation:
    """The figures of a parent and its children, and what they were measured on."""

    source: str
    windows: int
    context: int
    score_from: int
    tokens_scored: int
    parent: ModelScores
    children: tuple[ModelScores, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def samples(self) -> str:
        """The greedy continuations of each prompt, parent and children one below the other."""
        parts = []
        for i, said in enumerate(self.parent.continuations):
            parts.append(f"prompt: {said.prompt!r}\n  {self.parent.name}: {said.parent!r}")
            parts += [f"  {child.name}: {child.continuations[i].child!r}" for child in self.children]
        return "\n".join(parts)

    def table(self) -> str:
        """One line a model, the parent first, and a line that says what was scored."""
        head = [
            "model",
            "size",
            "bits/w",
            "KL mean",
            "+-",
            "KL 99.9%",
            "agree %",
            "ppl",
            "ratio",
            "+-",
            "tok/s",
        ]
        head += ["same tokens", "loops"]
        lines = [_line(model) for model in (self.parent, *self.children)]
        scored = f"{self.windows} windows of {self.context}, scored from position {self.score_from}"
        notes = [f"\n{child.name} ran with {child.simulated}." for child in self.children if child.simulated]
        text = f"{self.tokens_scored} tokens scored ({scored}). Text: {self.source}."
        return f"{table(head, lines)}\n{text}{''.join(notes)}"


def evaluate(
    parent: Checkpoint | str | Path,
    children: Sequence[Checkpoint | str | Path],
    text: Text | str,
    settings: Settings | None = None,
    decode: Decode | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare every child with its parent on `text`, a string or tokens (read_text, self_text).

    decode: tokens -> text for the samples (default: the token numbers). Raises CalibrationError for
    too little text, ModelError for models that cannot be compared, FileError for a full scratch disk.

        >>> receipt = fewbits.quantize(tiny, out, to="int8_g32", effort="fast")
        >>> found = fewbits.evaluate(tiny, [out], "the quick brown fox " * 200)
        >>> 0 < found.children[0].fidelity.kl.value < 0.01
        True
    """
    parent, *children = (
        given if isinstance(given, Checkpoint) else open_checkpoint(Path(given))
        for given in (parent, *children)
    )
    text = read_text(parent, text, "the text given") if isinstance(text, str) else text
    settings = settings or Settings()
    vocabulary = _check_models(parent, children, settings)
    settings.simulation.check(vocabulary)
    windows = cut(text, settings, vocabulary)
    run = _Run(windows, settings, vocabulary, decode or _numbers, progress or _silent)
    with tempfile.TemporaryDirectory(dir=settings.scratch, prefix="fewbits-evaluate-") as folder:
        run.open_store(Path(folder))
        parent_scores = run.parent(parent)
        children_scores = tuple(run.child(child) for child in children)
    return Evaluation(
        source=text.source,
        windows=len(windows),
        context=settings.context,
        score_from=settings.first,
        tokens_scored=len(windows) * settings.scored,
        parent=parent_scores,
        children=children_scores,
    )


def cut(text: Text, settings: Settings, vocabulary: int) -> torch.Tensor:
    """Text -> windows `(w, context)`; raises CalibrationError where that cannot be done."""
    tokens, context = text.tokens, settings.context
    faults = []
    if context < 2 or not 0 <= settings.first <= context - 2:
        faults.append(f"score_from {settings.first} is not in 0 ... {context - 2}, context - 2")
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        faults.append(f"tokens are {tuple(tokens.shape)} {tokens.dtype}, (t,) int64 is needed")
    elif len(tokens) < context:
        faults.append(
            f"{len(tokens)} tokens fill no window of {context}; give more text or a smaller context"
        )
    elif int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        worst = int(tokens.max()) if int(tokens.min()) >= 0 else int(tokens.min())
        faults.append(f"token {worst} is outside the vocabulary of {vocabulary}: another tokenizer's text")
    if settings.max_windows is not None and settings.max_windows < 1:
        faults.append(f"max_windows is {settings.max_windows}; at least 1 is needed")
    raise_all(CalibrationError, f"text ({text.source})", faults)
    n = min(len(tokens) // context, settings.max_windows or len(tokens))
    windows = tokens[: n * context].view(n, context).clone()
    if text.bos is not None:
        windows[:, 0] = text.bos
    return windows


class _Run:
    """The windows, and what the parent said of them, while one model after the other runs."""

    def __init__(
        self, windows: torch.Tensor, settings: Settings, vocabulary: int, decode: Decode, progress: Progress
    ) -> None:
        self.windows, self.settings, self.vocabulary = windows, settings, vocabulary
        self.decode, self.progress = decode, progress
        self.prompts = windows[: settings.prompts, : settings.prompt_tokens]
        self.targets = windows[:, settings.first + 1 :]
        self.written: list[list[int]] = []
        self.stop: frozenset[int] = frozenset()

    def open_store(self, folder: Path) -> None:
        """Map a scratch file that holds the parent's log-probabilities, (w, scored, vocabulary) f32."""
        shape = (len(self.windows), self.settings.scored, self.vocabulary)
        needed, free = 4 * prod(shape), shutil.disk_usage(folder).free
        if needed > free:
            raise FileError(
                f"{folder.parent}: the parent's log-probabilities need {size(needed)}, free: {size(free)}; "
                "evaluate fewer windows (max_windows) or set another scratch folder"
            )
        file = str(folder / "parent.f32")
        self.store = torch.from_file(file, shared=True, size=prod(shape), dtype=torch.float32).view(shape)

    def parent(self, checkpoint: Checkpoint) -> ModelScores:
        model, name = load_model(checkpoint, torch.float32), _name(checkpoint)
        self.stop = _stop_tokens(checkpoint)
        nll, seconds = [], 0.0
        for i, (log_p, took) in enumerate(self._log_probabilities(model, name)):
            self.store[i] = log_p
            nll.append(negative_log_likelihood(log_p, self.targets[i]))
            seconds += took
        self.written = self._continue(model, name)
        return self._scores(checkpoint, torch.cat(nll), seconds)

    def child(self, checkpoint: Checkpoint) -> ModelScores:
        model, name = load_model(checkpoint, torch.float32), _name(checkpoint)
        parts, seconds = [], 0.0
        with simulated(model, self.settings.simulation.of(checkpoint.metadata)) as record:
            for i, (log_p, took) in enumerate(self._log_probabilities(model, name)):
                parts.append(compare(self.store[i], log_p, self.targets[i]))
                seconds += took
            written = self._continue(model, name)
        scores = TokenScores.join(parts)
        found = self._scores(checkpoint, scores.nll_child, seconds, fidelity(scores), written)
        return replace(found, simulated=record[0]) if record[0] != Simulated() else found

    def _log_probabilities(self, model: Any, name: str) -> Iterator[tuple[torch.Tensor, float]]:
        """For each window: (scored, vocabulary) f32, and the seconds that the model took."""
        keep = self.settings.scored + 1
        for i, window in enumerate(self.windows):
            began = perf_counter()
            with torch.inference_mode():
                logits = model(input_ids=window[None], use_cache=False, logits_to_keep=keep).logits
            took = perf_counter() - began
            if logits.shape[-1] != self.vocabulary:
                raise ModelError(
                    f"{name}: gives {logits.shape[-1]} logits, not {self.vocabulary} as configured"
                )
            log_p = logits[0, :-1].float().log_softmax(-1)
            if bool(log_p.isnan().any()):
                raise ModelError(f"{name}: the output of window {i} is not finite; its weights are damaged")
            yield log_p, took
            self.progress(f"{name}: windows", i + 1, len(self.windows))

    def _continue(self, model: Any, name: str) -> list[list[int]]:
        if not len(self.prompts):
            return []
        stage = f"{name}: generating"
        return greedy(
            model,
            self.prompts,
            self.settings.new_tokens,
            self.stop,
            lambda done, total: self.progress(stage, done, total),
        )

    def _scores(
        self,
        checkpoint: Checkpoint,
        nll: torch.Tensor,
        seconds: float,
        measured: Fidelity | None = None,
        written: list[list[int]] | None = None,
    ) -> ModelScores:
        pairs = zip(self.prompts.tolist(), self.written, written or self.written, strict=True)
        nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        weights = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
        return ModelScores(
            name=_name(checkpoint),
            nbytes=nbytes,
            bits_per_weight=8 * nbytes / weights,
            perplexity=perplexity(nll),
            seconds=seconds,
            tokens_per_second=self.windows.numel() / seconds,
            fidelity=measured,
            continuations=tuple(continuation(*pair, self.decode) for pair in pairs),
        )


def _check_models(parent: Checkpoint, children: Sequence[Checkpoint], settings: Settings) -> int:
    """The vocabulary's size, which all models share; ModelError names each that cannot be compared."""
    sizes = [(_name(model), _text_config(model).get("vocab_size")) for model in (parent, *children)]
    faults = [f"{name}: its config names no vocab_size" for name, number in sizes if number is None]
    faults += [
        f"{name}: a vocabulary of {number}, the parent's has {sizes[0][1]}; they must be the same"
        for name, number in sizes[1:]
        if None not in (number, sizes[0][1]) and number != sizes[0][1]
    ]
    for model in (parent, *children):
        longest = _text_config(model).get("max_position_embeddings")
        if longest is not None and settings.context > longest:
            faults.append(f"{_name(model)}: context {settings.context} is more than its {longest} positions")
    raise_all(ModelError, "evaluate", faults)
    return int(sizes[0][1] or 0)


def _text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return checkpoint.config.get("text_config", checkpoint.config)


def _stop_tokens(checkpoint: Checkpoint) -> frozenset[int]:
    eos = _text_config(checkpoint).get("eos_token_id")
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.path.name or str(checkpoint.path)


def _numbers(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _line(model: ModelScores) -> list[Cell]:
    start: list[Cell] = [model.name, size(model.nbytes), model.bits_per_weight]
    new = model.continuations
    if model.fidelity is None:
        loops = sum(c.parent_loop is not None for c in new)
        return [
            *start,
            None,
            None,
            None,
            None,
            model.perplexity.value,
            None,
            None,
            model.tokens_per_second,
            None,
            loops,
        ]
    far = model.fidelity
    same = [c.diverges_at for c in new if c.diverges_at is not None]
    return [
        *start,
        *far.kl,
        far.kl_999,
        100 * far.agreement.value,
        model.perplexity.value,
        *far.perplexity_ratio,
        model.tokens_per_second,
        sum(same) / len(same) if same else None,
        sum(c.child_loop is not None for c in new),
    ]
