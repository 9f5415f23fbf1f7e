"""Text that the model writes itself: calibration without a data set (LLM-QAT, arXiv 2305.17888).

    head: random ordinary tokens                      the next document, in the same row
    [bos] tok tok   drawn drawn drawn ... drawn eos   [bos] tok tok   drawn drawn ...
                    at the row's temperature      ^ ended by the model, or cut where it loops

Rows are written side by side, one token of each a step, with a key-value cache. A row whose
document ends goes on with another, so no row idles. A document loops when an n-gram comes for the
third time. A row that shares too many n-grams with those written before is dropped and another
written. The same seed gives the same text on the same machine.

The model writes in f32 or bf16, whichever the machine multiplies faster. Where it does not fit the free
memory, a copy in Q8_0 writes in its place, or one in Q4_0, made weight by weight from the mapped file.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, prod
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from ..adapters.transformers import load_model, model_config
from ..devices import Room
from ..errors import CalibrationError
from ..files.checkpoint import Checkpoint, LazyTensor
from ..formats.base import FORMATS
from ..model.sites import sites
from ..qtensor import QTensor
from ..runtime.decode import Decoder, faster_dtype
from ..runtime.load import load_packed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Step = Callable[[int, int], None]

TEMPERATURES = (0.7, 1.0, 1.3)
HEAD_TOKENS = 2
ROW = 128  # tokens; on the demo model as good as 256, and a third cheaper: fewer, fuller steps
ROWS_AT_ONCE = 256  # beyond, products grow no faster
CACHE_BYTES, LEAST_CACHE = 2 * 2**30, 2**28  # of keys and values, at most: where there is memory, and not
POOL = 4096  # tokens of the vocabulary from which heads are drawn
NGRAM = 8
LOOP = 3  # times that an n-gram comes in one document
SHARED = 0.25  # share of a row's n-grams that earlier rows may have
COPIES = ("q8_0", "q4_0")  # what writes where the model itself does not fit, best first
WORKING = 2**30  # bytes beside weights, keys and values: logits, activations, torch itself
BLOCK = 256  # words of the vocabulary that a draw passes over at once
DRAWN_AT_ONCE = 16  # rows: their probabilities stay in the processor's cache


def sample(
    decoder: Decoder,
    heads: torch.Tensor,
    length: int,
    generator: torch.Generator,
    temperature: float | torch.Tensor = 1.0,
    steer: Callable[[torch.Tensor], torch.Tensor] | None = None,
    step: Step | None = None,
) -> torch.Tensor:
    """`(b, h)` int64 -> `(b, length)`: every row continued by draws from the model's distribution.

    temperature: of all rows, or `(b, 1)`. steer: what was drawn, `(b, 1)` -> what shall stand there.
    Raises CalibrationError where the model's output is not finite.
    """
    tokens, ids = [heads], heads
    sharpness = 1 / torch.as_tensor(temperature).expand(len(heads), 1).to(decoder.device)
    decoder.restart()
    with torch.inference_mode():
        for i in range(heads.shape[1], length):
            drawn = draw(decoder(ids), generator, sharpness)
            if drawn is None:
                raise CalibrationError(f"the model's output is not finite at token {i}")
            ids = steer(drawn) if steer else drawn.cpu()
            tokens.append(ids)
            if step:
                step(i + 1, length)
    return torch.cat(tokens, 1)


def draw(
    logits: torch.Tensor, generator: torch.Generator, sharpness: torch.Tensor | None = None
) -> torch.Tensor | None:
    """`(b, vocab)` logits -> `(b, 1)` tokens, by the inverse of the cumulative distribution; None where the
    logits of a row are no distribution (NaN, infinite).

    sharpness: `(b, 1)`, what logits are multiplied by. Sums over blocks of the vocabulary first: the
    cumulative distribution is made of one block alone.
    """
    uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    drawn, rest = [], -logits.shape[1] % BLOCK
    for start in range(0, len(logits), DRAWN_AT_ONCE):
        rows = slice(start, start + DRAWN_AT_ONCE)
        scaled = logits[rows].float() if sharpness is None else logits[rows] * sharpness[rows]
        p = scaled.float().softmax(-1)
        blocks = (pad(p, (0, rest)) if rest else p).unflatten(1, (-1, BLOCK))
        cumulative = blocks.sum(-1).cumsum(-1)
        if not bool(cumulative[:, -1].isfinite().all()):
            return None
        at = uniform[rows] * cumulative[:, -1:]
        block = torch.searchsorted(cumulative, at, right=True).clamp_max(blocks.shape[1] - 1)
        before = pad(cumulative, (1, 0)).gather(1, block)
        inside = blocks[torch.arange(len(block), device=block.device), block[:, 0]].cumsum(-1)
        # Rounding may put the point past the block's own sum: never onto a word that cannot come.
        at = torch.minimum(at - before, inside[:, -1:].nextafter(inside.new_zeros(())))
        drawn.append(block * BLOCK + torch.searchsorted(inside, at, right=True))
    return torch.cat(drawn)


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


@dataclass(frozen=True)
class Writer:
    """kind: the model in "f32" or "bf16", or a copy in one of COPIES. cache: bytes for keys and values.
    nbytes: in all. device: where it writes."""

    kind: str
    cache: int
    nbytes: int
    device: str = "cpu"


@dataclass(frozen=True)
class Writing:
    """What text is wanted: `n_tokens` in all, in rows of `length`; and what writes it."""

    n_tokens: int
    length: int
    writer: Writer
    seed: int = 0


def write_rows(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    bos: int | None,
    writing: Writing,
    step: Step | None = None,
) -> tuple[list[list[int]], list[str]]:
    """-> rows of `length` tokens written by the model, `n_tokens` in all where it can; and notes.

    Fewer where the model writes the same again and again: as many rows as asked for were dropped.
    Raises CalibrationError that names the tensor at fault where the model's output is not finite.
    """
    length, generator = writing.length, torch.Generator().manual_seed(writing.seed)
    heads = _heads(checkpoint, tokenizer, bos, generator)
    model, notes = load_writer(checkpoint, writing.writer)
    wanted, at_once = ceil(writing.n_tokens / length), rows_at_once(model, length, writing.writer.cache)
    decoder = Decoder(model, length)
    rows: list[list[int]] = []
    seen: set[tuple[int, ...]] = set()
    dropped = loops = 0
    while len(rows) < wanted and dropped < max(wanted, at_once):
        starts = [[*heads.between, *heads.new()] for _ in range(min(at_once, wanted - len(rows)))]
        documents = Documents(starts, heads, ends_of(checkpoint, tokenizer), len(tokenizer))
        heat = torch.tensor([TEMPERATURES[(len(rows) + i) % len(TEMPERATURES)] for i in range(len(starts))])

        def report(done: int, _: int, before: int = len(rows), now: int = len(starts)) -> None:
            if step:
                step(before * length + now * done, wanted * length)

        try:
            written = sample(
                decoder, torch.tensor(starts), length, generator, heat[:, None], documents, report
            )
        except CalibrationError as error:
            raise CalibrationError(f"{checkpoint.path}: {error}: {damage_of(checkpoint)}") from error
        for row in written.tolist():
            ngrams = {tuple(row[i : i + NGRAM]) for i in range(len(row) - NGRAM + 1)}
            if len(ngrams & seen) > SHARED * len(ngrams):
                dropped += 1
                continue
            seen |= ngrams
            rows.append(row)
        loops += documents.loops
    if loops:
        notes.append(f"{loops} documents cut where the model began to loop")
    if dropped:
        notes.append(f"{dropped} rows of {length} tokens dropped as duplicates and written anew")
    return rows, notes


def _heads(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, bos: int | None, generator: torch.Generator
) -> Heads:
    eos = tokenizer.eos_token_id
    between = [] if bos is not None or eos is None else [eos]
    pool = ordinary_tokens(checkpoint, tokenizer, generator)
    return Heads(pool, [] if bos is None else [bos], between, generator)


def ordinary_tokens(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
) -> list[int]:
    """Some tokens that are found again when their own text is read; not special, not half a letter."""
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
    return pool


def ends_of(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens with which the model ends a text."""
    eos = checkpoint.text_config.get("eos_token_id")
    ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    return frozenset(token for token in ids if token is not None)


