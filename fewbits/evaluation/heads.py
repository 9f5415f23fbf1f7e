"""What quantizing cost a model without a language model's head: classifiers, masked models, embeddings.

    head        a row is                     figures
    sequence    a text                       KL divergence of the classes, agreement; accuracy, F1 with labels
    token       a token that is not special  the same, without labels
    masked      a token that was masked      the same; accuracy: how often the model names that token
    embedding   a text                       cosine to the reference's; rank correlation of the similarities

The reference and its quantized models see the same texts, cut at `Settings.context` tokens. One model is in
memory at a time. An embedding is pooled as the directory's files of sentence-transformers say, else the mean
of the text's tokens, and has length 1. A classifier of one class, or of several that do not exclude each
other, gives a probability for each class on its own, as transformers' pipeline does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.nn.functional import logsigmoid, normalize

from ..adapters.forward import GENERATES, without_cache
from ..adapters.transformers import head_of, load_tokenizer
from ..devices import Room
from ..errors import CalibrationError, ModelError, PlanError, raise_all
from ..files.checkpoint import Checkpoint
from ..files.open import as_checkpoint
from ..memory import Need, left_of, resident_memory
from ..runtime.runner import Whole
from ..table import Cell, size, table
from .examples import Example, Examples
from .pooling import Pooling, pooling_of
from .results import Settings
from .scores import mean
from .simulated import Simulated, simulated

BATCH = 16  # texts at once
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MASKED = 4  # tokens of a text that are masked at most, of a tenth of them
Progress = Callable[[str, int, int], None]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class HeadScores:
    """One model's figures, named as in the table. seconds: its forward passes, on the texts alone."""

    name: str
    nbytes: int
    bits_per_weight: float
    seconds: float
    figures: Mapping[str, float]
    simulated: Simulated | None = None


