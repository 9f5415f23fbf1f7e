"""evaluate(): run the reference, then each quantized model, over the same windows, and compare."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from ..adapters.forward import GENERATES
from ..adapters.transformers import head_of
from ..blocks.activations import DEFAULT_LIMIT
from ..devices import Room
from ..errors import CalibrationError, FileError, ModelError, raise_all
from ..files.checkpoint import Checkpoint
from ..files.open import as_checkpoint
from ..memory import Need, left_of, resident_memory
from ..runtime.runner import Blockwise, InEngine, Runner, Whole, choose, needs_side_by_side
from ..table import size
from .generation import continuation, greedy
from .results import Evaluation, ModelScores, Settings
from .scores import Fidelity, TokenScores, compare, fidelity, negative_log_likelihood, perplexity
from .simulated import Simulated, Simulation, simulated
from .text import Text, read_text

Progress = Callable[[str, int, int], None]
Decode = Callable[[list[int]], str]


def evaluate(
    reference: Checkpoint | str | Path,
    quantized_models: Sequence[Checkpoint | str | Path],
    text: Text | str,
    settings: Settings | None = None,
    decode: Decode | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare every quantized model with its reference on `text`, a string or tokens (read_text, self_text).

    decode: tokens -> text for the samples (default: the token numbers). Raises CalibrationError for
    too little text, ModelError for models that cannot be compared, FileError for a full scratch disk,
    PlanError or KernelError for an engine that does not read a quantized model or is not there.

        >>> receipt = fewbits.quantize(tiny, out, to="int8_g32", effort="fast")
        >>> found = fewbits.evaluate(tiny, [out], "the quick brown fox " * 200)
        >>> 0 < found.quantized_models[0].fidelity.kl.value < 0.01
        True
    """
    reference, *quantized_models = map(as_checkpoint, (reference, *quantized_models))
    if (head := head_of(reference)) not in GENERATES:
        raise ModelError(f"{reference.path}: generates no text (its head: {head}); use evaluate_head")
    text = read_text(reference, text, "the text given") if isinstance(text, str) else text
    settings = settings or Settings()
    if head == "seq2seq":  # there is no text to go on with
        settings = replace(settings, prompts=0)
    vocabulary = _check_models(reference, quantized_models, settings)
    settings.simulation.check(vocabulary)
    windows = cut(text, settings, vocabulary)
    run = _Run(windows, settings, vocabulary, decode or _numbers, progress or _silent)
    missing, scratch = None, settings.scratch
    engines = [InEngine(model, settings.engine, scratch) for model in quantized_models if settings.engine]
    way = None if engines else _way([reference, *quantized_models], windows.shape, settings)
    if way is None or way.whole:
        with tempfile.TemporaryDirectory(dir=scratch, prefix="fewbits-evaluate-") as folder:
            run.open_store(Path(folder))
            ours = _reference(reference, windows.shape, settings) if way is None else way.runner(reference)
            reference_scores = run.reference(ours)
            each = engines if way is None else map(way.runner, quantized_models)  # one in memory at a time
            quantized_models_scores = tuple(run.quantized(runner) for runner in each)
        if engines and settings.prompts:
            missing = "No text was continued: the quantized models ran in an engine."
    else:
        reference_scores, *rest = run.side_by_side([reference, *quantized_models], way.device)
        quantized_models_scores = tuple(rest)
        if settings.prompts:
            missing = "No text was continued: the models do not fit the memory as a whole, with a cache."
    return Evaluation(
        source=text.source,
        windows=len(windows),
        context=settings.context,
        score_from=settings.first,
        tokens_scored=len(windows) * settings.scored,
        reference=reference_scores,
        quantized_models=quantized_models_scores,
        not_generated=missing,
    )


def memory_need(models: Sequence[Checkpoint], text: Text, settings: Settings) -> Need:
    """What evaluating `models`, the reference first, takes on a text of this length: from headers alone.
    Errors: those of `evaluate`."""
    windows, here = cut(text, settings, _check_models(models[0], models[1:], settings)), resident_memory()
    if settings.engine:
        ours = _reference(models[0], windows.shape, settings)
        runners = [ours, *(InEngine(model, settings.engine) for model in models[1:])]
        most = max(runner.needs(*windows.shape) for runner in runners)
        return Need(f"the reference {ours.kind}, the others in {settings.engine}", here + most, here)
    way = _way(models, windows.shape, settings)
    words = "one model after the other" if way.whole else "block by block, side by side"
    there = None if way.device.type == "cpu" else (str(way.device), way.nbytes)
    return Need(words, here + way.nbytes, here, device=there)


@dataclass(frozen=True)
class _Way:
    """Are models run whole, one after the other, or block by block, side by side? The device, and the bytes
    that they take there."""

    whole: bool
    device: torch.device
    nbytes: int

    def runner(self, model: Checkpoint) -> Runner:
        """Of a whole model."""
        return Whole(model, device=self.device)