def writer_of(checkpoint: Checkpoint, room: Room | None = None) -> Writer:
    """What writes in the memory that there is: the model in the faster float type, or a copy.

    Raises CalibrationError where not even the smallest copy fits.
    """
    most = ROWS_AT_ONCE * _row_nbytes(model_config(checkpoint).get_text_config(), 4, ROW)
    for device, memory in (room or Room()).places():
        on_cpu = device.type == "cpu"
        kinds = ("f32" if on_cpu and faster_dtype() == torch.float32 else "bf16", "bf16", *COPIES)
        writers = []
        for kind in dict.fromkeys(kinds):
            weights, loading = weight_nbytes(checkpoint, kind)
            for cache in (min(most, CACHE_BYTES), min(most, LEAST_CACHE)):
                nbytes = weights + max(loading, cache + WORKING)
                writers.append(Writer(kind, cache, nbytes, str(device)))
        for writer in writers:
            if writer.nbytes <= memory:
                return writer
    least = min(writer.nbytes for writer in writers)
    where = "" if on_cpu else f" on {device}"
    raise CalibrationError(
        f"{checkpoint.path}: to write its own text the model needs {least / 2**30:.2f} GiB of memory{where}, "
        f"{memory / 2**30:.2f} GiB are free; give a text file (--calibrate FILE), with which it is run block "
        "by block"
    )


