"""What bench/quality and bench/calibrate work on: a model, text to calibrate on, text to evaluate on.

Nothing ships with the project: without a file, the model writes both texts itself. Results lie in a folder
named by all that decides them, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fewbits.adapters.hub import resolve
from fewbits.calibrate.tokens import Tokens, read_tokens
from fewbits.evaluation import Text, read_text, self_text
from fewbits.files.checkpoint import Checkpoint
from fewbits.files.open import open_checkpoint
from fewbits.storage.cache import cache_folder

CACHE = cache_folder()
CONTEXT = 512  # of evaluation
TEXT_SEED = 1  # calibration text has 0


@dataclass(frozen=True)
class Inputs:
    """tokens: to calibrate on, the same for everyone. folder: where results are made and kept."""

    checkpoint: Checkpoint
    tokens: Tokens
    folder: Path


def input_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo:smollm2", metavar="DIR", help="default: the demo model")
    parser.add_argument("--calibration", metavar="FILE", help="calibration text (default: the model's own)")
    parser.add_argument("--tokens", metavar="NxC", help="N windows of C tokens (default 64x512)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep results here, and use those kept")
    parser.add_argument(
        "--gptqmodel", type=Path, default=CACHE / "gptqmodel" / "bin" / "python", metavar="PYTHON",
        help="interpreter that has gptqmodel 7.7.0 (`make gptqmodel` makes the default one)",
    )  # fmt: skip


@contextmanager
def inputs(options: argparse.Namespace, quick: str) -> Iterator[Inputs]:
    """quick: what --tokens is with --quick."""
    windows, context = map(int, (options.tokens or (quick if options.quick else "64x512")).split("x"))
    path = resolve(options.model, CACHE)
    checkpoint = open_checkpoint(path)
    source = options.calibration or "self"
    with tempfile.TemporaryDirectory() as temporary:
        asked = [str(path.resolve()), source, _digest(options.calibration), windows, context]
        folder = (options.keep or Path(temporary)) / _named(asked)
        folder.mkdir(parents=True, exist_ok=True)
        yield Inputs(checkpoint, _tokens(checkpoint, source, (windows, context), folder), folder)


def evaluation_text(given: Inputs, file: Path | None, windows: int) -> Text:
    """The first tokens of a file, or as many as the reference writes."""
    if file is not None:
        return read_text(given.checkpoint, file.read_text(encoding="utf-8"), str(file))
    kept = given.folder / f"text-{windows}.json"
    if not kept.exists():
        written = self_text(given.checkpoint, windows * CONTEXT, TEXT_SEED, CONTEXT, say)
        _write(kept, {"tokens": written.tokens.tolist(), "source": written.source})
    found = json.loads(kept.read_text())
    return Text(torch.tensor(found["tokens"]), found["source"])


def say(stage: str, done: int, total: int) -> None:
    """Progress on a terminal, one line overwritten."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{stage} {done}/{total}", end="" if done < total else "\r\x1b[K", file=sys.stderr)


def _tokens(checkpoint: Checkpoint, source: str, size: tuple[int, int], folder: Path) -> Tokens:
    kept = folder / "tokens.json"
    if not kept.exists():
        windows, context = size
        tokens = read_tokens(checkpoint, source, windows * context, context, progress=say)
        if len(tokens.windows) < windows:
            raise SystemExit(f"{source}: {len(tokens.windows)} windows of {context}, {windows} are needed")
        _write(kept, tokens.windows.tolist())
    return Tokens.of(torch.tensor(json.loads(kept.read_text())), source)


def _write(path: Path, value: object) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value))
    part.replace(path)


def _digest(file: str | None) -> str | None:
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _named(asked: list[object]) -> str:
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
