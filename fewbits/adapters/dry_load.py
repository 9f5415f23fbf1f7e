"""dry_load(): what transformers' own loader says of a directory before a byte of it is written.

The loader gets the directory's config and its tensors on the meta device, which have shapes and no values.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from ..errors import ModelError
from ..files.checkpoint import Checkpoint
from .transformers import empty_model, model_class, model_config, quiet


@dataclass(frozen=True)
class Reading:
    """missing, unexpected: keys of the model and of the directory that have no counterpart. tied: keys that
    are copies of others. failed: what the loader raised."""

    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    failed: str = ""


def dry_load(
    checkpoint: Checkpoint, quantization: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> Reading | None:
    """quantization: the config's quantization_config. tensors: on the meta device. None for a GGUF file, and
    where transformers lacks the model's class, accelerate or a package for this quantization."""
    if not checkpoint.config or checkpoint.gguf_keys or find_spec("accelerate") is None:
        return None
    try:
        config = model_config(checkpoint)
        cls = model_class(checkpoint, config)
    except ModelError:
        return None
    config.quantization_config = dict(quantization)
    try:
        with quiet(), redirect_stderr(io.StringIO()):  # compressed-tensors has progress bars of its own
            _, info = cls.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=torch.float32,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except ImportError:
        return None
    except Exception as error:  # noqa: BLE001 - whatever transformers raises is its answer
        tied = frozenset(empty_model(checkpoint).all_tied_weights_keys)
        return Reading(tied=tied, failed=f"{type(error).__name__}: {error}")
    missing = {*info["missing_keys"], *(row[0] for row in info["mismatched_keys"])}
    return Reading(frozenset(missing), frozenset(info["unexpected_keys"]))
