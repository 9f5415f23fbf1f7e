"""The folder of reproducible data: downloaded models and generated text.

$FEWBITS_CACHE, or ~/.cache/fewbits
  digests/<name>.json    SHA-256 of one file, with the size and times for which it is valid
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ..errors import FileError
from .atomic import make_directory, write_atomic
from .json import read_json_object, regular_size

PIECE = 4 * 2**20  # bytes read at once


def cache_folder() -> Path:
    """$FEWBITS_CACHE or ~/.cache/fewbits; it need not exist."""
    return Path(os.environ.get("FEWBITS_CACHE") or Path.home() / ".cache" / "fewbits")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, computed once per state of the file (size, times, inode).

    Raises FileError for a file that cannot be read. An unwritable cache costs only time.
    """
    regular_size(path)
    path = path.resolve()
    status = path.stat()
    state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    kept = cache_folder() / "digests" / f"{hashlib.sha256(bytes(path)).hexdigest()[:32]}.json"
    cached = kept_object(kept)
    if cached is not None and cached.get("state") == state and isinstance(cached.get("sha256"), str):
        return str(cached["sha256"])
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    keep_object(kept, {"state": state, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def kept_object(path: Path) -> dict[str, object] | None:
    """A JSON object of the cache, None if it is missing or damaged."""
    try:
        return read_json_object(path)
    except FileError:
        return None


def keep_object(path: Path, value: dict[str, object]) -> bool:
    """Write a JSON object to the cache atomically -> whether it succeeded."""
    try:
        make_directory(path.parent)
        write_atomic(path, json.dumps(value).encode())
    except FileError:
        return False
    return True
