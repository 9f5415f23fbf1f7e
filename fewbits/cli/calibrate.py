"""`fewbits calibrate`: run a text through the float model and save activation statistics."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.hub import resolve
from ..calibrate.imatrix import open_statistics, write_imatrix
from ..calibrate.statistics import Statistics, merge
from ..calibrate.store import save_statistics
from ..calibrate.sufficiency import needed_for
from ..errors import CalibrationError, FileError, PlanError
from ..files.checkpoint import Checkpoint
from ..files.open import open_checkpoint
from ..model.archs import require_architecture
from ..storage.atomic import make_directory
from ..table import Cell, size, table
from ..workflow.blockwise.collect import collect
from ..workflow.options import Options
from ..workflow.text import default_source, reader
from .options import streaming_of, text_arguments
from .progress import StageProgress

EXAMPLES = """Runs the model block by block over the text and saves statistics of the inputs of its weights:

  .safetensors    magnitudes, mean squares and Hessians, for --method gptq or weighted
  .gguf, .dat     mean squares, llama.cpp's importance matrix, for --method weighted or llama-quantize

examples:
  fewbits calibrate ./Llama-3.2-1B --out llama-stats.safetensors
  fewbits calibrate ./Llama-3.2-1B --calibrate c4.txt --tokens 131072 --out imatrix.gguf
  fewbits calibrate ./Llama-3.2-1B --calibrate code.txt --merge imatrix.gguf --out both.gguf
  fewbits quantize ./Llama-3.2-1B --to q4_k_m --method weighted --calibrate imatrix.gguf"""
SUFFIXES = (".safetensors", ".gguf", ".dat")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", required=True, help="stats.safetensors, imatrix.gguf or .dat"
    )
    parser.add_argument(
        "--no-hessian", action="store_true", help="save mean squares only (.gguf and .dat always do)"
    )
    parser.add_argument(
        "--merge", action="append", default=[], type=Path, metavar="FILE",
        help="add saved statistics of the same model; repeatable",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    text_arguments(parser)


def run(options: argparse.Namespace) -> int:
    out = options.out
    checkpoint = open_checkpoint(resolve(options.model, options.cache_dir))
    with _prepared(out, checkpoint, options.overwrite) as parts, StageProgress() as progress:
        saved = [open_statistics(path, checkpoint) for path in options.merge]
        hessian = out.suffix == ".safetensors" and not options.no_hessian
        streaming = streaming_of(options)
        settings = Options(tokens=options.tokens, context=options.context, seed=options.seed)
        tokens = reader(checkpoint, settings, progress)(options.calibrate or default_source(checkpoint))
        statistics = collect(checkpoint, tokens, streaming, parts, hessian, progress)
        for other in saved:
            statistics = merge(statistics, other)
        rows = _rows(statistics)
        if options.strict_calibration:
            _check_enough(rows)
        if out.suffix == ".safetensors":
            save_statistics(statistics, out, overwrite=True)
        else:
            write_imatrix(statistics, checkpoint, out)
    summary = _summary(statistics, rows, out)
    progress.close()
    print(json.dumps(summary, indent=1, ensure_ascii=False) if options.json else _text(summary))
    return 0


@contextmanager
def _prepared(out: Path, checkpoint: Checkpoint, overwrite: bool) -> Iterator[Path]:
    """Check the output path -> an empty folder beside it, which is removed afterwards."""
    if out.suffix not in SUFFIXES:
        raise PlanError(f"--out {out}: unknown suffix; use {', '.join(SUFFIXES)}")
    if out.is_dir():
        raise FileError(f"{out}: is a directory; name a file")
    if out.exists() and not overwrite:
        raise FileError(f"{out}: exists; choose another output or pass --overwrite")
    if out.exists() and out.samefile(checkpoint.path):
        raise FileError(f"{out}: is the model itself; choose another output")
    if out.suffix != ".safetensors" and not checkpoint.gguf_keys:
        require_architecture(checkpoint.config)
    make_directory(out.parent)
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".parts", dir=out.parent)
    except OSError as error:
        raise FileError(f"{out}: cannot be written there: {error.strerror}; choose another output") from error
    with folder as name:
        yield Path(name)


@dataclass(frozen=True)
class _Row:
    """Inputs at the same place of their blocks. tokens: the smallest count of one input. short: the number
    of inputs with fewer tokens than `needed`."""

    place: str
    columns: int
    groups: int
    tokens: int
    needed: int
    short: int


def _rows(statistics: Statistics) -> list[_Row]:
    places: dict[str, list[tuple[int, int]]] = {}
    for key, group in statistics.groups.items():
        place = re.sub(r"\.\d+\.", ".*.", key.removesuffix(".weight"))
        places.setdefault(place, []).append((group.columns, group.load(False).count))
    rows = []
    for place, seen in places.items():
        columns, counts = seen[0][0], [count for _, count in seen]
        needed = needed_for(columns, "hessian" in statistics.knows)
        rows.append(
            _Row(place, columns, len(seen), min(counts), needed, sum(count < needed for count in counts))
        )
    return rows


def _check_enough(rows: list[_Row]) -> None:
    short = [row for row in rows if row.short]
    if short:
        worst = min(short, key=lambda row: row.tokens / row.needed)
        raise CalibrationError(
            f"{worst.place}: {worst.tokens} tokens seen, {worst.needed} are needed (and too few at "
            f"{sum(row.short for row in short) - 1} other inputs); give more --tokens, or leave out "
            "--strict-calibration"
        )


def _summary(statistics: Statistics, rows: list[_Row], out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "nbytes": out.stat().st_size,
        "model": str(statistics.model),
        "source": statistics.source,
        "tokens": statistics.tokens,
        "knows": sorted(statistics.knows),
        "inputs": [vars(row) for row in rows],
        "unseen": list(statistics.unseen),
        "notes": list(statistics.notes),
    }


def _text(summary: dict[str, Any]) -> str:
    head = ["input of", "columns", "inputs", "fewest tokens", "needed", "too few"]
    lines: list[list[Cell]] = [list(row.values()) for row in summary["inputs"]]
    parts = [f"{summary['tokens']} tokens of {summary['source']}", table(head, lines)]
    short = sum(row["short"] for row in summary["inputs"])
    if short:
        parts.append(
            f"note: {short} of {sum(row['groups'] for row in summary['inputs'])} inputs saw fewer tokens "
            "than a sound estimate needs; give more --tokens"
        )
    if unseen := summary["unseen"]:
        more = f" (and {len(unseen) - 1} more)" if unseen[1:] else ""
        parts.append(f"note: no token reached {unseen[0]}{more}")
    parts += [f"note: {note}" for note in summary["notes"]]
    return "\n\n".join([*parts, f"wrote {summary['out']}, {size(summary['nbytes'])}"])
