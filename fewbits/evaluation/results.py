"""What an evaluation is asked for, and its figures: a table for people, JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..devices import AUTO
from ..errors import PlanError
from ..table import Cell, size, table
from .generation import Continuation
from .scores import Fidelity, Measured
from .simulated import Simulated, Simulation


@dataclass(frozen=True)
class Settings:
    """How to score and what to generate.

    context: tokens in a window. score_from: first position whose prediction counts (default
    context // 2). prompts: how many windows' first `prompt_tokens` are continued by `new_tokens`
    (0: none). scratch: folder for the reference's log-probabilities, f32, windows x scored x vocabulary, or
    for hidden states. simulation: quantized activations and cache, of the quantized models only. memory:
    bytes that this process may take (default: what is free); models that do not fit run block by block.
    engine: the quantized models run in it, as it computes them (default: decoded, in our own forward pass).
    device: where the models run, in f32: "cpu", "cuda", or "auto", a GPU where there is one with room.
    """

    context: int = 512
    score_from: int | None = None
    max_windows: int | None = None
    prompts: int = 4
    prompt_tokens: int = 24
    new_tokens: int = 48
    scratch: Path | None = None
    simulation: Simulation = field(default_factory=Simulation)
    memory: int | None = None
    engine: str | None = None
    device: str = AUTO

    def __post_init__(self) -> None:
        if self.engine is not None and self.simulation != Simulation():
            raise PlanError(
                f"--engine {self.engine} computes activations and cache in its own way; --activations and "
                "--kv-cache are simulated in our own forward pass: give the one or the others"
            )

    @property
    def first(self) -> int:
        return self.context // 2 if self.score_from is None else self.score_from

    @property
    def scored(self) -> int:
        """Tokens scored in one window: those at first + 1 ... context - 1."""
        return self.context - 1 - self.first


@dataclass(frozen=True)
class ModelScores:
    """One model's figures. seconds: forward passes over the windows only. A reference has no fidelity. ran:
    how, in words. block_errors: |h' - h| / |h| of the hidden states after each block, where the models ran
    side by side.
    """

    name: str
    nbytes: int
    bits_per_weight: float
    perplexity: Measured
    seconds: float
    tokens_per_second: float
    fidelity: Fidelity | None = None
    continuations: tuple[Continuation, ...] = ()
    simulated: Simulated | None = None
    ran: str = ""
    block_errors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Evaluation:
    """The figures of a reference and its quantized models, and what they were measured on. not_generated: why
    there are no greedy continuations, though some were asked for."""

    source: str
    windows: int
    context: int
    score_from: int
    tokens_scored: int
    reference: ModelScores
    quantized_models: tuple[ModelScores, ...]
    not_generated: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def samples(self) -> str:
        """The greedy continuations of each prompt, reference and quantized models one below the other."""
        parts = []
        for i, said in enumerate(self.reference.continuations):
            parts.append(f"prompt: {said.prompt!r}\n  {self.reference.name}: {said.reference!r}")
            parts += [
                f"  {quantized.name}: {quantized.continuations[i].quantized!r}"
                for quantized in self.quantized_models
            ]
        return "\n".join(parts)

    def table(self) -> str:
        """One line a model, the reference first, and a line that says what was scored."""
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
        lines = [_line(model) for model in (self.reference, *self.quantized_models)]
        scored = f"{self.windows} windows of {self.context}, scored from position {self.score_from}"
        notes = [
            f"\n{quantized.name} ran with {quantized.simulated}."
            for quantized in self.quantized_models
            if quantized.simulated
        ]
        notes += [
            f"\n{quantized.name}: hidden states off by {quantized.block_errors[-1]:.3g} after the last block,"
            f" most at block {max(enumerate(quantized.block_errors), key=lambda each: each[1])[0]}."
            for quantized in self.quantized_models
            if quantized.block_errors
        ]
        notes += [
            f"\n{quantized.name} ran {quantized.ran}."
            for quantized in self.quantized_models
            if quantized.ran.startswith("in ")
        ]
        notes += [f"\n{self.not_generated}"] if self.not_generated else []
        text = f"{self.tokens_scored} tokens scored ({scored}). Text: {self.source}."
        return f"{table(head, lines)}\n{text}{''.join(notes)}"


def _line(model: ModelScores) -> list[Cell]:
    start: list[Cell] = [model.name, size(model.nbytes), model.bits_per_weight]
    new = model.continuations
    if model.fidelity is None:
        loops = sum(c.reference_loop is not None for c in new)
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
        sum(c.quantized_loop is not None for c in new),
    ]
