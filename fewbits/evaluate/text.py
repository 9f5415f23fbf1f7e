"""Text to evaluate on: a file's, or sampled from the parent itself where there is none to be had.

Sampling at temperature 1 draws from the parent's own distribution, so nothing has to be downloaded.
On it the parent's perplexity is low by construction: compare children with the parent and with each
other on it, not with published figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from ..adapters.hf import load_model, load_tokenizer
from ..errors import CalibrationError, ModelError
from ..files.base import Checkpoint

SEQUENCES_AT_ONCE = 16


@dataclass(frozen=True)
class Text:
    """Tokens `(t,)` int64, where they come from, and the token that heads each window, if any."""

    tokens: torch.Tensor
    source: str
    bos: int | None = None


def read_text(checkpoint: Checkpoint, text: str, source: str) -> Text:
    """A string -> Text, tokenized as the checkpoint's tokenizer does, special tokens included."""
    tokenizer = load_tokenizer(checkpoint)
    tokens = tokenizer(text).input_ids
    return Text(torch.tensor(tokens, dtype=torch.int64), source, bos_of(tokenizer))


def bos_of(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text, None if it puts none."""
    bos, empty = tokenizer.bos_token_id, tokenizer("").input_ids
    return bos if bos is not None and bos in empty[:1] else None


def self_text(
    checkpoint: Checkpoint,
    n_tokens: int,
    seed: int = 0,
    context: int = 512,
    progress: Callable[[str, int, int], None] | None = None,
) -> Text:
    """Sample at least `n_tokens` tokens from the model at temperature 1 -> Text.

    Sequences of `context` tokens lie one after the other, so that each is one window. Each begins
    with one token drawn uniformly from the vocabulary: begun with BOS, a chat model would write the
    same template every time. The same seed gives the same text on the same machine.
    """
    if n_tokens < 1 or context < 2:
        raise CalibrationError(
            f"cannot sample {n_tokens} tokens in windows of {context}; ask for 1 and 2 at least"
        )
    model = load_model(checkpoint, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    n = ceil(n_tokens / context)
    batches = []
    for start in range(0, n, SEQUENCES_AT_ONCE):
        rows = min(SEQUENCES_AT_ONCE, n - start)

        def step(done: int, total: int, start: int = start, rows: int = rows) -> None:
            if progress:
                progress("sampling text", start * total + rows * done, n * total)

        batches.append(_sample(model, rows, context, generator, step))
    tokens = torch.cat(batches).flatten()
    return Text(tokens, f"{len(tokens)} tokens sampled from the parent itself (temperature 1, seed {seed})")


def _sample(
    model: Any, rows: int, length: int, generator: torch.Generator, step: Callable[[int, int], None]
) -> torch.Tensor:
    """-> `(rows, length)` int64."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (rows, 1), generator=generator)
    tokens, cache = [ids], None
    with torch.inference_mode():
        for i in range(1, length):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            if not bool(logits.isfinite().all()):
                raise ModelError(f"the model's output is not finite at token {i}; its weights are damaged")
            ids = _draw(logits.softmax(-1), generator)
            tokens.append(ids)
            step(i + 1, length)
    return torch.cat(tokens, 1)


def _draw(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`(b, vocab)` probabilities -> `(b, 1)` tokens, by the inverse of the cumulative distribution.

    torch.multinomial draws a random number for each word of the vocabulary; this draws one a row.
    """
    cumulative = p.cumsum(-1)
    at = torch.rand(len(p), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).clamp_max(p.shape[-1] - 1)
