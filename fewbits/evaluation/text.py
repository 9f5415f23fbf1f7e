"""Text to evaluate on: a file's, or sampled from the reference itself where there is none to be had.

Sampling at temperature 1 draws from the reference's own distribution, so nothing has to be downloaded.
On it the reference's perplexity is low by construction: compare quantized models with the reference and with
each other on it, not with published figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch

from ..adapters.transformers import load_tokenizer
from ..calibrate.sampling import damage_of, load_writer, rows_at_once, sample, writer_of
from ..calibrate.tokens import bos_of
from ..devices import Room
from ..errors import CalibrationError
from ..files.checkpoint import Checkpoint
from ..runtime.decode import Decoder


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


def blank_text(n_tokens: int, context: int = 512) -> Text:
    """What stands for `self_text` of the same length before that is written. Errors: those of `self_text`."""
    if n_tokens < 1 or context < 2:
        raise CalibrationError(
            f"cannot sample {n_tokens} tokens in windows of {context}; ask for 1 and 2 at least"
        )
    return Text(torch.zeros(ceil(n_tokens / context) * context, dtype=torch.int64), "not written yet")


def self_text(
    checkpoint: Checkpoint,
    n_tokens: int,
    seed: int = 0,
    context: int = 512,
    progress: Callable[[str, int, int], None] | None = None,
    room: Room | None = None,
) -> Text:
    """Sample at least `n_tokens` tokens from the model at temperature 1 -> Text. room: device and memory for
    sampling (default: the CPU, what is free).

    Sequences of `context` tokens lie one after the other, so that each is one window. Each begins
    with one token drawn uniformly from the vocabulary: begun with BOS, a chat model would write the
    same template every time. The same seed gives the same text on the same machine.
    """
    n = len(blank_text(n_tokens, context).tokens) // context
    writer = writer_of(checkpoint, room)
    model, notes = load_writer(checkpoint, writer)
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    at_once = rows_at_once(model, context, writer.cache)
    decoder, batches = Decoder(model, context), []
    for start in range(0, n, at_once):
        rows = min(at_once, n - start)

        def step(done: int, total: int, start: int = start, rows: int = rows) -> None:
            if progress:
                progress("sampling text", start * total + rows * done, n * total)

        heads = torch.randint(vocabulary, (rows, 1), generator=generator)
        try:
            batches.append(sample(decoder, heads, context, generator, step=step))
        except CalibrationError as error:
            raise CalibrationError(f"{checkpoint.path}: {error}: {damage_of(checkpoint)}") from error
    tokens = torch.cat(batches).flatten()
    source = f"{len(tokens)} tokens sampled from the reference itself (temperature 1, seed {seed})"
    return Text(tokens, "; ".join([source, *notes]))
