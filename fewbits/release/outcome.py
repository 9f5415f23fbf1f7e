"""Outcome: what an engine made of an output, as data and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

NEW = 8  # greedy tokens
KL, COSINE = "KL divergence", "1 - cosine"


@dataclass(frozen=True)
class Outcome:
    """An engine's result on an output. verdict: "same", "differs", "failed", "not checked", or "read" and
    "refused" of one that only reads the config; reason: of a verdict, or a note on how the file was loaded.
    largest: difference of two logits, kl: mean of the positions, nats; of embeddings, of two numbers, and
    mean 1 - cosine, as `measure` says. greedy: how many of the engine's `NEW` tokens have our largest logit,
    before the first that has not; None of a reference, and of a model that generates no text.

    reference: the Outcome of the model that it was made of, in that one's engine. loss: the KL divergence of
    the output, decoded, to that engine's logits."""

    engine: str
    verdict: str
    version: str | None = None
    largest: float | None = None
    kl: float | None = None
    greedy: int | None = None
    seconds: float | None = None
    reason: str | None = None
    reference: Outcome | None = None
    loss: float | None = None
    measure: str = KL

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """One line for people."""
        if self.verdict == "not checked":
            return f"not checked: {self.reason}"
        if self.verdict == "failed":
            return f"{self.engine} failed: {self.reason}"
        if self.verdict in ("read", "refused"):
            return f"{self.verdict} by {self.engine} {self.version}: {self.reason}"
        if self.kl is None:  # of another shape
            return f"{self.verdict} in {self.engine} {self.version}: {self.reason}"
        greedy = "" if self.greedy is None else f", {self.greedy} of {NEW} greedy tokens"
        of = "logit " if self.measure == KL else ""
        return (
            f"{self.verdict} in {self.engine} {self.version}: {self.measure} {self.kl:.2g}, largest {of}"
            f"difference {self.largest:.3g}{greedy}, {self.seconds:.0f} s"
            + (f"; {self.reason}" if self.reason else "")
        )

    def lines(self) -> list[str]:
        """Its line, and one about the reference, if there is one."""
        if self.reference is None:
            return [self.line()]
        loss = "" if self.loss is None else f"; the output's {self.measure} to it is {self.loss:.3g}"
        warning = "" if self.with_reference else "warning: "
        return [self.line(), f"{warning}the reference: {self.reference.line()}{loss}"]

    @property
    def with_reference(self) -> bool:
        """Whether the reference could be run, where there is one."""
        return self.reference is None or self.reference.verdict in ("same", "differs")


@dataclass(frozen=True)
class Trial:
    """What an engine made of a file. said: its last line, the new tokens and logits of the prompt."""

    outcome: Outcome
    said: Mapping[str, Any] = field(default_factory=dict)


def wrong_token(ours: torch.Tensor, new: Sequence[int], largest: float) -> tuple[int, str | None]:
    """How many of the new tokens have our largest logit, before the first that has not; and why one is wrong.

    ours: `(NEW or more, vocabulary)`, row i the logits from which token i is chosen. Two logits that are each
    off by `largest` at most change places if they are no more than twice that apart: a near tie.
    """
    gaps = [float(row.max() - row[token]) for row, token in zip(ours, new, strict=False)]
    greedy = next((i for i, gap in enumerate(gaps) if gap > 0), len(gaps))
    for i, gap in enumerate(gaps):
        if gap > 2 * largest:
            return greedy, (
                f"it continues with token {new[i]} instead of {int(ours[i].argmax())} in place "
                f"{i + 1}, whose logit is lower by {gap:.3g}, and no logit of the prompt is off by more than "
                f"{largest:.3g}"
            )
    return greedy, None