def _way(models: Sequence[Checkpoint], shape: Sequence[int], settings: Settings) -> _Way:
    """How the models are run, in f32: whole where they fit the memory of a device, else block by block.
    ModelError, with numbers, where they fit no way, or where a simulation wants them whole."""
    whole = {_name(model): Whole(model).needs(*shape) for model in models}
    largest = max(whole, key=lambda name: whole[name])
    for device, free in Room(settings.device, left_of(settings.memory)).places():
        if whole[largest] <= free:
            return _Way(True, device, whole[largest])
        runners = [_blockwise(model, models, settings, device) for model in models]
        blocks = needs_side_by_side(runners, shape[0], shape[1])
        if blocks <= free and settings.simulation == Simulation():
            return _Way(False, device, blocks)
    if settings.simulation != Simulation():
        raise ModelError(
            f"{largest}: quantized activations and caches are simulated in a whole model, which needs "
            f"{size(whole[largest])} of memory; {size(free)} are free"
        )
    raise ModelError(
        f"{largest}: needs {size(whole[largest])} of memory whole, all {len(models)} models block by "
        f"block {size(blocks)}; {size(free)} are free: evaluate fewer windows or a smaller context"
    )


def _reference(model: Checkpoint, shape: Sequence[int], settings: Settings) -> Runner:
    """What the reference runs in beside quantized models in an engine."""
    return choose(model, shape[0], shape[1], left_of(settings.memory), settings.scratch)


def _blockwise(
    model: Checkpoint, models: Sequence[Checkpoint], settings: Settings, device: torch.device
) -> Blockwise:
    """Hidden states of all models together take at most what one model's may."""
    limit = DEFAULT_LIMIT // len(models)
    return Blockwise(model, limit=limit, scratch=settings.scratch, device=device)


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
    """The windows, and what the reference said of them, while one model after the other runs."""

    def __init__(
        self, windows: torch.Tensor, settings: Settings, vocabulary: int, decode: Decode, progress: Progress
    ) -> None:
        self.windows, self.settings, self.vocabulary = windows, settings, vocabulary
        self.decode, self.progress = decode, progress
        prompts = 0 if settings.engine else settings.prompts
        self.prompts = windows[:prompts, : settings.prompt_tokens]
        self.targets = windows[:, settings.first + 1 :]
        self.written: list[list[int]] = []
        self.stop: frozenset[int] = frozenset()

    def open_store(self, folder: Path) -> None:
        """Map a scratch file that holds the reference's log-probabilities, (w, scored, vocabulary) f32; an
        engine's logits of one position more will lie beside it."""
        shape = (len(self.windows), self.settings.scored, self.vocabulary)
        needed, free, more = 4 * prod(shape), shutil.disk_usage(folder).free, ""
        if self.settings.engine:
            needed, more = 2 * needed + 4 * shape[0] * shape[2], " and logits of the engine"
        if needed > free:
            raise FileError(
                f"{folder.parent}: log-probabilities of the reference{more}: {size(needed)}, free: "
                f"{size(free)}; evaluate fewer windows (max_windows) or set another scratch folder"
            )
        file = str(folder / "reference.f32")
        self.store = torch.from_file(file, shared=True, size=prod(shape), dtype=torch.float32).view(shape)

    def reference(self, runner: Runner) -> ModelScores:
        self.stop = _stop_tokens(runner.checkpoint)
        nll = []
        for i, log_p in enumerate(self._log_probabilities(runner)):
            self.store[i] = log_p
            nll.append(negative_log_likelihood(self.store[i], self.targets[i]))
        self.written = self._continue(runner)
        return self._scores(runner, torch.cat(nll))

    def quantized(self, runner: Runner) -> ModelScores:
        simulation = self.settings.simulation.of(runner.checkpoint.metadata)
        with simulated(runner.model, simulation) if runner.cached else nullcontext([Simulated()]) as record:
            scores = self._compared(runner)
            written = self._continue(runner)
        found = self._scores(runner, scores.nll_quantized, fidelity(scores), written)
        return replace(found, simulated=record[0]) if record[0] != Simulated() else found

    def _compared(self, runner: Runner) -> TokenScores:
        found = enumerate(self._log_probabilities(runner))
        return TokenScores.join(
            [compare(self.store[i].to(log_p.device), log_p, self.targets[i]) for i, log_p in found]
        )

    def side_by_side(self, models: Sequence[Checkpoint], device: torch.device) -> list[ModelScores]:
        """The reference and its quantized models, one block of each in memory at a time."""
        runners = [_blockwise(model, models, self.settings, device) for model in models]
        blocks = [runner.n_blocks for runner in runners]
        if len(set(blocks)) > 1:
            raise ModelError(f"the models have {blocks} blocks: they cannot be run side by side")
        errors: list[list[float]] = [[] for _ in models]
        for runner in runners:
            runner.start(self.windows)
        for i in range(blocks[0]):
            for j, runner in enumerate(runners):
                runner.step(i)
                if j:
                    errors[j].append(_off(runner, runners[0], self.settings.first))
            self.progress("blocks", i + 1, blocks[0])
        nll, parts = self._outputs(runners)
        self.prompts = self.prompts[:0]
        found = [self._scores(runners[0], nll)]
        for j, runner in enumerate(runners[1:], 1):
            figures = self._scores(runner, parts[j].nll_quantized, fidelity(parts[j]))
            found.append(replace(figures, block_errors=tuple(errors[j])))
        return found

    def _outputs(self, runners: Sequence[Blockwise]) -> tuple[torch.Tensor, dict[int, TokenScores]]:
        """After the last block: the reference's losses, and each quantized model's scores by its number."""
        nll: list[torch.Tensor] = []
        parts: dict[int, list[TokenScores]] = {}
        for i, target in enumerate(self.targets):
            for j, runner in enumerate(runners):
                log_p = runner.logits_of(i, self.settings.first)[:-1].log_softmax(-1)
                if j == 0:
                    expected = log_p
                    nll.append(negative_log_likelihood(log_p, target.to(log_p.device)).cpu())
                else:
                    parts.setdefault(j, []).append(compare(expected, log_p, target))
            self.progress("logits", i + 1, len(self.targets))
        return torch.cat(nll), {j: TokenScores.join(each) for j, each in parts.items()}

    def _log_probabilities(self, runner: Runner) -> Iterator[torch.Tensor]:
        """For each window: (scored, vocabulary) f32."""
        name = _name(runner.checkpoint)
        for i, logits in enumerate(runner.logits(self.windows, self.settings.first)):
            if logits.shape[-1] != self.vocabulary:
                raise ModelError(
                    f"{name}: gives {logits.shape[-1]} logits, not {self.vocabulary} as configured"
                )
            yield logits[:-1].log_softmax(-1)
            self.progress(f"{name}: windows", i + 1, len(self.windows))

    def _continue(self, runner: Runner) -> list[list[int]]:
        if not len(self.prompts):
            return []
        stage = f"{_name(runner.checkpoint)}: generating"
        return greedy(
            runner.model,
            self.prompts,
            self.settings.new_tokens,
            self.stop,
            lambda done, total: self.progress(stage, done, total),
        )

    def _scores(
        self,
        runner: Runner,
        nll: torch.Tensor,
        measured: Fidelity | None = None,
        written: list[list[int]] | None = None,
    ) -> ModelScores:
        pairs = zip(self.prompts.tolist(), self.written, written or self.written, strict=True)
        checkpoint = runner.checkpoint
        return ModelScores(
            name=_name(checkpoint),
            nbytes=checkpoint.nbytes,
            bits_per_weight=8 * checkpoint.nbytes / checkpoint.numel,
            perplexity=perplexity(nll),
            seconds=runner.seconds,
            tokens_per_second=self.windows.numel() / runner.seconds,
            fidelity=measured,
            continuations=tuple(continuation(*pair, self.decode) for pair in pairs),
            ran=runner.kind,
        )


