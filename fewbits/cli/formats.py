"""`fewbits formats`: what --to and --rule take."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..formats import FORMATS
from ..formats.ggml import Ggml, format_of
from ..plan.mixtures import RECIPES
from ..report.table import table

HELP = "list number formats and file types"
EXAMPLES = """examples:
  fewbits formats
  fewbits formats --json"""

GRAMMAR = """Integer formats follow a grammar, so any of its names works: int{2..8}[_g{G} | _channel |
_tensor][_asym | _asym_float][_f16 | _bf16 | _f32], such as int3_g64 or int4_g32_asym_bf16."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(options: argparse.Namespace) -> int:
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
