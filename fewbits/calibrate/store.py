"""The statistics of a whole model in one file, read group by group on demand.

    safetensors
    | header | __metadata__: model, source, tokens, knows, sites {site: key}, unseen, notes  (JSON)      |
    | <key>.count        ()             i64   tokens that reached these sites                            |
    | <key>.absmax       (k,)           f32                                                              |
    | <key>.mean_square  (k,)           f32                                                              |
    | <key>.hessian      (k(k + 1)/2,)  f32   rows of the upper triangle, one after the other: it is     |
    |                                         symmetric, so the rest is its mirror                       |

Sites that read one activation are stored once. Mismatch depends on the quantized prefix, so it is not stored.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CalibrationError, FileError, raise_all
from ..files.checkpoint import Checkpoint
from ..storage.atomic import as_bytes, write_file_atomic
from ..storage.json import parse_json_object
from ..storage.safetensors import Entry, lay_out, map_tensor, read_header, read_metadata
from .statistics import FIELDS, RECENT, LazyStats, ModelIdentity, Statistics, check_model, value_faults
from .stats import Stats

KIND, VERSION = "fewbits.statistics", "1"  # the metadata's key and its value
_DTYPES = {"count": "I64"} | dict.fromkeys(FIELDS, "F32")
_PANEL = 256  # rows of a triangle that are written at once


def save_statistics(statistics: Statistics, path: Path, overwrite: bool = False) -> None:
    """Write one file atomically, a group at a time.

    FileError: another file is in the way, or writing fails.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileError(f"{path}: exists; choose another output or pass overwrite")
    rows = []
    for key, group in statistics.groups.items():
        shapes = _shapes(group.columns, statistics.knows)
        rows += [(f"{key}.{field}", _DTYPES[field], shape) for field, shape in shapes.items()]
    about = asdict(replace(statistics, groups={})) | {"knows": sorted(statistics.knows)}
    del about["groups"], about["digest"]
    header, _ = lay_out(rows, {KIND: VERSION, "about": json.dumps(about)})
    write_file_atomic(path, itertools.chain([header], _data(statistics)))


def _data(statistics: Statistics) -> Iterator[memoryview]:
    """The bytes after the header."""
    for group in statistics.groups.values():
        stats = group.load("hessian" in statistics.knows)
        for field in _shapes(group.columns, statistics.knows):
            yield from map(as_bytes, _chunks(stats, field))


