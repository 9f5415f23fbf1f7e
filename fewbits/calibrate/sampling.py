"""Text that the model writes itself: calibration without a data set (LLM-QAT, arXiv 2305.17888).

    head: random ordinary tokens                      the next document, in the same row
    [bos] tok tok   drawn drawn drawn ... drawn eos   [bos] tok tok   drawn drawn ...
                    at the row's temperature      ^ ended by the model, or cut where it loops

A batch of rows is written side by side, one token of each a step, with a key-value cache. A row whose
document ends goes on with another, so no row idles. A document loops when an n-gram comes for the
third time. A row that shares too many n-grams with those written before is dropped and another
written. The same seed gives the same text on the same machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.transformers import load_model, next_logits
from ..errors import CalibrationError, ModelError
from ..files.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Step = Callable[[int, int], None]

TEMPERATURES = (0.7, 1.0, 1.3)
HEAD_TOKENS = 2
ROW = 128  # tokens; on the demo model as good as 256, and a third cheaper: fewer, fuller steps
ROWS_AT_ONCE = 128
CACHE_BYTES = 2 * 2**30  # of keys and values, at most
POOL = 4096  # tokens of the vocabulary from which heads are drawn
NGRAM = 8
LOOP = 3  # times that an n-gram comes in one document
SHARED = 0.25  # share of a row's n-grams that earlier rows may have


def sample(
    model: Any,
    heads: torch.Tensor,
    length: int,
    generator: torch.Generator,
    temperature: float | torch.Tensor = 1.0,
    steer: Callable[[torch.Tensor], torch.Tensor] | None = None,
    step: Step | None = None,
) -> torch.Tensor:
    """`(b, h)` int64 -> `(b, length)`: every row continued by draws from the model's distribution.

    temperature: of all rows, or `(b, 1)`. steer: what was drawn, `(b, 1)` -> what shall stand there.
    Raises ModelError where the model's output is not finite.
    """
    tokens, ids, cache = [heads], heads, None
    with torch.inference_mode():
        for i in range(heads.shape[1], length):
            logits, cache = next_logits(model, ids, cache)
            if not bool(logits.isfinite().all()):
                raise ModelError(f"the model's output is not finite at token {i}; its weights are damaged")
            ids = draw((logits.float() / temperature).softmax(-1), generator)
            ids = steer(ids) if steer else ids
            tokens.append(ids)
            if step:
                step(i + 1, length)
    return torch.cat(tokens, 1)


def draw(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`(b, vocab)` probabilities -> `(b, 1)` tokens, by the inverse of the cumulative distribution.

    torch.multinomial draws a random number for each word of the vocabulary; this draws one a row.
    """
    cumulative = p.cumsum(-1)
    at = torch.rand(len(p), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).clamp_max(p.shape[-1] - 1)


@dataclass(frozen=True)
class Heads:
    """How a document begins: bos where the tokenizer puts one, then tokens drawn from `pool`.

    between: what parts two documents where the first has not ended by itself and no bos follows.
    """

    pool: list[int]
    bos: list[int]
    between: list[int]
    generator: torch.Generator

    def new(self) -> list[int]:
        at = torch.randint(len(self.pool), (HEAD_TOKENS,), generator=self.generator).tolist()
        return [*self.bos, *(self.pool[i] for i in at)]


class Documents:
    """The rows being written: what was drawn goes in, what shall stand there comes out."""

    def __init__(self, starts: list[list[int]], heads: Heads, ends: frozenset[int], known: int) -> None:
        self.heads, self.ends, self.known = heads, ends, known
        self.written = [list(start) for start in starts]  # of the document that each row is in
        self.coming: list[list[int]] = [[] for _ in starts]
        self.ngrams: list[Counter[tuple[int, ...]]] = [Counter() for _ in starts]
        self.loops = 0

    def __call__(self, drawn: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[self._next(row, token)] for row, token in enumerate(drawn.flatten().tolist())])

    def _next(self, row: int, token: int) -> int:
        if not self.coming[row] and token >= self.known:  # a row of the embedding that no text has
            self._end(row, [*self.heads.between, *self.heads.new()])
        if self.coming[row]:
            token = self.coming[row].pop(0)
            self.written[row].append(token)
            return token
        self.written[row].append(token)
        ngram = tuple(self.written[row][-NGRAM:])
        self.ngrams[row][ngram] += len(ngram) == NGRAM
        if token in self.ends:
            self._end(row, self.heads.new())
        elif self.ngrams[row][ngram] == LOOP:
            self.loops += 1
            self._end(row, [*self.heads.between, *self.heads.new()])
        return token

    def _end(self, row: int, coming: list[int]) -> None:
        self.coming[row] = coming
        self.written[row].clear()
        self.ngrams[row].clear()