@dataclass(frozen=True)
class HeadEvaluation:
    """The figures of a reference and its quantized models. rows: what was scored, in number."""

    source: str
    head: str
    texts: int
    rows: int
    reference: HeadScores
    quantized_models: tuple[HeadScores, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def table(self) -> str:
        models = (self.reference, *self.quantized_models)
        names = list(dict.fromkeys(name for model in models for name in model.figures))
        lines: list[list[Cell]] = [
            [
                *(model.name, size(model.nbytes), model.bits_per_weight),
                *(*map(model.figures.get, names), model.seconds),
            ]
            for model in models
        ]
        notes = [f"\n{model.name} ran with {model.simulated}." for model in models if model.simulated]
        text = f"{self.texts} texts, {self.rows} rows ({self.head}). Text: {self.source}."
        head = ["model", "size", "bits/w", *names, "seconds"]
        return f"{table(head, lines, digits=5)}\n{text}{''.join(notes)}"


def evaluate_head(
    reference: Checkpoint | str | Path,
    quantized_models: Sequence[Checkpoint | str | Path],
    examples: Examples | Sequence[Example],
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> HeadEvaluation:
    """Compare every quantized model with its reference on texts, with labels where they have some.

    Raises ModelError for models that cannot be compared or do not fit the memory, CalibrationError for texts
    or labels that do not fit the model, PlanError for settings that only a language model has.
    """
    reference, *quantized_models = map(as_checkpoint, (reference, *quantized_models))
    settings = settings or Settings()
    examples = examples if isinstance(examples, Examples) else Examples(tuple(examples), "the texts given")
    device = _check(reference, quantized_models, examples, settings)
    settings = replace(settings, device=str(device))
    run = _Run(reference, examples, settings, progress or (lambda stage, done, total: None))
    found = tuple(run.scores(model) for model in quantized_models)
    return HeadEvaluation(
        examples.source, run.head, len(examples.texts), len(run.expected), run.reference, found
    )


def head_memory_need(models: Sequence[Checkpoint], texts: int, settings: Settings) -> Need:
    """What evaluating `models` on a number of texts takes: from headers alone."""
    here, needed = resident_memory(), _needed(models, texts, settings)
    device, most = _place(needed, settings)[0], max(needed.values())
    there = None if device.type == "cpu" else (str(device), most)
    return Need("one model after the other", here + most, here, device=there)


def _needed(models: Sequence[Checkpoint], texts: int, settings: Settings) -> dict[Path, int]:
    """Bytes that each model takes."""
    return {model.path: Whole(model).needs(texts, BATCH * settings.context) for model in models}


def _place(needed: Mapping[Path, int], settings: Settings) -> tuple[torch.device, int]:
    """The device on which the models fit, else the last that may be tried; and the bytes free there."""
    return Room(settings.device, left_of(settings.memory)).place_for(max(needed.values()))


def _check(
    reference: Checkpoint, models: Sequence[Checkpoint], examples: Examples, settings: Settings
) -> torch.device:
    """Refuse what cannot be compared -> the device of the models."""
    if settings.engine or settings.simulation.cache:
        raise PlanError("--engine and --kv-cache are for models that generate text; this one does not")
    if not examples.texts:
        raise CalibrationError(f"{examples.source}: no text")
    heads = {model.path: head_of(model) for model in (reference, *models)}
    faults = [
        f"{path}: its head is {head!r}, the reference's {heads[reference.path]!r}"
        for path, head in heads.items()
        if head != heads[reference.path]
    ]
    if heads[reference.path] in GENERATES:
        faults.append(f"{reference.path}: generates text; give it to `evaluate`")
    if examples.labels and heads[reference.path] != "sequence":
        faults.append(f"{reference.path}: labels are for classifiers of texts")
    needed = _needed((reference, *models), len(examples.texts), settings)
    device, free = _place(needed, settings)
    for path, nbytes in needed.items():
        if nbytes > free:
            faults.append(f"{path}: needs {size(nbytes)} of memory, {size(free)} are free")
    raise_all(ModelError, "evaluate", faults)
    return device


class _Run:
    """The texts in batches, and what the reference gives for them."""

    def __init__(
        self, reference: Checkpoint, examples: Examples, settings: Settings, progress: Progress
    ) -> None:
        self.head, self.settings, self.progress = head_of(reference), settings, progress
        self.pooling = pooling_of(reference)
        self.device = torch.device(settings.device)
        model = Whole(reference, device=self.device).model
        self.batches = list(text_batches(reference, model, examples.texts, settings, self.head, self.pooling))
        self.targets = self._targets(model, examples)
        self.expected, seconds = self._rows(reference, model)
        self.reference = self._scores(reference, seconds, self._absolute(self.expected))

    def scores(self, checkpoint: Checkpoint) -> HeadScores:
        model = Whole(checkpoint, device=self.device).model
        simulation = self.settings.simulation.of(checkpoint.metadata)
        with simulated(model, simulation) as record:
            rows, seconds = self._rows(checkpoint, model)
        if rows.shape != self.expected.shape:
            raise ModelError(
                f"{checkpoint.path}: gives {tuple(rows.shape)}, the reference {tuple(self.expected.shape)}"
            )
        figures = similar if self.head == "embedding" else _distributed
        found = self._scores(checkpoint, seconds, figures(self.expected, rows) | self._absolute(rows))
        return replace(found, simulated=record[0]) if record[0] != Simulated() else found

    def _targets(self, model: Any, examples: Examples) -> torch.Tensor | None:
        """The right answer of each row, where it is known."""
        if self.head == "masked":
            return torch.cat([batch["answers"] for batch in self.batches])
        return class_ids(model.config, examples) if examples.labels else None

    @torch.inference_mode()
    def _rows(self, checkpoint: Checkpoint, model: Any) -> tuple[torch.Tensor, float]:
        """Log-probabilities `(rows, classes)` or embeddings `(rows, h)`, and the seconds that they took."""
        found, seconds = [], 0.0
        no_cache = without_cache(model)
        for i, batch in enumerate(self.batches):
            batch = {key: value.to(self.device) for key, value in batch.items()}
            given = {key: batch[key] for key in INPUTS if key in batch}
            began = perf_counter()
            out = model(**given, **no_cache)
            seconds += perf_counter() - began
            if self.head == "embedding":
                if "last_hidden_state" not in out:
                    raise ModelError(
                        f"{checkpoint.path}: {type(model).__name__} gives {', '.join(out)}, no hidden states"
                    )
                found.append(normalize(self.pooling(out.last_hidden_state, batch["attention_mask"]), dim=-1))
            else:
                logits = out.logits if self.head == "sequence" else out.logits[batch["scored"]]
                found.append(_log_probabilities(logits.float(), model.config))
            self.progress(f"{checkpoint.path.name}: texts", i + 1, len(self.batches))
        rows = torch.cat(found).cpu()
        if not bool(rows.isfinite().all()):
            raise ModelError(f"{checkpoint.path}: its output is not finite; its weights are damaged")
        return rows, seconds

    def _absolute(self, rows: torch.Tensor) -> dict[str, float]:
        return {} if self.targets is None else _right(rows, self.targets, self.head)

    def _scores(self, checkpoint: Checkpoint, seconds: float, figures: Mapping[str, float]) -> HeadScores:
        nbytes, bits = checkpoint.nbytes, 8 * checkpoint.nbytes / checkpoint.numel
        return HeadScores(checkpoint.path.name, nbytes, bits, seconds, figures)


def text_batches(
    checkpoint: Checkpoint,
    model: Any,
    texts: Sequence[Example],
    settings: Settings,
    head: str,
    pooling: Pooling,
) -> Iterator[Batch]:
    """Texts in tokens, padded on the right. scored: positions whose output is a row; answers: what stood
    where a token is masked."""
    tokenizer = load_tokenizer(checkpoint)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else model.config.pad_token_id
    alone = pad is None or (head == "sequence" and getattr(model.config, "pad_token_id", None) != pad)
    limit = min(settings.context, pooling.longest or settings.context, _positions(model))
    generator = torch.Generator().manual_seed(0)
    if head == "masked" and tokenizer.mask_token_id is None:
        raise CalibrationError(f"{checkpoint.path}: its tokenizer names no mask token")
    step = 1 if alone else BATCH
    for start in range(0, len(texts), step):
        found = tokenizer(
            list(texts[start : start + step]),
            truncation=True, max_length=limit, return_special_tokens_mask=True,
        )  # fmt: skip
        ids, special = _padded(found.input_ids, pad or 0), _padded(found.special_tokens_mask, 1)
        mask = _padded([[1] * len(row) for row in found.input_ids], 0)
        batch = {"input_ids": ids, "attention_mask": mask, "scored": special == 0}
        if "token_type_ids" in found and "token_type_ids" in signature(model.forward).parameters:
            batch["token_type_ids"] = _padded(found.token_type_ids, 0)
        if head == "masked":
            batch["scored"] = _some(batch["scored"], generator)
            batch["answers"] = ids[batch["scored"]]
            batch["input_ids"] = ids.masked_fill(batch["scored"], tokenizer.mask_token_id)
        yield batch


def _padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def _some(scored: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A tenth of each row's positions, at least one and at most MASKED."""
    order = torch.rand(scored.shape, generator=generator).masked_fill(~scored, 2).argsort(1).argsort(1)
    wanted = (scored.sum(1, keepdim=True) // 10).clamp(1, MASKED)
    return scored & (order < wanted)


def _positions(model: Any) -> int:
    """How many tokens its table of positions has room for; the rows up to its padding are not used."""
    tables = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
    ]
    said = getattr(model.config, "max_position_embeddings", None) or 2**30
    return min([*tables, said if said > 0 else 2**30])  # -1: XLNet's way to say that there is no end


def _log_probabilities(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """`(n, classes)` -> the same; or, where each class is a question of its own, `(n classes, 2)`."""
    if logits.shape[-1] > 1 and config.problem_type != "multi_label_classification":
        return logits.log_softmax(-1)
    return torch.stack([logsigmoid(-logits), logsigmoid(logits)], -1).flatten(0, 1)


def _distributed(p: torch.Tensor, q: torch.Tensor) -> dict[str, float]:
    kl = mean((p.double().exp() * (p.double() - q.double())).sum(1))
    agree = float((p.argmax(1) == q.argmax(1)).double().mean())
    return {"KL mean": kl.value, "+-": kl.error, "agree %": 100 * agree}


def similar(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    """Embeddings of length 1: each one's cosine to the reference's, and the order of all pairs."""
    cosine = (a.double() * b.double()).sum(1)
    found = {"cosine": float(cosine.mean()), "lowest": float(cosine.min())}
    if len(a) > 2:
        i, j = torch.triu_indices(len(a), len(a), 1)
        found["rank corr."] = spearman((a @ a.T)[i, j], (b @ b.T)[i, j])
    return found


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """The correlation of ranks; equal values share their mean rank."""
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: torch.Tensor) -> torch.Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]


def class_ids(config: Any, examples: Examples) -> torch.Tensor:
    """Labels, names or numbers, as the model's classes; CalibrationError lists those that it has not."""
    if config.num_labels < 2 or config.problem_type == "multi_label_classification":
        raise CalibrationError(f"{examples.source}: labels need a model of classes that exclude each other")
    known = {str(name): number for name, number in config.label2id.items()}
    known |= {str(number): number for number in range(config.num_labels)}
    wrong = sorted({str(label) for label in examples.labels if str(label) not in known})
    faults = [f"label {label!r} is none of {', '.join(known)}" for label in wrong]
    raise_all(CalibrationError, examples.source, faults)
    return torch.tensor([known[str(label)] for label in examples.labels])


def _right(rows: torch.Tensor, targets: torch.Tensor, head: str) -> dict[str, float]:
    """Accuracy; of a classifier also F1, the mean of the classes that occur."""
    chosen = rows.argmax(1)
    found = {"accuracy %": 100 * float((chosen == targets).double().mean())}
    if head == "sequence":
        found["F1 %"] = 100 * macro_f1(chosen, targets)
    return found


def macro_f1(chosen: torch.Tensor, targets: torch.Tensor) -> float:
    """The mean F1 of the classes that were chosen or were right."""
    each = []
    for label in torch.cat([chosen, targets]).unique():
        both = int(((chosen == label) & (targets == label)).sum())
        each.append(2 * both / int((chosen == label).sum() + (targets == label).sum()))
    return sum(each) / len(each)