def _off(runner: Blockwise, reference: Blockwise, first: int) -> float:
    """|h' - h| / |h| of the scored positions' hidden states."""
    error = energy = 0.0
    for h, other in zip(reference.hidden, runner.hidden, strict=True):
        h, other = h[:, first:].double(), other[:, first:].double()
        error, energy = error + float((other - h).square().sum()), energy + float(h.square().sum())
    return (error / energy) ** 0.5 if energy else 0.0


def _check_models(reference: Checkpoint, quantized_models: Sequence[Checkpoint], settings: Settings) -> int:
    """The vocabulary's size, which all models share; ModelError names each that cannot be compared."""
    sizes = [(_name(model), model.text_config.get("vocab_size")) for model in (reference, *quantized_models)]
    faults = [f"{name}: its config names no vocab_size" for name, number in sizes if number is None]
    faults += [
        f"{name}: a vocabulary of {number}, the reference's has {sizes[0][1]}; they must be the same"
        for name, number in sizes[1:]
        if None not in (number, sizes[0][1]) and number != sizes[0][1]
    ]
    for model in (reference, *quantized_models):
        longest = model.text_config.get("max_position_embeddings")
        if longest is not None and settings.context > longest:
            faults.append(f"{_name(model)}: context {settings.context} is more than its {longest} positions")
    raise_all(ModelError, "evaluate", faults)
    return int(sizes[0][1] or 0)


def _stop_tokens(checkpoint: Checkpoint) -> frozenset[int]:
    eos = checkpoint.text_config.get("eos_token_id")
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.path.name or str(checkpoint.path)


def _numbers(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def _silent(stage: str, done: int, total: int) -> None:
    pass
