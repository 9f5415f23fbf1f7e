"""The options that `quantize` and `calibrate` share: the text, and how the model is run over it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..adapters.blocks import BlockModel
from ..blockwise import Streaming
from ..calibrate.imatrix import open_statistics
from ..calibrate.statistics import Statistics
from ..calibrate.tokens import Tokens, read_tokens
from ..errors import CalibrationError, ModelError
from ..files.base import Checkpoint
from ..pipeline import Request, quantizes_blocks
from ..plan.method import EFFORTS, Method
from .progress import StageProgress

STATISTICS = {".safetensors", ".gguf", ".dat", ".imatrix"}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def text_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibrate",
        metavar="SOURCE",
        help="text the model is run on: a text or JSONL file, hf:NAME[:CONFIG][:SPLIT], or self (default): "
        "the model writes it; or statistics saved by `fewbits calibrate` or llama-imatrix",
    )
    group.add_argument("--tokens", type=int, metavar="N", help="how many tokens (default 32768)")
    group.add_argument("--context", type=int, metavar="N", help="tokens in a window (default 512)")
    group.add_argument("--seed", type=int, help="of sampling and shuffling (default 0)")
    group.add_argument(
        "--strict-calibration", action="store_true", help="make too few tokens for a weight an error"
    )
    group.add_argument(
        "--activation-memory", type=float, default=2.0, metavar="GIB",
        help="hidden states beyond this go to a scratch file (default 2)",
    )  # fmt: skip
    group.add_argument("--scratch", type=Path, metavar="DIR", help="where that file lies (default: system's)")
    group.add_argument("--device", default="cpu", help="cpu (default) or cuda: where the model is run")
    group.add_argument(
        "--compute", choices=("auto", *DTYPES), default="auto",
        help="arithmetic of the model: auto takes bf16 where the device multiplies it faster (AMX, CUDA)",
    )  # fmt: skip


def streaming_of(options: argparse.Namespace) -> Streaming:
    device = options.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CalibrationError(f"--device {device}: torch finds no CUDA device here; use cpu")
    return Streaming(
        activation_memory=int(options.activation_memory * 2**30),
        scratch=options.scratch,
        device=device,
        dtype=_dtype(options.compute, device),
        seed=options.seed or 0,
    )


def _dtype(name: str, device: str) -> torch.dtype:
    """auto: bf16 only where it is known to pay. AVX512-BF16 without AMX multiplies slower than f32 here:
    142 against 189 GFLOP/s (torch 2.13, 2 cores)."""
    if name != "auto":
        return DTYPES[name]
    amx = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device != "cpu" or amx else torch.float32


def tokens_of(
    checkpoint: Checkpoint, options: argparse.Namespace, source: str, progress: StageProgress
) -> Tokens:
    """The text, as windows of tokens."""
    context, count = options.context or 512, options.tokens or 32768
    return read_tokens(checkpoint, source, count, context, options.seed or 0, progress)


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


def calibrated(request: Request, checkpoint: Checkpoint, out: Path, options: argparse.Namespace) -> Request:
    """The request with the text or the statistics that its method needs, or what a runtime is told.

    Where nobody asked for calibration, a model that cannot be run is rounded to nearest, and that is said.
    """
    measured = request.needs_text or (request.activations is not None and options.calibrate)
    if not request.method.needs_data and not measured:
        return request
    if not quantizes_blocks(checkpoint, out, request):
        return replace(request, method=Method())
    source = options.calibrate or "self"
    path = Path(source)
    if path.suffix in STATISTICS:
        return from_statistics(request, open_statistics(path, checkpoint))
    by_default = not (options.effort or options.method or options.calibrate or request.method.transforms)
    try:
        with StageProgress() as progress:
            BlockModel(checkpoint)
            tokens = tokens_of(checkpoint, options, source, progress)
    except ModelError as error:
        if not by_default:
            raise
        print(
            f"fewbits {options.command}: not calibrated, rounded to nearest instead: {error}", file=sys.stderr
        )
        note = f"not calibrated, rounded to nearest instead: {error}"
        return replace(request, method=EFFORTS["fast"], notes=(note,))
    for note in tokens.notes:
        print(f"fewbits {options.command}: {note}", file=sys.stderr)
    return replace(request, tokens=tokens, streaming=streaming_of(options))
