"""evaluate(): run the reference, then each quantized model, over the same windows, and compare."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..adapters.transformers import load_model
from ..blocks.activations import DEFAULT_LIMIT
from ..errors import CalibrationError, FileError, ModelError, raise_all
from ..files.checkpoint import Checkpoint
from ..files.open import open_checkpoint
from ..memory import Need, free_memory, left_of, resident_memory
from ..runtime.runner import Blockwise, Whole
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
    too little text, ModelError for models that cannot be compared, FileError for a full scratch disk.

        >>> receipt = fewbits.quantize(tiny, out, to="int8_g32", effort="fast")
        >>> found = fewbits.evaluate(tiny, [out], "the quick brown fox " * 200)
        >>> 0 < found.quantized_models[0].fidelity.kl.value < 0.01
        True
    """
    reference, *quantized_models = (
        given if isinstance(given, Checkpoint) else open_checkpoint(Path(given))
        for given in (reference, *quantized_models)
    )
    text = read_text(reference, text, "the text given") if isinstance(text, str) else text
    settings = settings or Settings()
    vocabulary = _check_models(reference, quantized_models, settings)
    settings.simulation.check(vocabulary)
    windows = cut(text, settings, vocabulary)
    run = _Run(windows, settings, vocabulary, decode or _numbers, progress or _silent)
    missing = None
    if _ways([reference, *quantized_models], windows.shape, settings)[0]:
        with tempfile.TemporaryDirectory(dir=settings.scratch, prefix="fewbits-evaluate-") as folder:
            run.open_store(Path(folder))
            reference_scores = run.reference(reference)
            quantized_models_scores = tuple(run.quantized(quantized) for quantized in quantized_models)
    else:
        reference_scores, *rest = run.side_by_side([reference, *quantized_models])
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
    windows = cut(text, settings, _check_models(models[0], models[1:], settings))
    whole, nbytes = _ways(models, windows.shape, settings)
    here = resident_memory()
    return Need("one model after the other" if whole else "block by block, side by side", here + nbytes, here)


def _ways(models: Sequence[Checkpoint], shape: Sequence[int], settings: Settings) -> tuple[bool, int]:
    """Does each model fit the memory as a whole, in f32? And the bytes that they take so, or block by block.
    ModelError, with numbers, where they do not fit either way, or where a simulation wants them whole."""
    left = left_of(settings.memory)
    free = free_memory() if left is None else left
    whole = {_name(model): Whole(model).needs(*shape) for model in models}
    largest = max(whole, key=lambda name: whole[name])
    if whole[largest] <= free:
        return True, whole[largest]
    blocks = sum(_blockwise(model, models, settings).needs(*shape) for model in models)
    if settings.simulation != Simulation():
        raise ModelError(
            f"{largest}: quantized activations and caches are simulated in a whole model, which needs "
            f"{size(whole[largest])} of memory; {size(free)} are free"
        )
    if blocks > free:
        raise ModelError(
            f"{largest}: needs {size(whole[largest])} of memory whole, all {len(models)} models block by "
            f"block {size(blocks)}; {size(free)} are free: evaluate fewer windows or a smaller context"
        )
    return False, blocks


