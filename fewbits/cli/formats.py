"""`fewbits formats`: what --to and --rule take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from ..files.layout import LAYOUTS
from ..files.target import gguf_refusal
from ..formats import FLOATS, FORMATS
from ..formats.ggml import Ggml, format_of
from ..plan.carry import Refusal, way
from ..plan.mixtures import RECIPES
from ..report.table import table

HELP = "list number formats and file types"
EXAMPLES = """examples:
  fewbits formats
  fewbits formats --json
  fewbits formats --doors          which file type carries which format (the table of docs/formats.md)"""

GRAMMAR = """Integer formats follow a grammar, so any of its names works: int{2..8}[_g{G} | _channel |
_tensor][_asym | _asym_float][_f16 | _bf16 | _f32], such as int3_g64 or int4_g32_asym_bf16."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--doors", action="store_true", help="formats x file types, as a Markdown table")


def run(options: argparse.Namespace) -> int:
    if options.doors:
        print(json.dumps(doors(), indent=1) if options.json else markdown(doors()))
        return 0
    rows = [describe(name) for name, _ in FORMATS.items()]
    recipes: list[dict[str, Any]] = [
        {"file_type": name, "number": recipe.file_type, "default": recipe.default}
        for name, recipe in RECIPES.items()
        if name == recipe.name and format_of(recipe.default) in FORMATS
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


def describe(name: str) -> dict[str, Any]:
    """One format as data; bits per weight are computed from its planes, for a 4096 x 4096 weight."""
    fmt = FORMATS.get(name)
    return {
        "format": name,
        "bits_per_weight": float(fmt.bits_per_weight()),
        "block": fmt.block,
        "planes": " ".join(plane.name for plane in fmt.planes),
        "gguf": "yes" if isinstance(fmt, Ggml) or name in ("f32", "f16", "bf16") else "-",
    }


def doors() -> dict[str, dict[str, str]]:
    """format -> file type -> how it carries the format; what it does not carry is left out."""
    refusals: dict[str, Refusal] = {"gguf": gguf_refusal}
    refusals |= {name: layout.refusal for name, layout in LAYOUTS.items()}
    found: dict[str, dict[str, str]] = {}
    for format in FORMATS:
        if format in FLOATS:
            continue
        ways = {file: way(format, refusal) for file, refusal in refusals.items()}
        found[format] = {file: how for file, how in ways.items() if how is not None}
    return found


def markdown(found: Mapping[str, Mapping[str, str]]) -> str:
    files = ["gguf", *(name for name in LAYOUTS if name != "huggingface")]
    lines = [f"| format | {' | '.join(files)} |", "|---" * (len(files) + 1) + "|"]
    for format, ways in found.items():
        cells = ["yes" if ways.get(file) == "itself" else ways.get(file, "") for file in files]
        lines.append(f"| {format} | {' | '.join(cells)} |")
    return "\n".join(lines)
