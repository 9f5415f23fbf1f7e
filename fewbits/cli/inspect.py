"""`fewbits inspect`: the tensors, types and metadata of a model."""

from __future__ import annotations

import argparse
import json
from array import array
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ..adapters.hub import resolve
from ..files.filetype import FileType
from ..files.huggingface import HUGGINGFACE
from ..files.open import file_type_at
from ..formats.lossless import holders
from ..formats.trained import DIFFERENT, trained_grids
from ..qtensor import QTensor
from ..storage.mapped import read_bytes
from ..storage.safetensors import Entry, read_header
from ..table import Cell, size, table

EXAMPLES = """Reads headers, and a few values: a model that was trained for few bits lies on their grid.

examples:
  fewbits inspect model-Q4_K_M.gguf
  fewbits inspect ./Llama-3.2-1B --json"""

LONGEST = 60
TRIED, ROWS = 8, 32  # weights, and rows of them
GROUPS = 64  # of 32 weights, looked at before anything large is imported
WORDS = {"bf16": "H", "f16": "H", "f32": "I"}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--no-tensors", action="store_true", help="do not list the tensors")


def run(options: argparse.Namespace) -> int:
    path = resolve(options.model, options.cache_dir)
    description = describe(path)
    if options.json:
        print(json.dumps(description, indent=1, ensure_ascii=False))
        return 0
    print(f"{path}: {description['kind']}, {description['weights']} weights, {size(description['nbytes'])}, "
          f"{description['bits_per_weight']:.3f} bits per weight\n")  # fmt: skip
    if description["trained_for"]:
        print(f"{trained_line(description['trained_for'])}\n")
    print(table(["key", "value"], [[key, short(value)] for key, value in description["metadata"].items()]))
    rows: list[list[Cell]] = [[kind, *figures.values()] for kind, figures in description["types"].items()]
    for row in rows:
        row[3] = size(int(row[3] or 0))
    print("\n" + table(["type", "tensors", "weights", "size", "bits/weight"], rows))
    if not options.no_tensors:
        lines: list[list[Cell]] = [
            [t["name"], " x ".join(map(str, t["shape"])), t["type"], size(t["nbytes"])]
            for t in description["tensors"]
        ]
        print("\n" + table(["tensor", "shape", "type", "size"], lines))
    return 0


def describe(path: Path) -> dict[str, Any]:
    """A model as data: kind, metadata, tensors as they are stored, totals by type."""
    file_type = file_type_at(path)
    metadata, rows = file_type.inspect(path)
    keys = ("name", "shape", "type", "nbytes")
    tensors: list[dict[str, Any]] = [dict(zip(keys, row, strict=True)) for row in rows]
    types: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        row = types.setdefault(
            tensor["type"], {"tensors": 0, "weights": 0, "nbytes": 0, "bits_per_weight": 0.0}
        )
        row["tensors"] += 1
        row["weights"] += prod(tensor["shape"])
        row["nbytes"] += tensor["nbytes"]
        row["bits_per_weight"] = 8 * row["nbytes"] / max(1, row["weights"])
    weights = sum(row["weights"] for row in types.values())
    nbytes = sum(row["nbytes"] for row in types.values())
    return {
        "path": str(path),
        "kind": file_type.name,
        "weights": weights,
        "nbytes": nbytes,
        "bits_per_weight": 8 * nbytes / max(1, weights),
        "trained_for": trained_for(path, file_type),
        "metadata": dict(metadata),
        "types": dict(sorted(types.items(), key=lambda item: -item[1]["weights"])),
        "tensors": tensors,
    }


def trained_for(path: Path, file_type: FileType) -> dict[str, int]:
    """Formats on whose grid a few weights of a float checkpoint lie -> how many of those tried, with the
    number of those that lie on none under "none". Empty for all other models."""
    if file_type is not HUGGINGFACE:
        return {}
    checkpoint = file_type.open(path)
    matrices = [
        tensor
        for tensor in checkpoint.tensors.values()
        if not tensor.quantized and tensor.file and len(tensor.shape) == 2 and tensor.shape[1] % 32 == 0
    ]
    tried = matrices[:: max(1, len(matrices) // TRIED)][:TRIED]
    files = {tensor.file: read_header(checkpoint.path / tensor.file) for tensor in tried}
    if not any(_repeats(checkpoint.path / t.file, files[t.file][t.name]) for t in tried):
        return {}
    found: Counter[str] = Counter()
    for tensor in tried:
        w = tensor.load()
        assert not isinstance(w, QTensor)
        grids = trained_grids(w[:ROWS].float())
        found[next((q.format.name for q in grids), "none")] += 1
    return {} if set(found) == {"none"} else dict(found.most_common())


def _repeats(file: Path, entry: Entry) -> bool:
    """Whether equal values are frequent in the first groups of 32 weights. Nothing large is imported."""
    word = WORDS.get(entry.dtype.lower())
    if word is None:
        return False
    count = min(prod(entry.shape), 32 * GROUPS)
    words = array(word)
    words.frombytes(read_bytes(file, entry.offset, count * words.itemsize, entry.name))
    different = [len(set(words[i : i + 32])) for i in range(0, count, 32)]
    return sum(different) < DIFFERENT * len(different)


def trained_line(found: Mapping[str, int]) -> str:
    """For people."""
    total = sum(found.values())
    parts = [f"{count} of {total} weights tried lie on the grid of {name}" for name, count in found.items()
             if name != "none"]  # fmt: skip
    first = next(name for name in found if name != "none")
    return f"{', '.join(parts)}: trained for it; --to {holders(first)} keeps every code"


def short(value: Any) -> str:
    """A value on one line; of a long list its length and first items."""
    if isinstance(value, list) and len(value) > 4:
        return f"[{len(value)}] {', '.join(repr(item) for item in value[:3])}, ..."[:LONGEST]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text.replace("\n", "\\n")
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
