"""Layouts: how the arrays of a quantized weight lie in a file, and what config.json says of them.

    q_proj.weight, int4_g128     native     q_proj.weight.codes   q_proj.weight.scale
                                 gptq       q_proj.qweight        q_proj.scales   q_proj.qzeros   q_proj.g_idx
    config.json                  {"quantization_config": {"quant_method": "gptq", "bits": 4, ...}}

A layout only moves bits: `pack` and `unpack` are exact inverses, so a weight goes from one layout to any
other that carries its format without being quantized again. One file a layout; LAYOUTS has them all. The
file is safetensors unless a layout has another container (`weights`, `placed`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from ..errors import FileError, FormatError, PlanError, raise_all
from ..formats.base import FORMATS, Format
from ..qtensor import QTensor
from ..registry import Registry
from ..storage.safetensors import DTYPE_NAMES, DTYPES, Entry, lay_out, map_tensor
from ..storage.stream import Span
from .checkpoint import LazyTensor

Shape = tuple[int, int]
Kind = tuple[str, tuple[int, ...]]  # a format, or the dtype of what stays in float, and the shape
Row = tuple[str, str, tuple[int, ...]]  # an array's key, dtype and shape


class Array(NamedTuple):
    """One array of a weight on disk. key: its whole name."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Place(NamedTuple):
    """Where an array lies: a file and its entry there."""

    file: Path
    entry: Entry


@dataclass(frozen=True)
class Held:
    """A weight found in a file. arrays: those of `layout.arrays`, unless another tool may lay them otherwise
    and `unpack` knows it. extra: keys that belong to it besides, and say nothing that the format does not.
    layout: the one of this weight, where the directory's own depends on settings."""

    format: Format
    shape: Shape
    extra: tuple[str, ...] = ()
    layout: Layout | None = None
    arrays: tuple[Array, ...] = ()


@dataclass(frozen=True)
class Decoded:
    """A weight found in a file that no format of ours holds (codes under a table of its own, say): it opens
    as floats. decode: the arrays of `keys`, in order -> `(n, k)` f32."""

    shape: Shape
    keys: tuple[str, ...]
    decode: Callable[[Sequence[torch.Tensor]], torch.Tensor]


