"""Calibration text as windows of tokens, from a file, a data set, or the model itself.

    text file      t t t t t t t t t t t t ...              unchanged, from the start
    documents      [bos] t t t [eos] [bos] t t [eos] ...    shuffled by the seed, one after the other
    self           [bos] t t t t t t ... [bos] t t t t      see sampling.py
    vocabulary     t t t t t t t t t t t t                  drawn at random, for models that generate no text
                   |   window    |   window    |            without overlap, the rest is dropped

If the tokenizer starts every text with bos, each window starts with it, in place of its first token, as in
the model's training; an encoder's begins and ends with its own two tokens ([CLS], [SEP]). If it separates
documents by neither bos nor eos, eos is inserted. Documents are shuffled among the first `SHUFFLE` times the
needed text, so that a huge file is not read completely.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.as_loaded import as_loaded
from ..adapters.transformers import head_of, load_tokenizer
from ..devices import Room
from ..errors import CalibrationError, raise_all
from ..files.checkpoint import Checkpoint
from .documents import Document, read_characters, read_dataset, read_json_lines
from .kept import keep, read_kept, text_file
from .sampling import ROW, Writing, ordinary_tokens, write_rows, writer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]

SELF, VOCABULARY = "self", "vocabulary"  # sources that are no file
SHUFFLE = 8
CHARACTERS = 6  # a token, at most, in a first guess of how much to read
MARGIN = 64  # tokens beyond the last one needed: where a text is cut, its last tokens are not the whole's
JSON_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Tokens:
    """windows `(w, c)` int64; their source; sha256 of the tokens as int64 LE; notes."""

    windows: torch.Tensor
    source: str
    digest: str
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(windows: torch.Tensor, source: str, notes: tuple[str, ...] = ()) -> Tokens:
        raw = windows.contiguous().numpy().astype("<i8").tobytes()
        return Tokens(windows, source, hashlib.sha256(raw).hexdigest(), notes)

    @property
    def count(self) -> int:
        return self.windows.numel()


def read_tokens(
    checkpoint: Checkpoint,
    spec: str,
    n_tokens: int,
    context: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
    room: Room | None = None,
) -> Tokens:
    """Calibration text for a model -> at least `n_tokens` tokens in windows of `context`.

    room: device and memory for generating text (default: the CPU, what is free).
    spec: "self", "vocabulary", the path of a text or JSON lines file, or hf:NAME[:CONFIG][:SPLIT]. A shorter
    text gives all its whole windows and a note with both numbers. Raises CalibrationError for less
    than one window, and FileError for a file that cannot be read.
    """
    checkpoint = as_loaded(checkpoint)
    _check(checkpoint, spec, n_tokens, context)
    wanted = ceil(n_tokens / context)
    needed = wanted * context
    tokenizer = load_tokenizer(checkpoint)
    bos = bos_of(tokenizer)
    if spec == SELF:
        writing = Writing(needed, min(context, ROW), writer_of(checkpoint, room), seed)
        stream, source, notes = _from_self(checkpoint, tokenizer, writing, progress)
    elif spec == VOCABULARY:
        stream, source, notes = _from_vocabulary(checkpoint, tokenizer, needed, seed)
    elif spec.startswith("hf:"):
        stream, notes = _from_documents(tokenizer, read_dataset(spec), needed, seed, progress)
        source = f"{spec} (seed {seed})"
    elif Path(spec).suffix in JSON_LINES:
        stream, notes = _from_documents(tokenizer, read_json_lines(Path(spec)), needed, seed, progress)
        source = f"{spec} (seed {seed})"
    else:
        stream, source, notes = _from_text(tokenizer, Path(spec), needed), spec, []
    windows = _cut(checkpoint, stream, source, wanted, context)
    if bos is not None:
        windows[:, 0] = bos
    if frame := frame_of(tokenizer):
        windows[:, 0], windows[:, -1] = frame
    if len(windows) < wanted:
        notes.append(
            f"{source} holds {len(stream)} tokens, {needed} were requested: calibrating on "
            f"{windows.numel()} in {len(windows)} windows of {context}"
        )
    return Tokens.of(windows, source, tuple(notes))


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer adds before every text, or None."""
    bos, empty = tokenizer.bos_token_id, tokenizer("").input_ids
    return bos if bos is not None and bos in empty[:1] else None


def frame_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """The tokens that the tokenizer puts around a text for an encoder, or None."""
    empty, pair = tokenizer("").input_ids, (tokenizer.cls_token_id, tokenizer.sep_token_id)
    return pair if None not in pair and tuple(empty) == pair else None


def _check(checkpoint: Checkpoint, spec: str, n_tokens: int, context: int) -> None:
    faults = []
    if spec == SELF and (head := head_of(checkpoint)) != "causal":
        faults.append(f"the model generates no text (its head: {head}); give a text file (--calibrate FILE)")
    if n_tokens < 1:
        faults.append(f"{n_tokens} tokens requested, at least 1 is needed")
    if context < 8:
        faults.append(f"windows of {context} tokens requested, at least 8 are needed")
    longest = checkpoint.text_config.get("max_position_embeddings")
    if longest is not None and context > longest:
        faults.append(f"windows of {context} tokens requested, the model has {longest} positions")
    raise_all(CalibrationError, "calibration text", faults)


