"""Models in GGUF files, in Hugging Face names and layouts.

    blk.3.attn_q.weight       ->  model.layers.3.self_attn.q_proj.weight        rows in the original order
    blk.3.ffn_up_exps.weight  ->  ...mlp.experts.E.up_proj.weight, (n, k) each  rows e*n : (e+1)*n
    output_norm.weight        ->  model.norm.weight                             minus 1 (gemma)

Nothing is read before `LazyTensor.load()`, which maps only that tensor's bytes. The map of names is the
inverse of `model.archs.gguf_entries`. An unknown architecture keeps its GGUF names, experts one weight each
(`blk.3.ffn_up_exps.experts.E.weight`), and has an empty config: it is quantized without text, not evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf.constants import Keys

from ...errors import FileError, ModelError, raise_all
from ...formats.base import FORMATS, kind_of
from ...formats.ggml import format_of
from ...lazy import torch
from ...model.archs import Architecture, GGUFEntry, every_name, gguf_entries, rope_rows_back
from ...model.archs import own_names as pieces
from ...qtensor import QTensor
from ..checkpoint import Checkpoint, LazyTensor
from ..side_files import describe_files
from .file import PLAIN_TYPES, GGUFFile, GGUFTensor, map_gguf_tensor, read_gguf
from .metadata import architecture_of, config_from_keys

_FACTORS = {
    "rope_freqs.weight": "freqs",
    "rope_factors_long.weight": "long",
    "rope_factors_short.weight": "short",
}


def open_gguf(path: Path, own_names: bool = False) -> Checkpoint:
    """A GGUF file, or any part of a split one -> Checkpoint. own_names: as of an unknown architecture."""
    from .filetype import GGUF_FILE

    file = read_gguf(Path(path))
    plain = file.metadata
    arch = None if own_names else architecture_of(plain)
    factors = {_FACTORS[name]: _read_factors(t) for name, t in file.tensors.items() if name in _FACTORS}
    if arch is None:
        tensors: dict[str, LazyTensor] = {}
        for name, tensor in file.tensors.items():
            tensors |= _sources(tensor, GGUFEntry(name, pieces(name, tensor.shape)))
        config: dict[str, Any] = {}
    else:
        try:
            config = config_from_keys(plain, arch, factors, set(file.tensors))
        except ModelError as error:
            raise ModelError(f"{file.path}: {error}") from error
        tensors = _tensors(file, arch, config)
    return Checkpoint(
        path=file.path,
        file_type=GGUF_FILE,
        tensors=tensors,
        config=config,
        gguf_keys=dict(file.values),
        mixture=mixture if isinstance(mixture := plain.get(Keys.General.FILE_TYPE), int) else None,
        provenance=describe_files(file.path, "gguf", list(file.files))
        | {"architecture": plain.get(Keys.General.ARCHITECTURE), "version": file.version},
    )


def _read_factors(tensor: GGUFTensor) -> tuple[float, ...]:
    if tensor.type_name not in PLAIN_TYPES:
        raise FileError(
            f"{tensor.file}: {tensor.name!r} is {tensor.type_name}, rotary factors are plain floats"
        )
    return tuple(map_gguf_tensor(tensor).float().flatten().tolist())


def _tensors(file: GGUFFile, arch: Architecture, config: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Every tensor of the file under its Hugging Face name; ModelError lists every mismatch."""
    loose = {**config, "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default"}}
    entries = {entry.name: entry for entry in gguf_entries(arch, loose, every_name(arch, config))}
    tensors: dict[str, LazyTensor] = {}
    faults = []
    for name, tensor in file.tensors.items():
        if name in _FACTORS:
            continue
        entry = entries.get(name)
        if entry is None:
            faults.append(f"tensor {name!r} is not one of architecture {arch.gguf} ({arch.name})")
        elif len(entry.sources) > 1 and (len(tensor.shape) != 3 or tensor.shape[0] != len(entry.sources)):
            faults.append(f"tensor {name!r} is {tensor.shape}, ({len(entry.sources)}, n, k) is needed")
        else:
            tensors |= _sources(tensor, entry)
    raise_all(ModelError, str(file.path), faults)
    return tensors


def _sources(tensor: GGUFTensor, entry: GGUFEntry) -> dict[str, LazyTensor]:
    """One GGUF tensor -> its Hugging Face tensors."""
    if len(entry.sources) == 1:
        return {entry.sources[0]: _lazy(tensor, entry.sources[0], _restored(_whole(tensor), entry))}
    n = tensor.shape[1]
    return {
        name: replace(
            _lazy(tensor, name, _rows(tensor, slice(e * n, (e + 1) * n))),
            shape=tensor.shape[1:],
            nbytes=tensor.nbytes // len(entry.sources),
        )
        for e, name in enumerate(entry.sources)
    }


def _lazy(tensor: GGUFTensor, name: str, load: Callable[[], torch.Tensor | QTensor]) -> LazyTensor:
    return LazyTensor(
        name=name,
        shape=tensor.shape,
        kind=kind_of(format_of(tensor.type_name)),
        nbytes=tensor.nbytes,
        file=tensor.file.name,
        load=load,
    )


def _whole(tensor: GGUFTensor) -> Callable[[], torch.Tensor | QTensor]:
    if tensor.type_name in PLAIN_TYPES:
        return lambda: map_gguf_tensor(tensor)
    return _rows(tensor, None)


def _rows(tensor: GGUFTensor, rows: slice | None) -> Callable[[], torch.Tensor | QTensor]:
    def load() -> torch.Tensor | QTensor:
        if tensor.type_name in PLAIN_TYPES:
            return map_gguf_tensor(tensor, rows)
        blocks = map_gguf_tensor(tensor, rows)
        return QTensor(
            FORMATS.get(format_of(tensor.type_name)), (blocks.shape[0], tensor.shape[-1]), {"blocks": blocks}
        )

    return load


def _restored(
    load: Callable[[], torch.Tensor | QTensor], entry: GGUFEntry
) -> Callable[[], torch.Tensor | QTensor]:
    """Undo the entry's changes: row order, then the added constant."""
    if entry.rows is None and entry.add == 0.0:
        return load

    def restored() -> torch.Tensor | QTensor:
        value = load()
        if entry.rows == "rope":
            order = rope_rows_back(value.shape[0], entry.heads)
            value = value.take_rows(order) if isinstance(value, QTensor) else value[order]
        if entry.add:
            value = (value.decode() if isinstance(value, QTensor) else value.float()) - entry.add
        return value

    return restored
