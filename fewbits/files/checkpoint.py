"""Checkpoint: a lazy, mapped view of a model's files. Nothing is read before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..qtensor import QTensor


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a checkpoint, not yet read.

    `dtype` is the stored float type's name (`bf16`, `f32` ...) or the quantized format's name.
    `load()` maps the bytes and returns a float tensor, or a QTensor for a quantized one; the
    mapping is released with the returned value.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: str
    load: Callable[[], torch.Tensor | QTensor] = field(repr=False)
    quantized: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A model as it lies on disk, in Hugging Face names and layouts whatever the file type.

    config: the Hugging Face config.json (rebuilt from metadata for a GGUF file).
    side_files: tokenizer, chat template, generation config, license: name -> path.
    metadata: what the file type itself carries (GGUF keys and values; `{}` otherwise).
    provenance: reference, file type, files with sizes: what a receipt says of the input.
    """

    path: Path
    kind: str  # "huggingface" | "gguf" | "native"
    tensors: Mapping[str, LazyTensor]
    config: dict[str, Any]
    side_files: Mapping[str, Path] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
