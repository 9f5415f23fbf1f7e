"""The text, or the statistics, that a request needs: where it comes from, and what stands in for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from uuid import uuid4

import torch

from ..blocks.model import BlockModel
from ..calibrate.imatrix import open_statistics
from ..calibrate.statistics import Statistics
from ..calibrate.tokens import Tokens, read_tokens
from ..errors import ModelError
from ..files.checkpoint import Checkpoint
from ..memory import left_of
from ..plan.method import EFFORTS, Method
from .options import Options
from .request import Request, needs_of
from .run import quantizes_blocks

STATISTICS = {".safetensors", ".gguf", ".dat", ".imatrix"}
TOKENS, CONTEXT = 32768, 512
Read = Callable[[str], Tokens]  # the text of a source
Stage = Callable[[str, int, int], None]


def with_text(request: Request, checkpoint: Checkpoint, options: Options, read: Read) -> Request:
    """The request with the text or the statistics that its method needs, or what a runtime is told.

    Where nobody asked for calibration, a model that cannot be run is rounded to nearest, and a note says so.
    """
    measured = request.needs_text or (request.activations is not None and options.calibrate is not None)
    if not (request.method.needs_data or needs_of(request) or measured):
        return request
    if not quantizes_blocks(checkpoint, Path(uuid4().hex), request):
        return replace(request, method=Method())
    source = "self" if options.calibrate is None else options.calibrate
    if isinstance(source, Statistics):
        return from_statistics(request, source)
    if isinstance(source, Tokens):
        return replace(request, tokens=source)
    if Path(source).suffix in STATISTICS:
        return from_statistics(request, open_statistics(Path(source), checkpoint))
    try:
        BlockModel(checkpoint)
        return replace(request, tokens=read(str(source)))
    except ModelError as error:
        if not options.by_default:
            raise
        note = f"not calibrated, rounded to nearest instead: {error}"
        return replace(request, method=EFFORTS["fast"], notes=(note,))


def with_read_text(
    request: Request, checkpoint: Checkpoint, options: Options, progress: Stage | None = None
) -> Request:
    """A request with a stand-in for its text -> with the text, read or written by the model."""
    if request.tokens is None:
        return request
    read = reader(checkpoint, options, progress)
    return with_text(replace(request, tokens=None), checkpoint, options, read)


def reader(checkpoint: Checkpoint, options: Options, progress: Stage | None = None) -> Read:
    """Reads a source, or lets the model write."""
    count, context = options.tokens or TOKENS, options.context or CONTEXT

    def read(source: str) -> Tokens:
        memory = left_of(options.memory)
        return read_tokens(checkpoint, source, count, context, options.seed or 0, progress, memory)

    return read


def stand_in(options: Options) -> Read:
    """As many zeros as the text would have tokens: for estimates."""
    context = options.context or CONTEXT
    windows = torch.zeros(ceil((options.tokens or TOKENS) / context), context, dtype=torch.int64)
    return lambda source: Tokens.of(windows, "not read")


def writes_text(request: Request, options: Options) -> bool:
    """Does the model write the text of this request itself?"""
    return request.tokens is not None and options.calibrate in (None, "self")


def from_statistics(request: Request, statistics: Statistics) -> Request:
    """The request on saved statistics: in one pass, as the model is not run."""
    method, notes = request.method, (*request.notes, *statistics.notes)
    if method.sequential or method.gptaq:
        method = replace(method, sequential=False, gptaq=False)
        notes += (
            "saved statistics: each weight is fitted to the input it has in the float model, "
            "not to what the weights quantized before it leave of that",
        )
    return replace(request, method=method, statistics=statistics, notes=notes)