def _blockwise(model: Checkpoint, models: Sequence[Checkpoint], settings: Settings) -> Blockwise:
    """Hidden states of all models together take at most what one model's may."""
    return Blockwise(model, limit=DEFAULT_LIMIT // len(models), scratch=settings.scratch)


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
        self.prompts = windows[: settings.prompts, : settings.prompt_tokens]
        self.targets = windows[:, settings.first + 1 :]
        self.written: list[list[int]] = []
        self.stop: frozenset[int] = frozenset()

    def open_store(self, folder: Path) -> None:
        """Map a scratch file that holds the reference's log-probabilities, (w, scored, vocabulary) f32."""
        shape = (len(self.windows), self.settings.scored, self.vocabulary)
        needed, free = 4 * prod(shape), shutil.disk_usage(folder).free
        if needed > free:
            raise FileError(
                f"{folder.parent}: log-probabilities of the reference: {size(needed)}, free: {size(free)}; "
                "evaluate fewer windows (max_windows) or set another scratch folder"
            )
        file = str(folder / "reference.f32")
        self.store = torch.from_file(file, shared=True, size=prod(shape), dtype=torch.float32).view(shape)

    def reference(self, checkpoint: Checkpoint) -> ModelScores:
        model, name = load_model(checkpoint, torch.float32), _name(checkpoint)
        self.stop = _stop_tokens(checkpoint)
        nll, seconds = [], 0.0
        for i, (log_p, took) in enumerate(self._log_probabilities(model, name)):
            self.store[i] = log_p
            nll.append(negative_log_likelihood(log_p, self.targets[i]))
            seconds += took
        self.written = self._continue(model, name)
        return self._scores(checkpoint, torch.cat(nll), seconds)

    def quantized(self, checkpoint: Checkpoint) -> ModelScores:
        model, name = load_model(checkpoint, torch.float32), _name(checkpoint)
        parts, seconds = [], 0.0
        with simulated(model, self.settings.simulation.of(checkpoint.metadata)) as record:
            for i, (log_p, took) in enumerate(self._log_probabilities(model, name)):
                parts.append(compare(self.store[i], log_p, self.targets[i]))
                seconds += took
            written = self._continue(model, name)
        scores = TokenScores.join(parts)
        found = self._scores(checkpoint, scores.nll_quantized, seconds, fidelity(scores), written)
        return replace(found, simulated=record[0]) if record[0] != Simulated() else found

    def side_by_side(self, models: Sequence[Checkpoint]) -> list[ModelScores]:
        """The reference and its quantized models, one block of each in memory at a time."""
        runners = [_blockwise(model, models, self.settings) for model in models]
        blocks = [runner.n_blocks for runner in runners]
        if len(set(blocks)) > 1:
            raise ModelError(f"the models have {blocks} blocks: they cannot be run side by side")
        spent = [0.0] * len(models)
        errors: list[list[float]] = [[] for _ in models]
        for runner in runners:
            runner.start(self.windows)
        for i in range(blocks[0]):
            for j, runner in enumerate(runners):
                began = perf_counter()
                runner.step(i)
                spent[j] += perf_counter() - began
                if j:
                    errors[j].append(_off(runner, runners[0], self.settings.first))
            self.progress("blocks", i + 1, blocks[0])
        nll, parts = self._outputs(runners, spent)
        self.prompts = self.prompts[:0]
        found = [self._scores(models[0], nll, spent[0])]
        for j, model in enumerate(models[1:], 1):
            figures = self._scores(model, parts[j].nll_quantized, spent[j], fidelity(parts[j]))
            found.append(replace(figures, block_errors=tuple(errors[j])))
        return [replace(each, ran=Blockwise.kind) for each in found]

    def _outputs(
        self, runners: Sequence[Blockwise], spent: list[float]
    ) -> tuple[torch.Tensor, dict[int, TokenScores]]:
        """After the last block: the reference's losses, and each quantized model's scores by its number."""
        nll: list[torch.Tensor] = []
        parts: dict[int, list[TokenScores]] = {}
        for i, target in enumerate(self.targets):
            for j, runner in enumerate(runners):
                began = perf_counter()
                log_p = runner.logits_of(i, self.settings.first)[:-1].log_softmax(-1)
                spent[j] += perf_counter() - began
                if j == 0:
                    expected = log_p
                    nll.append(negative_log_likelihood(log_p, target))
                else:
                    parts.setdefault(j, []).append(compare(expected, log_p, target))
            self.progress("logits", i + 1, len(self.targets))
        return torch.cat(nll), {j: TokenScores.join(each) for j, each in parts.items()}

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
            ran="whole, float32",
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
    sizes = [
        (_name(model), _text_config(model).get("vocab_size")) for model in (reference, *quantized_models)
    ]
    faults = [f"{name}: its config names no vocab_size" for name, number in sizes if number is None]
    faults += [
        f"{name}: a vocabulary of {number}, the reference's has {sizes[0][1]}; they must be the same"
        for name, number in sizes[1:]
        if None not in (number, sizes[0][1]) and number != sizes[0][1]
    ]
    for model in (reference, *quantized_models):
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
