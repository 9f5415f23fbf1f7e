"""`fewbits formats`: the values of --to and --rule."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..dtypes import DTYPES, DType
from ..files.open import FILE_TYPES
from ..formats import FORMATS
from ..formats.base import SCALE_TYPES, Format, Kind
from ..formats.ggml import Ggml
from ..plan.carry import carries_as
from ..plan.mixtures import RECIPES
from ..table import table

EXAMPLES = """examples:
  fewbits formats
  fewbits formats --json
  fewbits formats --support        formats by file type (the table of docs/formats.md)"""

GRAMMAR = """Names of integer formats follow a grammar: int{2..8}[_g{G} | _channel | _tensor]
[_asym | _asym_float][_f16 | _bf16 | _f32], such as int3_g64 or int4_g32_asym_bf16. With groups, and without
_float, _actorder may precede the type: int4_g128_actorder (GPTQ's desc_act)."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument(
        "--support", "--doors", action="store_true", help="formats x file types, as a Markdown table"
    )


def run(options: argparse.Namespace) -> int:
    if options.support:
        print(json.dumps(support(), indent=1) if options.json else markdown(support()))
        return 0
    kinds: list[Kind] = [DTYPES[name] for name in SCALE_TYPES]
    rows = [describe(kind) for kind in kinds + [format for _, format in FORMATS.items()]]
    recipes: list[dict[str, Any]] = [
        {"file_type": name, "number": recipe.file_type, "default": recipe.default}
        for name, recipe in RECIPES.items()
        if name == recipe.name
    ]
    if options.json:
        print(json.dumps({"formats": rows, "file_types": recipes}, indent=1))
        return 0
    head = ["format", "bits/weight", "block", "planes", "GGUF"]
    print(
        table(head, [[r["format"], r["bits_per_weight"], r["block"], r["planes"], r["gguf"]] for r in rows])
    )
    print(f"\n{GRAMMAR}\n")
    print(table(["file type", "number", "default type"], [list(recipe.values()) for recipe in recipes]))
    return 0


def describe(kind: Kind) -> dict[str, Any]:
    """One format or float type as data; bits per weight of a 4096 x 4096 weight, computed from planes."""
    if isinstance(kind, DType):
        row = {"bits_per_weight": 8.0 * kind.itemsize, "block": 1, "planes": "values", "gguf": "yes"}
        return {"format": kind.name, **row}
    return {
        "format": kind.name,
        "bits_per_weight": float(kind.bits_per_weight()),
        "block": kind.block,
        "planes": " ".join(plane.name for plane in kind.planes),
        "gguf": "yes" if isinstance(kind, Ggml) else "-",
    }


def support() -> dict[str, dict[str, str]]:
    """Registered format -> file type -> the way in which it supports the format."""
    return {name: support_of(format) for name, format in FORMATS.items()}


def support_of(format: Format) -> dict[str, str]:
    """File type -> the way in which it supports a format, for file types that do."""
    ways = {name: carries_as(file_type, format) for name, file_type in FILE_TYPES.items()}
    return {name: how for name, how in ways.items() if how is not None}


def markdown(support: Mapping[str, Mapping[str, str]]) -> str:
    files = [name for name, file_type in FILE_TYPES.items() if file_type.carries_formats]
    lines = [f"| format | {' | '.join(files)} |", "|---" * (len(files) + 1) + "|"]
    for format, ways in support.items():
        lines.append(f"| {format} | {' | '.join(ways.get(file, '') for file in files)} |")
    return "\n".join(lines)


def verified(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of bench/format_support -> a Markdown table: each format in each engine of each file type."""
    columns = sorted({(row["file"], row["engine"]) for row in rows}, key=_place)
    versions = {row["engine"]: row["version"] for row in rows if row["version"]}
    head = [f"{file}, {engine} {versions.get(engine, '')}".strip() for file, engine in columns]
    lines = [f"| format | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for format in dict.fromkeys(row["format"] for row in rows):
        cells = {(row["file"], row["engine"]): _cell(row) for row in rows if row["format"] == format}
        lines.append(f"| {format} | {' | '.join(cells.get(column, '') for column in columns)} |")
    return "\n".join(lines)


def _place(column: tuple[str, str]) -> tuple[int, int]:
    file, engine = column
    return list(FILE_TYPES).index(file), FILE_TYPES.get(file).engines.index(engine)


def _cell(row: Mapping[str, Any]) -> str:
    """KL divergence and greedy tokens if the verdict is `same`; else the verdict."""
    from ..release.verify import NEW  # which imports torch

    return f"{row['kl']:.1g}, {row['greedy']}/{NEW}" if row["verdict"] == "same" else f"**{row['verdict']}**"
