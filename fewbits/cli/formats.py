"""`fewbits formats`: what --to and --rule take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..files.layout import LAYOUTS
from ..files.target import gguf_refusal
from ..formats import FLOATS, FORMATS
from ..formats.ggml import Ggml, format_of
from ..plan.carry import Refusal, way
from ..plan.mixtures import RECIPES
from ..release.engines import ENGINES
from ..release.verify import NEW
from ..table import table

HELP = "list number formats and file types"
EXAMPLES = """examples:
  fewbits formats
  fewbits formats --json
  fewbits formats --doors          which file type carries which format (the table of docs/formats.md)"""

GRAMMAR = """Integer formats follow a grammar, so any of its names works: int{2..8}[_g{G} | _channel |
_tensor][_asym | _asym_float][_f16 | _bf16 | _f32], such as int3_g64 or int4_g32_asym_bf16. With groups, and
without _float, _actorder may stand before the type: int4_g128_actorder (GPTQ's desc_act)."""


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
    """Registered format -> file type -> how it carries the format; see `ways_of`."""
    return {format: ways_of(format) for format in FORMATS if format not in FLOATS}


def ways_of(format: str) -> dict[str, str]:
    """File type -> how it carries a format; what does not carry it is left out."""
    refusals: dict[str, Refusal] = {"gguf": gguf_refusal}
    refusals |= {name: layout.refusal for name, layout in LAYOUTS.items()}
    ways = {file: way(format, refusal) for file, refusal in refusals.items()}
    return {file: how for file, how in ways.items() if how is not None}


def markdown(found: Mapping[str, Mapping[str, str]]) -> str:
    files = ["gguf", *(name for name in LAYOUTS if name != "huggingface")]
    lines = [f"| format | {' | '.join(files)} |", "|---" * (len(files) + 1) + "|"]
    for format, ways in found.items():
        cells = ["yes" if ways.get(file) == "itself" else ways.get(file, "") for file in files]
        lines.append(f"| {format} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verified(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of bench/doors -> a Markdown table: what each engine made of each format in each file type."""
    doors = sorted({(row["file"], row["engine"]) for row in rows}, key=_place)
    versions = {row["engine"]: row["version"] for row in rows if row["version"]}
    head = [f"{file}, {engine} {versions.get(engine, '')}".strip() for file, engine in doors]
    lines = [f"| format | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for format in dict.fromkeys(row["format"] for row in rows):
        found = {(row["file"], row["engine"]): _cell(row) for row in rows if row["format"] == format}
        lines.append(f"| {format} | {' | '.join(found.get(door, '') for door in doors)} |")
    return "\n".join(lines)


def _place(door: tuple[str, str]) -> tuple[int, int]:
    files, engines = list(ENGINES), [engine.name for engine in ENGINES[door[0]]]
    return files.index(door[0]), engines.index(door[1])


def _cell(row: Mapping[str, Any]) -> str:
    """`same` in figures: KL divergence, greedy tokens; else the verdict."""
    return f"{row['kl']:.1g}, {row['greedy']}/{NEW}" if row["verdict"] == "same" else f"**{row['verdict']}**"
