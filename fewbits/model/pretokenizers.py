"""Pre-tokenizers: the splitting of text before byte-level BPE merges, and their names in llama.cpp.

A tokenizer.json has the rules as a tree of steps. GGUF has their name (`tokenizer.ggml.pre`), and llama.cpp
the regular expressions of each name. The table is pretokenizers.toml: a tree is flattened to its successive
isolating splits and looked up there, without guessing.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = (
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
)


@dataclass(frozen=True)
class Pretokenizer:
    """One row of pretokenizers.toml; the fields are explained at its top."""

    names: tuple[str, ...]
    split: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


@cache
def pretokenizers() -> tuple[Pretokenizer, ...]:
    """The table."""
    text = Path(__file__).with_name("pretokenizers.toml").read_text(encoding="utf-8")
    return tuple(
        Pretokenizer(
            names=tuple(row["names"]),
            split=tuple(_GPT2 if step == "@gpt2" else step for step in row["split"]),
            ignore_merges=row.get("ignore_merges", False),
            add_bos=row.get("add_bos", False),
        )
        for row in tomllib.loads(text)["pretokenizer"]
    )


def pretokenizer_row(name: str | None) -> Pretokenizer:
    """The row of a `tokenizer.ggml.pre` name; ModelError listing the known names."""
    for row in pretokenizers():
        if name in row.names:
            return row
    known = ", ".join(name for row in pretokenizers() for name in row.names)
    raise ModelError(
        f"tokenizer.ggml.pre = {name!r} is unknown; known: {known}; give a Hugging Face tokenizer"
    )


def pretokenizer_name(spec: Mapping[str, Any]) -> str:
    """A byte-level tokenizer.json -> its `tokenizer.ggml.pre` name; ModelError with its splits if unknown."""
    split = _splits(spec.get("pre_tokenizer"))
    ignore = bool(spec["model"].get("ignore_merges"))
    for row in pretokenizers():
        if tuple(split) == row.split and ignore == row.ignore_merges:
            return row.names[0]
    raise ModelError(
        f"tokenizer.json: no pre-tokenizer of llama.cpp known here has the splits {split} with "
        f"ignore_merges={ignore}; known: {', '.join(row.names[0] for row in pretokenizers())}; a native "
        "directory keeps any tokenizer (--file native)"
    )


def _splits(step: Mapping[str, Any] | None) -> list[str]:
    """A pre_tokenizer of tokenizer.json -> its successive isolating regular expressions."""
    if step is None:
        return []
    kind = step["type"]
    if kind == "Sequence":
        return [regex for inner in step["pretokenizers"] for regex in _splits(inner)]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [_GPT2] if step.get("use_regex", True) else []
    if kind == "Digits":
        return [r"\p{N}" if step.get("individual_digits") else r"\p{N}+"]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = step["pattern"]
        return [pattern["Regex"].replace(*_CONTRACTIONS) if "Regex" in pattern else pattern["String"]]
    return [json.dumps(step)]  # in no table: reported unchanged
