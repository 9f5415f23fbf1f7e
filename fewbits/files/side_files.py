"""The files beside the weights: tokenizer, templates, generation settings, licenses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIDE_FILES = (
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)


def find_side_files(path: Path) -> dict[str, Path]:
    """Tokenizer, templates, generation settings and licenses of a model directory: name -> path."""
    found = {file.name: file for pattern in SIDE_FILES for file in path.glob(pattern) if file.is_file()}
    return dict(sorted(found.items()))


def describe_files(path: Path, kind: str, files: list[Path]) -> dict[str, Any]:
    """What a receipt says of an input: where it lay, of which type, its files and their sizes."""
    sizes = [{"name": file.name, "nbytes": file.stat().st_size} for file in files]
    return {"reference": str(path), "type": kind, "files": sizes}