def _shapes(columns: int, knows: frozenset[str]) -> dict[str, tuple[int, ...]]:
    """The arrays of one group and their shapes, in file order."""
    shapes: dict[str, tuple[int, ...]] = {"count": (), "absmax": (columns,), "mean_square": (columns,)}
    shapes["hessian"] = (columns * (columns + 1) // 2,)
    return {field: shape for field, shape in shapes.items() if field == "count" or field in knows}


def _chunks(stats: Stats, field: str) -> Iterator[torch.Tensor]:
    value = getattr(stats, field)
    if field == "count":
        yield torch.tensor(value, dtype=torch.int64)
    elif field == "hessian":
        value = value.float().cpu()
        k = stats.columns
        for start in range(0, k, _PANEL):
            yield torch.cat([value[row, row:] for row in range(start, min(k, start + _PANEL))])
    else:
        yield value.float().cpu()


def _square(upper: torch.Tensor, k: int) -> torch.Tensor:
    """`(k(k + 1)/2,)` -> `(k, k)`, symmetric."""
    whole, start = upper.new_zeros(k, k), 0
    for row in range(k):
        whole[row, row:] = upper[start : start + k - row]
        start += k - row
    for row in range(0, k, _PANEL):
        end = row + _PANEL
        corner = whole[row:end, row:end]
        corner += corner.triu(1).T
        whole[end:, row:end] = whole[row:end, end:].T
    return whole


def load_statistics(path: Path, checkpoint: Checkpoint | None = None) -> Statistics:
    """A file of `save_statistics`, mapped: groups are read on demand.

    Raises FileError: not such a file, truncated, hostile. CalibrationError: of another model than the
    checkpoint's; and, when a group is read, values that are not finite.
    """
    path = Path(path)
    entries = read_header(path)
    about = _about(path)
    arrays: dict[str, dict[str, Entry]] = {}
    groups, expected, faults = {}, set(), []
    read = lru_cache(RECENT)(lambda key, hessian: _read(path, key, arrays[key], hessian))
    for key in (name.removesuffix(".count") for name in entries if name.endswith(".count")):
        given = entries.get(f"{key}.mean_square")
        columns = given.shape[0] if given is not None and len(given.shape) == 1 else 0
        fields = {}
        for field, shape in _shapes(columns, frozenset(about["knows"])).items():
            entry = entries.get(f"{key}.{field}")
            if columns < 1 or entry is None or (entry.dtype, entry.shape) != (_DTYPES[field], shape):
                is_ = f"{entry.dtype} {entry.shape}" if entry else "missing"
                faults.append(f"{key}.{field} is {is_}, {_DTYPES[field]} {shape} is needed")
            else:
                fields[field] = entry
            expected.add(f"{key}.{field}")
        arrays[key], groups[key] = fields, LazyStats(columns, partial(read, key))
    faults += [f"tensor {name!r} belongs to no group" for name in entries if name not in expected]
    faults += [f"site {site!r} has no group {key!r}" for site, key in about["sites"].items()
               if key not in groups]  # fmt: skip
    raise_all(FileError, str(path), faults)
    model = ModelIdentity(**about["model"])
    statistics = Statistics(
        model, about["source"], about["tokens"], groups, about["sites"], frozenset(about["knows"]),
        tuple(about["unseen"]), tuple(about["notes"]),
    )  # fmt: skip
    if checkpoint is not None:
        check_model(statistics, checkpoint)
    return statistics


def _read(path: Path, key: str, entries: Mapping[str, Entry], hessian: bool) -> Stats:
    arrays = {name: map_tensor(path, e) for name, e in entries.items() if hessian or name != "hessian"}
    mean_square, upper = arrays["mean_square"], arrays.get("hessian")
    stats = Stats(
        int(arrays["count"]),
        arrays.get("absmax"),
        mean_square,
        None if upper is None else _square(upper, mean_square.shape[0]),
    )
    raise_all(CalibrationError, f"{path}: statistics of {key}", value_faults(stats))
    return stats


def _about(path: Path) -> dict[str, Any]:
    """The metadata of a file, with types checked."""
    given = read_metadata(path)
    if given.get(KIND) != VERSION:
        raise FileError(
            f"{path}: {KIND} is {given.get(KIND)!r}, {VERSION!r} is read; not a file of statistics, or of "
            "another version of fewbits: calibrate again"
        )
    about = parse_json_object(given.get("about", "").encode(), f"{path}: about")
    tests: dict[str, Callable[[Any], bool]] = {
        "model": lambda v: isinstance(v, dict) and set(v) == {"name", "architecture", "digest"} and _texts(v),
        "source": lambda v: isinstance(v, str),
        "tokens": lambda v: type(v) is int and v >= 0,
        "knows": lambda v: isinstance(v, list) and _texts(v) and {"mean_square"} <= set(v) <= set(FIELDS),
        "sites": lambda v: isinstance(v, dict) and _texts(v),
        "unseen": lambda v: isinstance(v, list) and _texts(v),
        "notes": lambda v: isinstance(v, list) and _texts(v),
    }
    faults = [f"{field} is {str(about.get(field))[:60]!r}" for field, right in tests.items()
              if not right(about.get(field))]  # fmt: skip
    raise_all(FileError, f"{path}: the metadata are damaged, calibrate again", faults)
    return about


def _texts(value: list[Any] | dict[str, Any]) -> bool:
    return all(isinstance(item, str) for item in (value.values() if isinstance(value, dict) else value))
