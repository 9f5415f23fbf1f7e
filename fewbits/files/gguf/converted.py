"""A model under the names of llama.cpp's own float GGUF: where each of its rows comes from.

llama.cpp's converter permutes heads, stacks experts, splits and joins weights. Groups of a format run along
rows, so whatever it did to whole rows can be done to codes:

    row i of blk.3.attn_qkv.weight  --its bits as f32-->  row 7 of model.layers.3.self_attn.q_proj.weight
    the rows of a tensor            --runs of one source-->  parts (source, rows), gathered and joined

Equal rows of several sources (padded vocabularies, a tied output) are told apart by the names of the gguf
package. A tensor with a row that is nowhere in the model (transposed, computed) keeps the file's values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import Keys

from ...dtypes import F32
from ...formats.base import Format
from ...lazy import torch
from ...qtensor import QTensor
from ..checkpoint import Checkpoint, LazyTensor
from .metadata import u32
from .model import open_gguf

PIECE = 2**22  # weights that are hashed or compared at once


@dataclass(frozen=True)
class Part:
    """Successive rows of a GGUF tensor: rows of one tensor of the model."""

    source: str
    rows: torch.Tensor


@dataclass(frozen=True)
class Converted:
    """floats: llama.cpp's float file, under its own names. parts: of each tensor that was found."""

    floats: Checkpoint
    parts: Mapping[str, tuple[Part, ...]]

    def sources(self, name: str) -> tuple[str, ...]:
        """The tensors of the model that a GGUF tensor is made of; none if it was not found."""
        return tuple(dict.fromkeys(part.source for part in self.parts.get(name, ())))

    def view(
        self, model: Checkpoint, take: Mapping[str, Format | None], file_type: int | None = None
    ) -> Checkpoint:
        """The tensors of the float file; those of `take` with the rows of `model`, in that format (None: in
        floats). file_type: llama.cpp's number of the mixture."""
        some = next(iter(model.tensors.values())).file
        files = {name: model.tensors[found[0].source].file for name, found in self.parts.items()}
        tensors = {
            name: replace(tensor, file=files.get(name, some)) for name, tensor in self.floats.tensors.items()
        }
        for name, format in take.items():
            old = tensors[name]
            load = partial(_gathered, model, self.parts[name], format, old.shape)
            if format is None:
                tensors[name] = replace(old, load=load)
            else:
                nbytes = format.nbytes(prod(old.shape[:-1]), old.shape[-1])
                tensors[name] = replace(old, kind=format, nbytes=nbytes, load=load)
        keys = dict(self.floats.gguf_keys)
        if file_type is not None:
            keys[Keys.General.FILE_TYPE] = u32(file_type)
        return replace(self.floats, path=model.path, tensors=tensors, gguf_keys=keys)

    def restored(self, model: Checkpoint, path: Path) -> Checkpoint:
        """The values of a GGUF file with these names, under the names of `model`. What is not there row by
        row is the model's own."""
        file = open_gguf(path, own_names=True)
        names, places = list(self.parts), _places(self.parts, model)
        tensors = dict(model.tensors)
        for source, (found, rows) in places.items():
            if (found < 0).any():
                continue
            parts = tuple(
                Part(names[found[start]], torch.from_numpy(rows[start:end].copy()))
                for start, end in _runs(found)
            )
            kinds = {file.tensors[part.source].kind for part in parts}
            kind = kinds.pop() if len(kinds) == 1 else F32
            format, shape = kind if isinstance(kind, Format) else None, tensors[source].shape
            load = partial(_gathered, file, parts, format, shape)
            tensors[source] = replace(tensors[source], kind=kind, load=load)
        return replace(model, tensors=tensors)


