"""The file from which a killed training run goes on: tensors, a record, and a digest of what decides the
run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..dtypes import dtype_of
from ..errors import FileError
from ..storage.atomic import as_bytes, write_file_atomic
from ..storage.safetensors import lay_out


def write_state(
    path: Path, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any], fingerprint: str
) -> None:
    """Write it as safetensors, atomically, tensor by tensor: together they may be half of what is in memory.
    record: as JSON has it."""
    rows = ((name, dtype_of(value.dtype).name, tuple(value.shape)) for name, value in tensors.items())
    header, _ = lay_out(rows, {"record": json.dumps(record), "fingerprint": fingerprint})
    write_file_atomic(path, chain([header], (as_bytes(value.cpu()) for value in tensors.values())))


def read_state(path: Path, fingerprint: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """-> tensors, record. FileError for a file that is damaged or of another run."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{path}: not the state of a training run ({error}); delete it to start again"
        ) from error
    if about.get("fingerprint") != fingerprint:
        raise FileError(f"{path}: of a run with another model, text or settings; delete it to start again")
    return state, json.loads(about["record"])


def moments_of(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The optimizer's own tensors: optimizer.NUMBER.NAME."""
    found = {}
    for i, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            number = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            found[f"optimizer.{i}.{key}"] = number
    return found


def put_back(optimizer: torch.optim.Optimizer, moments: Mapping[str, torch.Tensor]) -> None:
    """What `moments_of` gave, into an optimizer of the same parameters in the same groups."""
    held: dict[int, dict[str, Any]] = {}
    for name, value in moments.items():
        _, i, key = name.split(".", 2)
        counted = value.ndim == 0 and not value.is_floating_point()  # a plain number in bitsandbytes
        held.setdefault(int(i), {})[key] = int(value) if counted else value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": held, "param_groups": groups})