def weight_nbytes(checkpoint: Checkpoint, kind: str) -> tuple[int, int]:
    """Bytes that a writer's weights take, and that loading the largest of them takes besides."""
    counts = {name: prod(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    every, besides = sum(counts.values()), 4 * max(counts.values(), default=0)
    if kind not in COPIES:
        return every * (4 if kind == "f32" else 2), besides
    packed = sum(_copied(checkpoint).values())
    return int(2 * (every - packed) + packed * float(FORMATS.get(kind).bits_per_weight()) / 8), besides


def load_writer(checkpoint: Checkpoint, writer: Writer) -> tuple[Any, list[str]]:
    """-> the transformers model that writes, and what to say of it."""
    kind = writer.kind
    if kind not in COPIES:
        model: Any = load_model(checkpoint, torch.float32 if kind == "f32" else torch.bfloat16)
        return model.to(writer.device), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are held as floats")  # experts stay floats, as meant
        model = load_packed(quantized_copy(checkpoint, kind), torch.bfloat16)
    note = f"text written by a copy of the model in {kind}: in floats it does not fit the memory"
    return model.to(writer.device), [note]


def quantized_copy(checkpoint: Checkpoint, kind: str) -> Checkpoint:
    """The same checkpoint with linear maps and embeddings rounded to `kind` when they are loaded."""

    def load(tensor: LazyTensor) -> QTensor:
        return FORMATS.get(kind).encode(tensor.load(), search=False)  # type: ignore[arg-type]

    tensors = dict(checkpoint.tensors)
    for name in _copied(checkpoint):
        tensor = tensors[name]
        tensors[name] = replace(tensor, kind=FORMATS.get(kind), load=partial(load, tensor))
    return replace(checkpoint, tensors=tensors)


def _copied(checkpoint: Checkpoint) -> dict[str, int]:
    """The weights that a copy rounds -> how many numbers each has. Routers stay floats, and so do
    experts, which transformers fuses, and what is quantized already."""
    tensors = checkpoint.tensors
    return {
        site.name: prod(site.shape)
        for site in sites(checkpoint)
        if site.role not in ("router", "position") and site.expert is None
        and not tensors[site.name].quantized and site.shape[1] % 32 == 0
    }  # fmt: skip


def damage_of(checkpoint: Checkpoint) -> str:
    """The first tensor with a value that is not finite, in words."""
    for name, tensor in checkpoint.tensors.items():
        value = tensor.load()
        value = value.decode() if isinstance(value, QTensor) else value
        bad = int((~value.isfinite()).sum())
        if bad:
            return f"{bad} of {value.numel()} values of {name!r} are not finite; fetch the model again"
    return "its weights are finite, so numbers grew too large on the way; is the config the model's own?"


def rows_at_once(model: Any, length: int, cache: int) -> int:
    """So many that their keys and values stay below `cache` bytes; at least one."""
    row = _row_nbytes(model.config.get_text_config(), model.dtype.itemsize, length)
    return max(1, min(ROWS_AT_ONCE, cache // row))


def _row_nbytes(config: Any, itemsize: int, length: int) -> int:
    """Bytes of the keys and values of `length` tokens."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * itemsize * length