def _places(
    parts: Mapping[str, Sequence[Part]], model: Checkpoint
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tensor of the model -> of each of its rows, the number of the GGUF tensor (or -1) and its row there."""
    places: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for number, found in enumerate(parts.values()):
        start = 0
        for part in found:
            shape = model.tensors[part.source].shape
            if part.source not in places:
                places[part.source] = (np.full(prod(shape[:-1]), -1), np.zeros(prod(shape[:-1]), np.int64))
            numbers, rows = places[part.source]
            numbers[part.rows.numpy()] = number
            rows[part.rows.numpy()] = np.arange(start, start + len(part.rows))
            start += len(part.rows)
    return places


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """The start and end of each run of equal values."""
    return pairwise([0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)])


def open_converted(path: Path, model: Checkpoint) -> Converted:
    """llama.cpp's float file of a model -> with the provenance of its rows. Every weight is read once."""
    floats = open_gguf(path, own_names=True)
    index = {k: _Index(rows) for k, rows in _by_length(model.tensors).items()}
    names = _names(floats, model)
    parts = {}
    for name, tensor in floats.tensors.items():
        found = _parts(tensor, index.get(tensor.shape[-1]), model, names.get(name, set()))
        if found is not None:
            parts[name] = found
    return Converted(floats, parts)


def _gathered(
    model: Checkpoint, parts: Sequence[Part], format: Format | None, shape: tuple[int, ...]
) -> torch.Tensor | QTensor:
    if format is not None:
        codes = [_quantized(model.tensors[part.source]).take_rows(part.rows) for part in parts]
        return QTensor.join_rows(codes)
    return torch.cat([_rows(model.tensors[part.source])[part.rows] for part in parts]).reshape(shape)


def _quantized(tensor: LazyTensor) -> QTensor:
    value = tensor.load()
    assert isinstance(value, QTensor)
    return value


def _rows(tensor: LazyTensor) -> torch.Tensor:
    """A tensor in floats, as rows; one of one dimension is a single row."""
    value = tensor.load()
    return _flat(value.decode() if isinstance(value, QTensor) else value)


def _flat(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(-1, value.shape[-1] if value.ndim else 1)


def _names(floats: Checkpoint, model: Checkpoint) -> dict[str, set[str]]:
    """GGUF name -> the names of the model that the gguf package maps to it."""
    keys = {name: value.value for name, value in floats.gguf_keys.items()}
    name = keys.get(Keys.General.ARCHITECTURE)
    kinds = [kind for kind, spelled in gguf.MODEL_ARCH_NAMES.items() if spelled == name]
    found: dict[str, set[str]] = {}
    for kind in kinds:
        table = gguf.get_tensor_name_map(kind, int(keys.get(f"{name}.block_count", 0)))
        for source in model.tensors:
            target = table.get_name(source, try_suffixes=(".weight", ".bias"))
            if target is not None:
                found.setdefault(target, set()).add(source)
    return found


# ---- rows by their bits ------------------------------------------------------------------------------


def _hashes(value: torch.Tensor) -> np.ndarray:
    """Of each row, as f32: a sum of its bits with random factors, modulo 2^64. `(n,)` i64."""
    rows = _flat(value)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=torch.Generator().manual_seed(17))
    found = []
    for piece in rows.split(max(1, PIECE // max(1, rows.shape[1]))):
        bits = piece.float().contiguous().view(torch.int32).long()
        bits = bits + (bits >> 16)  # bf16 has zeros below, which a sum modulo 2^64 would not mix
        found.append((bits * factors).sum(1))
    return torch.cat(found).numpy() if found else np.empty(0, np.int64)


def _by_length(tensors: Mapping[str, LazyTensor]) -> dict[int, list[tuple[str, np.ndarray]]]:
    """Row length -> the tensors with such rows, and the hash of each row."""
    found: dict[int, list[tuple[str, np.ndarray]]] = {}
    for name, tensor in tensors.items():
        if tensor.shape and 0 not in tensor.shape:
            rows = _rows(tensor)
            if rows.is_floating_point():
                found.setdefault(tensor.shape[-1], []).append((name, _hashes(rows)))
    return found


class _Index:
    """The rows of one length: the first of each hash in each source, sorted by hash."""

    def __init__(self, tensors: Sequence[tuple[str, np.ndarray]]) -> None:
        self.names = [name for name, _ in tensors]
        hashes = np.concatenate([each for _, each in tensors])
        sources = np.concatenate([np.full(len(each), i) for i, (_, each) in enumerate(tensors)])
        rows = np.concatenate([np.arange(len(each)) for _, each in tensors])
        order = np.lexsort((rows, sources, hashes))
        self.hashes, self.sources, self.rows = hashes[order], sources[order], rows[order]
        again = (self.hashes[1:] == self.hashes[:-1]) & (self.sources[1:] == self.sources[:-1])
        first = np.concatenate([[True], ~again])
        self.hashes, self.sources, self.rows = self.hashes[first], self.sources[first], self.rows[first]

    def find(self, wanted: np.ndarray, preferred: Collection[str]) -> tuple[np.ndarray, np.ndarray] | None:
        """-> of each row its source and its row there; None if one is nowhere."""
        low = np.searchsorted(self.hashes, wanted, "left")
        high = np.searchsorted(self.hashes, wanted, "right")
        if (low == high).any():
            return None
        alone = high - low == 1
        rank = np.bincount(self.sources[low[alone]], minlength=len(self.names)).astype(np.int64)
        rank[[i for i, name in enumerate(self.names) if name in preferred]] += len(wanted) + 1
        place = low.copy()
        for i in np.flatnonzero(~alone):
            place[i] = low[i] + int(rank[self.sources[low[i] : high[i]]].argmax())
        return self.sources[place], self.rows[place]


def _parts(
    tensor: LazyTensor, index: _Index | None, model: Checkpoint, preferred: Collection[str]
) -> tuple[Part, ...] | None:
    """The parts of one tensor, compared bit for bit; None if a row is nowhere in the model."""
    value = tensor.load()
    if index is None or not isinstance(value, torch.Tensor) or not value.numel():
        return None
    found = index.find(_hashes(value), preferred)
    if found is None:
        return None
    sources, rows = found
    parts, flat = [], _flat(value)
    for start, end in _runs(sources):
        name, order = index.names[sources[start]], torch.from_numpy(rows[start:end].copy())
        if not _same(model.tensors[name], order, flat[start:end]):
            return None
        parts.append(Part(name, order))
    return tuple(parts)


def _same(tensor: LazyTensor, order: torch.Tensor, wanted: torch.Tensor) -> bool:
    value = _rows(tensor)
    step = max(1, PIECE // max(1, value.shape[1]))
    pairs: Iterator[tuple[torch.Tensor, torch.Tensor]] = zip(
        order.split(step), wanted.split(step), strict=True
    )
    return all(torch.equal(value[rows].float(), piece.float()) for rows, piece in pairs)
