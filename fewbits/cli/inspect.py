"""`fewbits inspect`: the tensors, types and metadata of a model."""

from __future__ import annotations

import argparse
import json
from math import prod
from pathlib import Path
from typing import Any

from ..adapters.hub import resolve
from ..files.open import file_type_at
from ..table import Cell, size, table

EXAMPLES = """Reads headers only.

examples:
  fewbits inspect model-Q4_K_M.gguf
  fewbits inspect ./Llama-3.2-1B --json"""

LONGEST = 60


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
        "metadata": dict(metadata),
        "types": dict(sorted(types.items(), key=lambda item: -item[1]["weights"])),
        "tensors": tensors,
    }


def short(value: Any) -> str:
    """A value on one line; of a long list its length and first items."""
    if isinstance(value, list) and len(value) > 4:
        return f"[{len(value)}] {', '.join(repr(item) for item in value[:3])}, ..."[:LONGEST]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text.replace("\n", "\\n")
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
