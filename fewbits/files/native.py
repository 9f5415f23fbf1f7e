"""The native directory: any format, every plane as it is, and all a model needs besides.

    fewbits.json        {"version": 1, "tensors": {"model.layers.0.mlp.up_proj.weight":
                          {"format": "int4_g128", "shape": [n, k]}, ...}, ...}
    model.safetensors   planes as `<tensor>.<plane>`, tensors left in float under their own name
    config.json, tokenizer.json, ...

fewbits.json is written last: a directory that has it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import FileError, FormatError, raise_all
from ..formats.base import FORMATS, Format
from ..qtensor import QTensor
from .atomic import write_atomic
from .base import Checkpoint, LazyTensor
from .huggingface import describe_files, find_side_files, lazy_tensor
from .json_object import read_json_object
from .safetensors import DTYPE_NAMES, DTYPES, Entry, lay_out, map_tensor, read_header
from .stream import Span

VERSION = 1
INDEX = "fewbits.json"
WEIGHTS = "model.safetensors"


def native_layout(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[Span]]:
    """`(name, format or float dtype, shape)` in order -> header of model.safetensors and its entries.

    A dtype name (`bf16`, `f32` ...) lays the tensor out under its own name; any other name is a
    format, laid out as one entry `<tensor>.<plane>` for each plane, in the format's order.
    """
    rows: list[tuple[str, str, tuple[int, ...]]] = []
    faults: list[str] = []
    for name, kind, shape in tensors:
        if kind.upper() in DTYPES:
            rows.append((name, kind, shape))
            continue
        if len(shape) != 2:
            faults.append(f"tensor {name!r}: {kind} holds (n, k) weights, not {shape}")
            continue
        for plane in FORMATS.get(kind).planes:
            rows.append((f"{name}.{plane.name}", DTYPE_NAMES[plane.dtype], plane.shape(*shape)))
    raise_all(FileError, WEIGHTS, faults)
    header, entries = lay_out(rows, metadata)
    return header, [Span(entry.name, entry.offset, entry.nbytes) for entry in entries]


def native_index(tensors: Iterable[tuple[str, str, tuple[int, ...]]], about: Mapping[str, Any]) -> bytes:
    """The bytes of fewbits.json for the tensors given to `native_layout`; `about` is added as it is."""
    rows = {
        name: {"format": kind, "shape": list(shape)}
        for name, kind, shape in tensors
        if kind.upper() not in DTYPES
    }
    return json.dumps({"version": VERSION, **about, "tensors": rows}, indent=1).encode() + b"\n"


def write_side_files(checkpoint: Checkpoint, files: Mapping[str, Path | bytes], directory: Path) -> None:
    """Write the checkpoint's config.json, and `files` (paths are copied), into `directory`."""
    config = json.dumps(checkpoint.config, indent=2, ensure_ascii=False)
    write_atomic(directory / "config.json", config.encode() + b"\n")
    for name, source in files.items():
        try:
            data = source if isinstance(source, bytes) else source.read_bytes()
        except OSError as error:
            raise FileError(f"{source!s}: cannot be read: {error.strerror}") from error
        write_atomic(directory / name, data)


def open_native(path: Path) -> Checkpoint:
    """A native directory -> Checkpoint; all that disagrees between index and planes in one FileError."""
    path = Path(path)
    index = read_json_object(path / INDEX)
    rows = index.get("tensors")
    if index.get("version") != VERSION or not isinstance(rows, dict):
        raise FileError(
            f"{path / INDEX}: version {str(index.get('version'))[:40]}, this program reads {VERSION}; "
            "use the fewbits that wrote it"
        )
    config = read_json_object(path / "config.json")
    weights = path / WEIGHTS
    return Checkpoint(
        path,
        "native",
        indexed_tensors(weights, rows),
        config,
        side_files=find_side_files(path),
        metadata={key: value for key, value in index.items() if key != "tensors"},
        provenance=describe_files(path, "native", [path / INDEX, path / "config.json", weights]),
    )


def _format_and_shape(name: str, row: Any, faults: list[str]) -> tuple[Format, tuple[int, int]] | None:
    """What one row of the index says; or None, with what is wrong appended to `faults`."""
    shape: Any = row.get("shape") if isinstance(row, dict) else None
    form: Any = row.get("format") if isinstance(row, dict) else None
    whole = isinstance(shape, list) and all(type(size) is int and 0 < size < 2**63 for size in shape)
    if not whole or len(shape) != 2 or not isinstance(form, str):
        faults.append(f"tensor {name!r}: {str(row)[:80]} is not a format and a shape [n, k]")
        return None
    try:
        found = FORMATS.get(form)
        found.check_shape(shape[0], shape[1], name)
    except FormatError as error:
        faults.append(f"tensor {name!r}: {error}")
        return None
    return found, (shape[0], shape[1])


def indexed_tensors(weights: Path, rows: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """A safetensors file of planes and the index of its quantized tensors -> all its tensors, mapped.

    rows: name -> {"format", "shape"}; what they do not claim is float. FileError with every disagreement.
    """
    planes = read_header(weights)
    faults: list[str] = []
    tensors: dict[str, LazyTensor] = {}
    for name, row in rows.items():
        found = _quantized_tensor(weights, name, row, planes, faults)
        if found:
            tensors[name] = found
        if name in planes:
            faults.append(f"tensor {name!r} stands there both quantized and in float; write it anew")
    raise_all(FileError, str(weights), faults)
    claimed = {f"{name}.{plane.name}" for name in rows for plane in FORMATS.get(tensors[name].dtype).planes}
    return tensors | {
        name: lazy_tensor(weights, entry) for name, entry in planes.items() if name not in claimed
    }


def _quantized_tensor(
    weights: Path, name: str, row: Any, planes: Mapping[str, Entry], faults: list[str]
) -> LazyTensor | None:
    """One row of the index, checked against its planes -> LazyTensor; or None and `faults`."""
    said = _format_and_shape(name, row, faults)
    if said is None:
        return None
    form, shape = said
    parts: dict[str, Entry] = {}
    for plane in form.planes:
        entry = planes.get(f"{name}.{plane.name}")
        needed = (DTYPE_NAMES[plane.dtype], plane.shape(*shape))
        if entry is None:
            faults.append(f"tensor {name!r}: plane {plane.name!r} is missing")
        elif (entry.dtype, entry.shape) != needed:
            faults.append(
                f"tensor {name!r}: plane {plane.name!r} is {entry.dtype} {entry.shape}, "
                f"{form.name} {shape} needs {needed[0]} {needed[1]}"
            )
        else:
            parts[plane.name] = entry
    if len(parts) < len(form.planes):
        return None
    nbytes = sum(entry.nbytes for entry in parts.values())
    load = partial(_load, weights, form, shape, parts)
    return LazyTensor(name, shape, form.name, nbytes, weights.name, load, quantized=True)


def _load(weights: Path, form: Format, shape: tuple[int, int], parts: Mapping[str, Entry]) -> QTensor:
    return QTensor(form, shape, {name: map_tensor(weights, entry) for name, entry in parts.items()})