def write_rows(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    bos: int | None,
    n_tokens: int,
    length: int,
    seed: int = 0,
    step: Step | None = None,
) -> tuple[list[list[int]], list[str]]:
    """-> rows of `length` tokens written by the model, `n_tokens` in all where it can; and notes.

    Fewer where the model writes the same again and again: as many rows as asked for were dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = _heads(checkpoint, tokenizer, bos, generator)
    model = load_model(checkpoint, compute_dtype(checkpoint))
    wanted, at_once = ceil(n_tokens / length), rows_at_once(model, length)
    rows: list[list[int]] = []
    seen: set[tuple[int, ...]] = set()
    dropped = loops = 0
    while len(rows) < wanted and dropped < max(wanted, at_once):
        starts = [[*heads.between, *heads.new()] for _ in range(min(at_once, wanted - len(rows)))]
        documents = Documents(starts, heads, ends_of(checkpoint, tokenizer), len(tokenizer))
        heat = torch.tensor([TEMPERATURES[(len(rows) + i) % len(TEMPERATURES)] for i in range(len(starts))])

        def told(done: int, _: int, before: int = len(rows), now: int = len(starts)) -> None:
            if step:
                step(before * length + now * done, wanted * length)

        written = sample(model, torch.tensor(starts), length, generator, heat[:, None], documents, told)
        for row in written.tolist():
            ngrams = {tuple(row[i : i + NGRAM]) for i in range(len(row) - NGRAM + 1)}
            if len(ngrams & seen) > SHARED * len(ngrams):
                dropped += 1
                continue
            seen |= ngrams
            rows.append(row)
        loops += documents.loops
    notes = [f"{loops} documents cut where the model began to loop"] if loops else []
    if dropped:
        notes.append(f"{dropped} rows of {length} tokens dropped as duplicates and written anew")
    return rows, notes


def _heads(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, bos: int | None, generator: torch.Generator
) -> Heads:
    """Ordinary tokens: found again when their own text is read; not special, not half a letter."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    drawn = torch.randperm(len(tokenizer), generator=generator)[:POOL].tolist()
    drawn = [token for token in drawn if token not in special]
    texts = tokenizer.batch_decode([[token] for token in drawn])
    read = tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    rows = zip(drawn, texts, read, strict=True)
    pool = [token for token, text, back in rows if token in back and "\ufffd" not in text]
    if not pool:
        raise CalibrationError(
            f"{checkpoint.path}: none of {len(drawn)} tokens is found again when its text is read, so the "
            "model cannot be given a start; give a text file"
        )
    eos = tokenizer.eos_token_id
    return Heads(
        pool, [] if bos is None else [bos], [] if bos is not None or eos is None else [eos], generator
    )


def ends_of(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens with which the model ends a text."""
    eos = checkpoint.config.get("text_config", checkpoint.config).get("eos_token_id")
    found = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    return frozenset(token for token in found if token is not None)


def compute_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """bf16 where the processor has tiles for it, or f32 weights would need over 8 GiB; f32 is faster else."""
    nbytes = 4 * sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    tiles = torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.bfloat16 if tiles or nbytes > 8 * 2**30 else torch.float32


def rows_at_once(model: Any, length: int) -> int:
    """So many that their keys and values stay below CACHE_BYTES; at least one."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * length
    return max(1, min(ROWS_AT_ONCE, CACHE_BYTES // row))