def _cut(checkpoint: Checkpoint, stream: list[int], source: str, wanted: int, context: int) -> torch.Tensor:
    """A stream of tokens -> its windows, `(w, context)`, at most `wanted`."""
    n = min(wanted, len(stream) // context)
    if n == 0:
        raise CalibrationError(
            f"{source}: {len(stream)} tokens, fewer than one window of {context} ({wanted * context} were "
            "requested); give more text, a smaller context, or `self` for text that the model generates"
        )
    windows = torch.tensor(stream[: n * context], dtype=torch.int64).view(n, context)
    vocabulary = checkpoint.text_config.get("vocab_size")
    if vocabulary is not None and int(windows.max()) >= vocabulary:
        raise CalibrationError(
            f"{source}: token {int(windows.max())} is outside the model's vocabulary of {vocabulary}; "
            "the tokenizer is another model's"
        )
    return windows


# ---- a text file ---------------------------------------------------------------------------------


def _from_text(tokenizer: PreTrainedTokenizerBase, path: Path, needed: int) -> list[int]:
    """The file's first tokens, equal to those of the whole file."""
    pieces, text, enough = read_characters(path), "", CHARACTERS * (needed + MARGIN)
    while True:
        while len(text) < enough and (piece := next(pieces, None)) is not None:
            text += piece
        tokens = tokenizer(text[:enough]).input_ids
        if len(text) < enough:  # the whole of it
            return tokens
        if len(tokens) >= needed + MARGIN:
            return tokens[:needed]
        enough *= 2


# ---- the vocabulary -------------------------------------------------------------------------------


def _from_vocabulary(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, needed: int, seed: int
) -> tuple[list[int], str, list[str]]:
    """Ordinary tokens drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.tensor(ordinary_tokens(checkpoint, tokenizer, generator))
    drawn = pool[torch.randint(len(pool), (needed,), generator=generator)]
    notes = ["calibrated on random tokens: no text was given; --calibrate FILE is better"]
    return drawn.tolist(), f"random tokens of the vocabulary (seed {seed})", notes


# ---- documents -----------------------------------------------------------------------------------


def _from_documents(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterator[Document],
    needed: int,
    seed: int,
    progress: Progress | None,
) -> tuple[list[int], list[str]]:
    """Documents, shuffled -> their tokens one after the other, and notes."""
    writer = _Writer(tokenizer)
    stream: list[int] = []
    for document in _shuffled(documents, SHUFFLE * CHARACTERS * needed, seed):
        stream += writer(document)
        if progress:
            progress("tokenizing text", min(len(stream), needed), needed)
        if len(stream) >= needed:
            break
    return stream, writer.notes()


def _shuffled(documents: Iterator[Document], characters: int, seed: int) -> Iterator[Document]:
    """Documents shuffled by the seed in groups of about `characters`."""
    order, buffer, size = random.Random(seed), [], 0
    for document in documents:
        buffer.append(document)
        size += len(document if isinstance(document, str) else repr(document))
        if size >= characters:
            order.shuffle(buffer)
            yield from buffer
            buffer, size = [], 0
    order.shuffle(buffer)
    yield from buffer


class _Writer:
    """A document -> its tokens and a separator. Records problems."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        empty = tokenizer("").input_ids
        eos = tokenizer.eos_token_id
        self.end = [] if empty or eos is None else [eos]
        self.conversations = 0
        self.fallen: list[str] = []

    def __call__(self, document: Document) -> list[int]:
        if isinstance(document, str):
            return self._text(document)
        self.conversations += 1
        rendered = self._render(document)
        if rendered is None:
            return self._text("\n\n".join(str(message["content"]) for message in document))
        return self.tokenizer(rendered, add_special_tokens=False).input_ids

    def notes(self) -> list[str]:
        if not self.fallen:
            return []
        how_many = f"{len(self.fallen)} of {self.conversations} conversations"
        return [f"{how_many} were joined as plain text: {self.fallen[0]}"]

    def _text(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids + self.end

    def _render(self, messages: list[dict[str, Any]]) -> str | None:
        """By the model's chat template; None, with the reason recorded, if that fails."""
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            self.fallen.append("the model has no chat template")
            return None
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            self.fallen.append(f"the chat template fails ({type(error).__name__}: {error})")
            return None


# ---- the model itself ----------------------------------------------------------------------------


def _from_self(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, writing: Writing, progress: Progress | None
) -> tuple[list[int], str, list[str]]:
    """The text that the model generates, or its cached text of the same settings."""

    def step(done: int, total: int) -> None:
        if progress:
            progress("writing calibration text", done, total)

    source = f"text written by the model itself (seed {writing.seed})"
    path = text_file(checkpoint, asdict(writing))
    kept = read_kept(path)
    if kept is not None:
        rows, notes = kept
        notes = [*notes, f"the text was written by an earlier run and reused: {path.name}"]
    else:
        rows, notes = write_rows(checkpoint, tokenizer, bos_of(tokenizer), writing, step)
        if not keep(path, rows, notes):
            notes = [*notes, f"the text cannot be kept for later runs in {path.parent}"]
    return [token for row in rows for token in row], source, notes
