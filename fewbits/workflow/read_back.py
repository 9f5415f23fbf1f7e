"""read_back(): what transformers' own loader cannot read is refused before it is written."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import replace
from pathlib import Path

import torch

from ..adapters.dry_load import Reading, dry_load
from ..dtypes import DTYPES
from ..errors import FormatError
from ..files.checkpoint import Checkpoint
from ..files.directory import module_of
from ..files.output import Output
from ..formats.base import Format
from .resolve import Resolved


def read_back(checkpoint: Checkpoint, resolved: Resolved) -> Resolved:
    """The same, with the modules named that the loader would take for quantized ones. FormatError with the
    loader's answer where it reads the directory otherwise than it was meant."""
    if not resolved.file_type.asks_loader:
        return resolved
    reading: Reading | None = None
    for _ in range(3):
        output = resolved.lay_out(checkpoint, Path("output"))
        quantization = output.config.get("quantization_config")
        reading = dry_load(checkpoint, quantization, _tensors(output)) if quantization else None
        if reading is not None:  # what the class does not have is in the input too
            reading = replace(reading, unexpected=reading.unexpected - checkpoint.aside)
        if reading is None or not (reading.failed or _weights(reading.missing | reading.unexpected)):
            return resolved
        floats = {module_of(name) for name in reading.unexpected if name.endswith(".weight")}
        taken = {key.rpartition(".")[0] for key in reading.missing} & floats
        taken |= {module_of(key) for key in reading.tied if key.endswith(".weight")}
        if reading.failed:
            taken |= _named_otherwise(checkpoint, resolved)
        if taken <= {*resolved.unquantized}:
            break
        resolved = replace(resolved, unquantized=(*resolved.unquantized, *sorted(taken)))
    assert reading is not None
    keys = [f"{name} is not in it" for name in _weights(reading.missing)[:1]]
    keys += [f"{name} is not one of the class" for name in _weights(reading.unexpected)[:1]]
    where = resolved.file_type.where.format(name=resolved.file_type.name)
    raise FormatError(
        f"{checkpoint.path}: transformers does not read {where} of this model as it is meant: "
        f"{reading.failed or '; '.join(keys)}; take --file native"
    )


def _named_otherwise(checkpoint: Checkpoint, resolved: Resolved) -> set[str]:
    """The modules in float that the class names otherwise than the files."""
    decisions = resolved.by_output(checkpoint)
    return {
        seen.module
        for name, seen in checkpoint.seen.items()
        if name in decisions and not isinstance(decisions[name].kind, Format)
        if name.endswith(".weight") and module_of(name) != seen.module
        if len(checkpoint.tensors[name].shape) == 2
    }


def _weights(names: Set[str]) -> list[str]:
    """The names, but for those of zero points, which this loader takes only with `dequantize=True`, and of
    the steps of inputs and caches, which other engines read."""
    return sorted(
        name for name in names if not name.endswith(("_zero_point", "k_scale", "v_scale", "input_scale"))
    )


def _tensors(output: Output) -> dict[str, torch.Tensor]:
    """The arrays of an output, on the meta device."""
    found = json.loads(output.header[8:])
    return {
        name: torch.empty(row["shape"], dtype=DTYPES[row["dtype"].lower()].torch, device="meta")
        for name, row in found.items()
        if name != "__metadata__"
    }
