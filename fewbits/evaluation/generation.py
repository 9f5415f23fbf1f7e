"""Greedy continuations: where a quantized model leaves its reference's path, and whether it runs in a loop.

Mean divergences hide what a reader sees first: a model that repeats itself. So reference and quantized model
continue the same prompts greedily; the first position at which they differ, and a loop at the end
(a period of at most 16 tokens, at least 3 times in a row) are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters.forward import next_logits

LONGEST_PERIOD = 16
REPEATS = 3


@dataclass(frozen=True)
class Continuation:
    """What both models wrote after one prompt. diverges_at counts new tokens; None: never."""

    prompt: str
    reference: str
    quantized: str
    diverges_at: int | None
    reference_loop: int | None
    quantized_loop: int | None


def greedy(
    model: Any,
    prompts: torch.Tensor,
    new_tokens: int,
    stop: frozenset[int] = frozenset(),
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Prompts `(b, t)` int64 -> for each the new tokens, ending with the first of `stop` if one comes."""
    tokens: list[torch.Tensor] = []
    with torch.inference_mode():
        ids, cache = prompts, None
        for i in range(new_tokens):
            logits, cache = next_logits(model, ids, cache)
            ids = logits.argmax(-1, keepdim=True)
            tokens.append(ids)
            if progress:
                progress(i + 1, new_tokens)
    written = torch.cat(tokens, 1).tolist() if tokens else [[] for _ in prompts]
    return [_until(line, stop) for line in written]


def first_divergence(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index at which two token lists differ (one ending counts as differing); None if equal."""
    if list(a) == list(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def repetition_loop(
    tokens: Sequence[int], longest: int = LONGEST_PERIOD, repeats: int = REPEATS
) -> int | None:
    """The shortest period, of at most `longest`, with which the list ends `repeats` times; None if none."""
    tokens = list(tokens)
    for period in range(1, min(longest, len(tokens) // repeats) + 1):
        if tokens[-period * repeats :] == tokens[-period:] * repeats:
            return period
    return None


def continuation(
    prompt: Sequence[int],
    reference: Sequence[int],
    quantized: Sequence[int],
    decode: Callable[[list[int]], str],
) -> Continuation:
    return Continuation(
        prompt=decode(list(prompt)),
        reference=decode(list(reference)),
        quantized=decode(list(quantized)),
        diverges_at=first_divergence(reference, quantized),
        reference_loop=repetition_loop(reference),
        quantized_loop=repetition_loop(quantized),
    )


def _until(tokens: list[int], stop: frozenset[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens
