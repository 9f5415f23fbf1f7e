"""Side files: tokenizer, templates, generation settings, licenses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import FileError, raise_all
from ..storage.json import regular_size

CARD_LIMIT = 2**20  # bytes of a model card: YAML is read slowly

_NEEDED = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".gguf"}
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
    "modules.json",  # sentence-transformers: what follows the hidden states, a folder for each step
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
    "[0-9]_*/model.safetensors",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)


def find_side_files(path: Path) -> dict[str, Path]:
    """Tokenizer, templates, generation settings and licenses of a model directory: name (of a file in a
    folder: FOLDER/NAME) -> path."""
    files = {file for pattern in SIDE_FILES for file in path.glob(pattern) if file.is_file()}
    return {file.relative_to(path).as_posix(): file for file in sorted(files)}


def check_links(path: Path) -> None:
    """FileError that lists the links to files that are not there, as an interrupted download leaves them."""
    files = [path, *path.iterdir()] if path.is_dir() else [path]
    broken = [
        f"{file.name} is a link to {file.readlink()}, which is not there"
        for file in files
        if file.is_symlink() and not file.exists() and file.suffix in _NEEDED
    ]
    raise_all(FileError, str(path), [*broken, "fetch the model again, or copy the files"] if broken else [])


def card_fields(readme: Path | None) -> dict[str, str | list[str]]:
    """The texts and lists of texts in a model card's YAML (its front matter), as the hub reads it.

    Empty if there is no card or its YAML is damaged, which `audit` reports."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        if readme is None or regular_size(readme) > CARD_LIMIT:
            return {}
        fields = metadata_load(readme) or {}
    except (FileError, OSError, ValueError, YAMLError, RecursionError):
        return {}
    lists = {key: [part for part in value if isinstance(part, str)]
             for key, value in fields.items() if isinstance(value, list)}  # fmt: skip
    texts = {key: value for key, value in fields.items() if isinstance(value, str)}
    return {key: value for key, value in (texts | lists).items() if value}


def describe_files(path: Path, kind: str, files: list[Path]) -> dict[str, Any]:
    """An input for the receipt: path, type, files and their sizes."""
    sizes = [{"name": file.name, "nbytes": file.stat().st_size} for file in files]
    return {"reference": str(path), "type": kind, "files": sizes}