class Layout(ABC):
    """name: as `--to` takes it. method: quant_method in config.json, None if no config names it. tables: may
    tables of embeddings be quantized, or linear weights only? weights: the file of all arrays.
    marks: other files by which a directory is taken for one of this layout."""

    name: str
    method: ClassVar[str | None] = None
    weights: ClassVar[str] = "model.safetensors"
    marks: ClassVar[tuple[str, ...]] = ()
    tables: ClassVar[bool] = False

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Does a quantization_config speak of this layout?"""
        return self.method is not None and settings.get("quant_method") == self.method

    def of(self, config: Mapping[str, Any]) -> Layout:
        """This layout for one model: `self`, unless what is written depends on the model's config.json."""
        return self

    @abstractmethod
    def refusal(self, format: Format) -> str | None:
        """None where this layout carries the format exactly; else why not, and the nearest it carries."""

    @abstractmethod
    def arrays(self, name: str, format: Format, shape: Shape) -> list[Array]:
        """The arrays of tensor `name` (`...weight`), `(n, k)` in a format, in the order of `pack`."""

    @abstractmethod
    def pack(self, q: QTensor) -> tuple[torch.Tensor, ...]:
        """The planes of a weight as the arrays of this layout; exact."""

    @abstractmethod
    def unpack(self, format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
        """The inverse of `pack`."""

    def told(self, activations: str | None = None, kv_cache: str | None = None) -> Layout:
        """This layout for weights that meet activations, and a cache, of a scheme; PlanError where it cannot
        say so."""
        for what, scheme in (("activations", activations), ("a cache of keys and values", kv_cache)):
            if scheme is not None:
                raise PlanError(
                    f"a {self.name} file says nothing of {what}; use compressed-tensors or a native directory"
                )
        return self

    def spoken(self, config: Mapping[str, Any], places: Mapping[str, Place]) -> dict[str, Any]:
        """What a directory tells a runtime besides its weights: records as activations/record.py has them,
        and under "unread" a line for each thing that no record of ours says. config: as `find` has it."""
        return {}

    def packer(self, name: str, about: Mapping[str, Any]) -> Callable[[QTensor], tuple[torch.Tensor, ...]]:
        """`pack` for tensor `name`, once the run knows all of `about`."""
        return self.pack

    def placed(self, rows: Iterable[Row]) -> tuple[bytes, list[Entry]]:
        """The container of these arrays: the first bytes of its file, and where each lies."""
        return lay_out(rows, {"format": "pt"})

    @abstractmethod
    def settings(
        self, rows: Mapping[str, Kind], config: Mapping[str, Any], about: Mapping[str, Any]
    ) -> Mapping[str, Mapping[str, Any] | bytes]:
        """The small files that say what the arrays mean: name -> JSON object or bytes, the one that makes
        the directory complete last.

        rows: every tensor. config: the model's config.json, without quantization_config. about: what
        fewbits itself remembers (recipe, activations). Raises PlanError, naming the weights, for a
        mixture of formats that the layout cannot say.
        """

    @abstractmethod
    def find(
        self, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> dict[str, Held | Decoded]:
        """Which tensors of a directory are quantized, and how. config: its quantization_config. What
        contradicts itself is appended to `faults`."""


LAYOUTS: Registry[Layout] = Registry("file type", FileError)


def others_files(layout: Layout) -> list[str]:
    """What would make a directory one of another layout, and is none of this one's."""
    known = [LAYOUTS.get(name) for name in LAYOUTS]
    found = {name for other in known for name in (other.weights, *other.marks)}
    return sorted(found - {layout.weights, *layout.marks})


def planes_of(q: QTensor) -> tuple[torch.Tensor, ...]:
    """A weight as its own planes, in order."""
    return tuple(q.planes[plane.name] for plane in q.format.planes)


def laid_out(
    layout: Layout, rows: Mapping[str, Kind]
) -> tuple[bytes, list[Span], dict[str, tuple[str, ...]]]:
    """Tensors in order -> header of the file of arrays, its spans, and the spans of each tensor.

    FormatError, all in one, for formats that the layout does not carry.
    """
    arrays: list[Row] = []
    keys: dict[str, tuple[str, ...]] = {}
    refused: dict[str, list[str]] = {}
    for name, (kind, shape) in rows.items():
        if not is_plain(kind):
            format = FORMATS.get(kind)
            fault = layout.refusal(format) if len(shape) == 2 else f"{kind} holds (n, k) weights, not {shape}"
            if fault is not None:
                refused.setdefault(fault, []).append(name)
                continue
        parts = arrays_of(layout, name, (kind, shape))
        arrays += parts
        keys[name] = tuple(key for key, _, _ in parts)
    raise_all(FormatError, layout.name, gathered(refused))
    header, entries = layout.placed(arrays)
    return header, [Span(entry.name, entry.offset, entry.nbytes) for entry in entries], keys


def arrays_of(layout: Layout, name: str, row: Kind) -> list[Row]:
    """The arrays of one tensor that the layout carries."""
    kind, shape = row
    if is_plain(kind):
        return [(name, kind, shape)]
    parts = layout.arrays(name, FORMATS.get(kind), (shape[0], shape[1]))
    return [(part.key, DTYPE_NAMES[part.dtype], part.shape) for part in parts]


def gathered(refused: Mapping[str, Sequence[str]]) -> list[str]:
    """Faults and the tensors that have them -> one line a fault."""
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {fault}"
        for fault, names in refused.items()
    ]


def module_of(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `model.layers.0.mlp.up_proj`."""
    return name.removesuffix(".weight")


def open_tensors(
    layout: Layout, config: Mapping[str, Any], places: Mapping[str, Place], where: Path
) -> dict[str, LazyTensor]:
    """All tensors of a directory: those that `find` finds, checked against their arrays, and the floats
    beside them.

    FileError with every disagreement: arrays missing, of another dtype or shape, quantized and float at once.
    """
    faults: list[str] = []
    found = layout.find(config, places, faults)
    tensors: dict[str, LazyTensor] = {}
    claimed: set[str] = set()
    for name, held in found.items():
        if name in places and name not in _keys(layout, name, held):
            faults.append(f"tensor {name!r} stands there both quantized and in float; write it anew")
        tensor = _tensor(layout, name, held, places, faults)
        if tensor is not None:
            tensors[name] = tensor
            claimed |= _keys(layout, name, held)
    raise_all(FileError, str(where), faults)
    return tensors | {
        key: lazy_tensor(place.file, place.entry) for key, place in places.items() if key not in claimed
    }


def lazy_tensor(file: Path, entry: Entry) -> LazyTensor:
    """A safetensors entry as a float tensor of a checkpoint."""
    load = partial(map_tensor, file, entry)
    return LazyTensor(entry.name, entry.shape, entry.dtype.lower(), entry.nbytes, file.name, load)


def _keys(layout: Layout, name: str, held: Held | Decoded) -> set[str]:
    if isinstance(held, Decoded):
        return set(held.keys)
    return {array.key for array in _arrays(layout, name, held)} | set(held.extra)


def _arrays(layout: Layout, name: str, held: Held) -> Sequence[Array]:
    return held.arrays or (held.layout or layout).arrays(name, held.format, held.shape)


def _tensor(
    layout: Layout, name: str, held: Held | Decoded, places: Mapping[str, Place], faults: list[str]
) -> LazyTensor | None:
    """One weight -> LazyTensor; or None and `faults`."""
    if isinstance(held, Decoded):
        used = [places[key] for key in held.keys]
        nbytes = sum(place.entry.nbytes for place in used)
        loose = partial(_decode, held, used)
        return LazyTensor(name, held.shape, "f32", nbytes, used[0].file.name, loose)
    layout = held.layout or layout
    used, before = [], len(faults)
    for array in _arrays(layout, name, held):
        place, needed = places.get(array.key), (DTYPE_NAMES[array.dtype], array.shape)
        part = array.key.removeprefix(f"{name}.").removeprefix(f"{module_of(name)}.")
        if place is None:
            faults.append(f"tensor {name!r}: plane {part!r} is missing")
        elif (place.entry.dtype, place.entry.shape) != needed:
            faults.append(
                f"tensor {name!r}: plane {part!r} is {place.entry.dtype} {place.entry.shape}, "
                f"{held.format.name} {held.shape} needs {needed[0]} {needed[1]}"
            )
        else:
            used.append(place)
    if len(faults) > before:
        return None
    load = partial(_unpack, layout, held, used)
    nbytes = sum(place.entry.nbytes for place in used)
    return LazyTensor(name, held.shape, held.format.name, nbytes, used[0].file.name, load, quantized=True)


def _unpack(layout: Layout, held: Held, used: Sequence[Place]) -> QTensor:
    return layout.unpack(held.format, held.shape, [map_tensor(*place) for place in used])


def _decode(held: Decoded, used: Sequence[Place]) -> torch.Tensor:
    return held.decode([map_tensor(*place) for place in used])


def is_plain(kind: str) -> bool:
    """Is this the name of a dtype as files have it, and not of a format?"""
    return kind.upper() in DTYPES
