"""The native directory: any format, every plane unchanged, and all other files of a model.

    fewbits.json        {"version": 1, "tensors": {"model.layers.0.mlp.up_proj.weight":
                          {"format": "int4_g128", "shape": [n, k]}, ...}, ...}
    model.safetensors   planes as `<tensor>.<plane>`, float tensors under their own name
    config.json         {..., "quantization_config": {"quant_method": "fewbits", "version": 1,
                          "formats": {"int4_g128": {"model.layers.0.mlp.up_proj.weight": [n, k], ...}, ...}}}
    tokenizer.json, ...

fewbits.json is written last: a directory that has it is complete. quantization_config has the same data for
transformers. A directory that transformers saved has only quantization_config, and opens as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FileError, FormatError
from ..formats.base import FORMATS, Format
from ..lazy import torch
from ..qtensor import QTensor
from ..storage.json import read_json_object
from ..storage.packed import found_at
from ..storage.safetensors import read_header
from .checkpoint import Checkpoint, LazyTensor
from .directory import (
    Array,
    Directory,
    FloatEntry,
    Place,
    QuantizedEntry,
    Shape,
    Stored,
    open_tensors,
)
from .filetype import Probe
from .output import planes_of
from .side_files import describe_files, find_side_files

VERSION = 1
METHOD = "fewbits"
INDEX = "fewbits.json"
WEIGHTS = "model.safetensors"


class Native(Directory):
    """Supports every format, in any mixture."""

    name = "native"
    engines = ("transformers+fewbits",)
    run = "import fewbits.transformers; AutoModelForCausalLM.from_pretrained({name!r})"
    method = METHOD
    tables = True
    marks = (INDEX,)

    def recognizes(self, probe: Probe) -> bool:
        return probe.has(INDEX) or super().recognizes(probe)

    def open(self, path: Path) -> Checkpoint:
        return open_native(path) if (path / INDEX).is_file() else super().open(path)

    def with_runtime(self, activations: str | None = None, kv_cache: str | None = None) -> Native:
        return self

    def reason(self, format: Format) -> str | None:
        return None

    def arrays(self, name: str, format: Format, shape: Shape) -> list[Array]:
        return [Array(f"{name}.{plane.name}", plane.type, plane.shape(*shape)) for plane in format.planes]

    def pack(self, q: QTensor) -> tuple[torch.Tensor, ...]:
        return planes_of(q)

    def unpack(self, format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
        names = [plane.name for plane in format.planes]
        return QTensor(format, shape, dict(zip(names, arrays, strict=True)))

    def settings(
        self, rows: Mapping[str, Stored], config: Mapping[str, Any], about: Mapping[str, Any]
    ) -> dict[str, Mapping[str, Any]]:
        quantized = {
            name: {"format": kind.name, "shape": list(shape)}
            for name, (kind, shape) in rows.items()
            if isinstance(kind, Format)
        }
        known = {**config, "quantization_config": quantization_config(rows)} if quantized else config
        return {"config.json": known, INDEX: {"version": VERSION, **about, "tensors": quantized}}

    def find(
        self, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> dict[str, QuantizedEntry | FloatEntry]:
        """config: {"tensors": the rows of fewbits.json}, or the quantization_config of config.json."""
        rows = config["tensors"] if "tensors" in config else _rows(config, faults)
        entries = {name: _entry(name, row, faults) for name, row in rows.items()}
        return {name: entry for name, entry in entries.items() if entry is not None}


NATIVE = Native()


def quantization_config(rows: Mapping[str, Stored]) -> dict[str, Any]:
    """quantization_config of config.json for the quantized ones of these tensors."""
    return {"quant_method": METHOD, "version": VERSION, "formats": named_formats(rows)}


def named_formats(rows: Mapping[str, Stored]) -> dict[str, dict[str, list[int]]]:
    """Tensors -> format -> {tensor: [n, k]}, the quantized ones."""
    formats: dict[str, dict[str, list[int]]] = {}
    for name, (kind, shape) in rows.items():
        if isinstance(kind, Format):
            formats.setdefault(kind.name, {})[name] = list(shape)
    return formats


def _rows(settings: Mapping[str, Any], faults: list[str]) -> dict[str, dict[str, Any]]:
    """quantization_config -> rows of fewbits.json."""
    formats = settings.get("formats")
    if settings.get("version") != VERSION or not isinstance(formats, dict):
        faults.append(
            f"quantization_config has version {str(settings.get('version'))[:40]}, this program reads "
            f"{VERSION} with its formats; use the fewbits that wrote it"
        )
        return {}
    rows: dict[str, dict[str, Any]] = {}
    for kind, tensors in formats.items():
        if not isinstance(tensors, dict):
            faults.append(f"quantization_config: {str(tensors)[:80]} are not tensors of {kind!r} and shapes")
            continue
        faults += [
            f"tensor {name!r} is {kind} and {rows[name]['format']}" for name in tensors if name in rows
        ]
        rows |= {name: {"format": kind, "shape": shape} for name, shape in tensors.items()}
    return rows


def open_native(path: Path) -> Checkpoint:
    """A native directory -> Checkpoint; FileError with every disagreement of index and planes."""
    path = Path(path)
    index = read_json_object(path / INDEX)
    if index.get("version") != VERSION or not isinstance(index.get("tensors"), dict):
        raise FileError(
            f"{path / INDEX}: version {str(index.get('version'))[:40]}, this program reads {VERSION}; "
            "use the fewbits that wrote it"
        )
    config = read_json_object(path / "config.json")
    config.pop("quantization_config", None)
    weights = found_at(path / WEIGHTS)
    return Checkpoint(
        path,
        NATIVE,
        indexed_tensors(weights, index["tensors"]),
        config,
        side_files=find_side_files(path),
        metadata={key: value for key, value in index.items() if key != "tensors"},
        mixture=mixture if isinstance(mixture := index.get("file_type"), int) else None,
        provenance=describe_files(path, "native", [path / INDEX, path / "config.json", weights]),
    )


def indexed_tensors(weights: Path, rows: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """A safetensors file of planes and the index of its quantized tensors -> all its tensors, mapped.

    rows: name -> {"format", "shape"}; other tensors are float. FileError with every disagreement.
    """
    places = {name: Place(weights, entry) for name, entry in read_header(weights).items()}
    return open_tensors(NATIVE, {"tensors": rows}, places, weights)


def _entry(name: str, row: Any, faults: list[str]) -> QuantizedEntry | None:
    """One row of the index; or None, with the fault appended to `faults`."""
    shape: Any = row.get("shape") if isinstance(row, dict) else None
    form: Any = row.get("format") if isinstance(row, dict) else None
    whole = isinstance(shape, list) and all(type(size) is int and 0 < size < 2**63 for size in shape)
    if not whole or len(shape) != 2 or not isinstance(form, str):
        faults.append(f"tensor {name!r}: {str(row)[:80]} is not a format and a shape [n, k]")
        return None
    try:
        format = FORMATS.get(form)
        format.check_shape(shape[0], shape[1], name)
    except FormatError as error:
        faults.append(f"tensor {name!r}: {error}")
        return None
    return QuantizedEntry(format, (shape[0], shape[1]))
