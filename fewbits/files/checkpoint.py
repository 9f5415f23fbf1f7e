"""Checkpoint: a lazy, memory-mapped view of a model's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.base import Format, Kind
from ..model.sites import Seen, text_config
from ..qtensor import QTensor

if TYPE_CHECKING:
    import torch

    from .filetype import FileType
    from .gguf.parse import GGUFValue


MEMORY = "memory"  # in place of a file, for tensors that are in none


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a checkpoint, not yet read.

    kind: its number type or quantized format. `load()` maps the bytes and returns a
    float tensor, or a QTensor for a quantized one; the mapping is released with the returned value.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    nbytes: int
    file: str
    load: Callable[[], torch.Tensor | QTensor] = field(repr=False)

    @property
    def quantized(self) -> bool:
        return isinstance(self.kind, Format)

    @property
    def dtype(self) -> str:
        """The name of its kind."""
        return self.kind.name


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, with Hugging Face names and layouts for every file type.

    config: the Hugging Face config.json (rebuilt from the keys of a GGUF file).
    side_files: tokenizer, chat template, generation config, license: name -> path.
    metadata: other fields of the file: activations, kv_cache, unread, and those of fewbits in a native
    directory. gguf_keys: keys and typed values of a GGUF file. mixture: llama.cpp's number of its
    file type. provenance: reference, file type, files with sizes, for the receipt. aside: tensors that are
    not the model's, kept as they are. notes: for the receipt. as_loaded: whether transformers was asked for
    names, ties and defaults (`adapters/as_loaded.py`). graph: what its class computes, as an ONNX graph (a
    ModelProto) without weights; None of a model that generates text (`adapters/exported.py`).
    seen: what the class's modules say of each tensor.
    """

    path: Path
    file_type: FileType
    tensors: Mapping[str, LazyTensor]
    config: dict[str, Any]
    side_files: Mapping[str, Path] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    gguf_keys: Mapping[str, GGUFValue] = field(default_factory=dict)
    mixture: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    aside: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    as_loaded: bool = False
    graph: Callable[[], Any] = field(default=lambda: None, repr=False)
    seen: Mapping[str, Seen] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Numbers in all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in their files."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The fields of config that are the language model's."""
        return text_config(self.config)
