"""JSON from untrusted files: a regular file of limited size, with an object without duplicate keys."""

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import FileError

JSON_LIMIT = 100 * 2**20  # bytes; an index of a million tensors stays below it


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice!r} appears twice")
    return table


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """UTF-8 bytes -> dict; FileError naming `where` for anything else."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise FileError(f"{where}: the JSON is nested too deeply; the file is damaged or hostile") from error
    except ValueError as error:
        raise FileError(f"{where}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise FileError(f"{where}: expected a JSON object, found {type(value).__name__}; wrong file?")
    return value


def read_json_object(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """A JSON file of at most `limit` bytes -> dict; FileError otherwise."""
    size = regular_size(path)
    if size > limit:
        raise FileError(f"{path}: {size} bytes, the limit for a JSON file is {limit}; wrong file?")
    try:
        with path.open("rb") as file:
            return parse_json_object(file.read(size), str(path))
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


def regular_size(path: Path) -> int:
    """Size in bytes; FileError for a missing file, or a pipe or device that could be read forever."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path}: cannot be read: not a regular file")
    return status.st_size
