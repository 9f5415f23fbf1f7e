"""Cache of generated text: it is read again instead of generating it again.

    $FEWBITS_CACHE/text/<key>.json   {"rows": [[token ...] ...], "notes": [...], "sha256": of the rows}

The key is a digest of the model (files, config, tokenizer, and a sample of every loaded tensor, because a
checkpoint may be a rewritten view of its files), of the settings, and of the versions. A damaged file is
ignored and generated again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from ..files.checkpoint import Checkpoint, LazyTensor
from ..qtensor import QTensor
from ..storage.atomic import as_bytes
from ..storage.cache import cache_folder, file_digest, keep_object, kept_object
from ..version import VERSION

WRITER = 2  # increased when the same settings give another text
SAMPLE = 256  # numbers in the sample of each array

Rows = list[list[int]]


def text_file(checkpoint: Checkpoint, settings: dict[str, object]) -> Path:
    """The file of the text that this model generates with these settings."""
    settings_json = json.dumps([WRITER, VERSION, torch.__version__, settings], sort_keys=True)
    key = hashlib.sha256(f"{model_digest(checkpoint)} {settings_json}".encode()).hexdigest()
    return cache_folder() / "text" / f"{key[:40]}.json"


def read_kept(path: Path) -> tuple[Rows, list[str]] | None:
    """The rows and notes of a cached text; None if it is missing or damaged."""
    kept = kept_object(path)
    if kept is None or kept.get("sha256") != _digest(kept.get("rows"), kept.get("notes")):
        return None
    return kept["rows"], kept["notes"]  # type: ignore[return-value]


def keep(path: Path, rows: Rows, notes: list[str]) -> bool:
    """Cache a text -> whether it succeeded."""
    return keep_object(path, {"rows": rows, "notes": notes, "sha256": _digest(rows, notes)})


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def model_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of everything that decides a model's text. Files are hashed once per state."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    names = {tensor.file for tensor in checkpoint.tensors.values()}
    files = {name: root / name for name in names if name and (root / name).is_file()}
    for name, path in sorted({**files, **checkpoint.side_files}.items()):
        digest.update(f"{name} {file_digest(path)}\n".encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.shape} {tensor.dtype}\n".encode())
        for array in _arrays(tensor):
            flat = array.reshape(-1)
            step = max(1, flat.numel() // SAMPLE) if tensor.file in files else 1
            digest.update(as_bytes(flat[::step]))
    return digest.hexdigest()


def _arrays(tensor: LazyTensor) -> Iterator[torch.Tensor]:
    value = tensor.load()
    yield from value.planes.values() if isinstance(value, QTensor) else (value,)
