"""Directories with config.json: the arrays of a quantized weight in a file, and their config.

    q_proj.weight, int4_g128     native     q_proj.weight.codes   q_proj.weight.scale
                                 gptq       q_proj.qweight        q_proj.scales   q_proj.qzeros   q_proj.g_idx
    config.json                  {"quantization_config": {"quant_method": "gptq", "bits": 4, ...}}

A directory's type only rearranges bits: `pack` and `unpack` are exact inverses, so a weight can be converted
to any type that supports its format without quantizing again. One module per type. The arrays are in
safetensors unless a type has another container (`weights`, `container`).
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..dtypes import BF16, DTYPES, F32
from ..errors import FileError, FormatError, raise_all
from ..formats.base import Format, Kind
from ..model.archs import GGUFEntry
from ..qtensor import QTensor
from ..storage.atomic import write_atomic
from ..storage.safetensors import Entry, lay_out, map_tensor
from ..storage.stream import Span
from .checkpoint import Checkpoint, LazyTensor
from .filetype import FILE_TYPES, FileType, Probe, Shape, gathered
from .output import Job, Output, copy_side_files, side_files_of

if TYPE_CHECKING:
    import torch

Stored = tuple[Kind, tuple[int, ...]]  # number type or format of a tensor, and its shape
Row = tuple[str, str, tuple[int, ...]]  # an array's key, dtype and shape


class Array(NamedTuple):
    """One array of a weight on disk. key: its full name. dtype: a name of DTYPES."""

    key: str
    dtype: str
    shape: tuple[int, ...]


class Place(NamedTuple):
    """The place of an array: a file and its entry."""

    file: Path
    entry: Entry


def stands(array: Array, places: Mapping[str, Place]) -> bool:
    """Whether the array exists with this dtype and shape."""
    place = places.get(array.key)
    return place is not None and (place.entry.dtype, place.entry.shape) == (array.dtype.upper(), array.shape)


@dataclass(frozen=True)
class QuantizedEntry:
    """A quantized weight of a directory. arrays: those of `file_type.arrays`, or another tool's layout that
    `unpack` supports. extra: further keys of the weight without information of their own. file_type: that
    of this weight, if it depends on settings."""

    format: Format
    shape: Shape
    extra: tuple[str, ...] = ()
    file_type: Directory | None = None
    arrays: tuple[Array, ...] = ()


@dataclass(frozen=True)
class FloatEntry:
    """A quantized weight without a matching format (such as codes with their own table), which opens as
    floats. decode: the arrays of `keys`, in order -> `(n, k)` f32."""

    shape: Shape
    keys: tuple[str, ...]
    decode: Callable[[Sequence[torch.Tensor]], torch.Tensor]


class Directory(FileType):
    """method: quant_method in config.json, None if there is none. weights: the file of all arrays.
    marks: other files that identify a directory of this type."""

    method: ClassVar[str | None] = None
    weights: ClassVar[str] = "model.safetensors"
    marks: ClassVar[tuple[str, ...]] = ()

    # ---- reading -------------------------------------------------------------------------------------

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Whether a quantization_config is of this type."""
        return self.method is not None and settings.get("quant_method") == self.method

    def recognizes(self, probe: Probe) -> bool:
        return probe.has("config.json") and probe.quantization is not None and self.reads(probe.quantization)

    def open(self, path: Path) -> Checkpoint:
        from .huggingface import open_directory

        return open_directory(path, self)

    @abstractmethod
    def find(
        self, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> dict[str, QuantizedEntry | FloatEntry]:
        """The quantized tensors of a directory. config: its quantization_config. Contradictions are appended
        to `faults`."""

    def read_runtime(self, config: Mapping[str, Any], places: Mapping[str, Place]) -> dict[str, Any]:
        """The runtime schemes of a directory: records of activations/record.py, and under "unread" a line for
        each field that is not supported. config: as in `find`."""
        return {}

    # ---- the arrays of a weight ----------------------------------------------------------------------

    @abstractmethod
    def arrays(self, name: str, format: Format, shape: Shape) -> list[Array]:
        """The arrays of tensor `name` (`...weight`), `(n, k)` in a format, in the order of `pack`.
        FormatError for a shape that the type does not support."""

    @abstractmethod
    def pack(self, q: QTensor) -> tuple[torch.Tensor, ...]:
        """The planes of a weight as the arrays of this type; exact."""

    @abstractmethod
    def unpack(self, format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
        """The inverse of `pack`."""

    def packer(self, name: str, about: Mapping[str, Any]) -> Callable[[QTensor], tuple[torch.Tensor, ...]]:
        """`pack` for tensor `name`, once all of `about` is known."""
        return self.pack

    def fits(self, format: Format, shape: Shape) -> bool:
        if not super().fits(format, shape):
            return False
        try:
            self.arrays("weight", format, shape)
        except FormatError:
            return False
        return True

    # ---- writing -------------------------------------------------------------------------------------

    def of(self, checkpoint: Checkpoint) -> Directory:
        """This type for one model: `self`, unless it depends on the model."""
        return self

    def container(self, rows: Iterable[Row]) -> tuple[bytes, list[Entry]]:
        """The container of these arrays: the first bytes of its file, and the place of each."""
        return lay_out(rows, {"format": "pt"})

    @abstractmethod
    def settings(
        self, rows: Mapping[str, Stored], config: Mapping[str, Any], about: Mapping[str, Any]
    ) -> Mapping[str, Mapping[str, Any] | bytes]:
        """The small files that describe the arrays: name -> JSON object or bytes; the last one makes the
        directory complete.

        rows: every tensor. config: the model's config.json, without quantization_config. about:
        fewbits' own fields (recipe, activations). Raises PlanError, naming the weights, for a mixture of
        formats that the type cannot express.
        """

    def check_place(self, out: Path, overwrite: bool) -> None:
        if overwrite or not out.exists():
            return
        ours = [out / "receipt.json", out / f"{self.weights}.journal"]
        if any(p.name[0] != "." for p in out.iterdir()) and not any(p.exists() for p in ours):
            raise FileError(
                f"{out}: holds files that fewbits did not write; choose another output, or pass overwrite"
            )
        for name in self.others_files():
            if (out / name).exists():
                raise FileError(f"{out / name}: exists; choose another output or pass overwrite")

    def others_files(self) -> list[str]:
        """Files that identify a directory of another type."""
        known = [other for _, other in FILE_TYPES.items() if isinstance(other, Directory)]
        named = {name for other in known for name in (other.weights, *other.marks)}
        return sorted(named - {self.weights, *self.marks})

    def lay_out(
        self,
        checkpoint: Checkpoint,
        out: Path,
        entries: Sequence[GGUFEntry],
        kinds: Mapping[str, Kind],
        about: Mapping[str, Any],
    ) -> Output:
        file_type = self.of(checkpoint)
        rows = {name: (kinds[name], tensor.shape) for name, tensor in checkpoint.tensors.items()}
        header, spans, keys = laid_out(file_type, rows)
        small = file_type.settings(rows, checkpoint.config, about)
        jobs = tuple(
            Job(name, (name,), shape, kind, keys[name], pack=file_type.pack)
            for name, (kind, shape) in rows.items()
        )

        def measured(records: Mapping[str, Any]) -> tuple[Job, ...]:
            return tuple(
                replace(job, pack=file_type.packer(job.name, records))
                if isinstance(job.kind, Format)
                else job
                for job in jobs
            )

        side_files = {name: file for name, file in side_files_of(checkpoint).items() if name != "README.md"}

        def finish(records: Mapping[str, Any]) -> None:
            copy_side_files(side_files, out)
            for name, content in file_type.settings(rows, checkpoint.config, {**about, **records}).items():
                if not isinstance(content, bytes):
                    text = json.dumps(content, indent=2 if name == "config.json" else 1, ensure_ascii=False)
                    content = text.encode() + b"\n"
                write_atomic(out / name, content)

        receipt, config = self.receipt_path(out), small.get("config.json")
        stale = (*(out / name for name in [*small, *self.others_files()]), receipt)
        return replace(
            Output(out / self.weights, header, spans, jobs, receipt, finish),
            stale=stale,
            measured=measured,
            config=config if isinstance(config, Mapping) else {},
        )


def laid_out(
    file_type: Directory, rows: Mapping[str, Stored]
) -> tuple[bytes, list[Span], dict[str, tuple[str, ...]]]:
    """Tensors in order -> header of the file of arrays, its spans, and the spans of each tensor.

    One FormatError for all formats that the type does not support.
    """
    arrays: list[Row] = []
    keys: dict[str, tuple[str, ...]] = {}
    refused: dict[str, list[str]] = {}
    for name, (kind, shape) in rows.items():
        if isinstance(kind, Format):
            fault = (
                file_type.refusal(kind, (shape[0], shape[1]))
                if len(shape) == 2
                else f"{kind.name} holds (n, k) weights, not {shape}"
            )
            if fault is not None:
                refused.setdefault(fault, []).append(name)
                continue
        parts = arrays_of(file_type, name, (kind, shape))
        arrays += parts
        keys[name] = tuple(key for key, _, _ in parts)
    raise_all(FormatError, file_type.name, gathered(refused))
    header, entries = file_type.container(arrays)
    return header, [Span(entry.name, entry.offset, entry.nbytes) for entry in entries], keys


def arrays_of(file_type: Directory, name: str, row: Stored) -> list[Row]:
    """The arrays of one tensor in a supported format."""
    kind, shape = row
    if not isinstance(kind, Format):
        return [(name, kind.name, shape)]
    return list(file_type.arrays(name, kind, (shape[0], shape[1])))


def module_of(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `model.layers.0.mlp.up_proj`."""
    return name.removesuffix(".weight")


def open_tensors(
    file_type: Directory, config: Mapping[str, Any], places: Mapping[str, Place], where: Path
) -> dict[str, LazyTensor]:
    """All tensors of a directory: those from `find`, checked against their arrays, and the float tensors.

    FileError with every disagreement: arrays missing, of another dtype or shape, quantized and float at once.
    """
    faults: list[str] = []
    entries = file_type.find(config, places, faults)
    tensors: dict[str, LazyTensor] = {}
    claimed: set[str] = set()
    for name, entry in entries.items():
        if name in places and name not in _keys(file_type, name, entry):
            faults.append(f"tensor {name!r} is both quantized and in float; write it again")
        tensor = _tensor(file_type, name, entry, places, faults)
        if tensor is not None:
            tensors[name] = tensor
            claimed |= _keys(file_type, name, entry)
    raise_all(FileError, str(where), faults)
    return tensors | {
        key: lazy_tensor(place.file, place.entry) for key, place in places.items() if key not in claimed
    }


def lazy_tensor(file: Path, entry: Entry) -> LazyTensor:
    """A safetensors entry as a float tensor of a checkpoint. fp8 becomes bf16, which has all its values."""
    if entry.dtype in ("F8_E4M3", "F8_E5M2"):
        widened = partial(_widened, file, entry)
        return LazyTensor(entry.name, entry.shape, BF16, entry.nbytes, file.name, widened)
    load = partial(map_tensor, file, entry)
    return LazyTensor(entry.name, entry.shape, DTYPES[entry.dtype.lower()], entry.nbytes, file.name, load)


def _widened(file: Path, entry: Entry) -> torch.Tensor:
    return map_tensor(file, entry).bfloat16()


def _keys(file_type: Directory, name: str, entry: QuantizedEntry | FloatEntry) -> set[str]:
    if isinstance(entry, FloatEntry):
        return set(entry.keys)
    return {array.key for array in _arrays(file_type, name, entry)} | set(entry.extra)


def _arrays(file_type: Directory, name: str, entry: QuantizedEntry) -> Sequence[Array]:
    return entry.arrays or (entry.file_type or file_type).arrays(name, entry.format, entry.shape)


def _tensor(
    file_type: Directory,
    name: str,
    entry: QuantizedEntry | FloatEntry,
    places: Mapping[str, Place],
    faults: list[str],
) -> LazyTensor | None:
    """One weight -> LazyTensor; or None and `faults`."""
    if isinstance(entry, FloatEntry):
        used = [places[key] for key in entry.keys]
        nbytes = sum(place.entry.nbytes for place in used)
        return LazyTensor(name, entry.shape, F32, nbytes, used[0].file.name, partial(_decode, entry, used))
    used, before = [], len(faults)
    for array in _arrays(file_type, name, entry):
        place, needed = places.get(array.key), (array.dtype.upper(), array.shape)
        part = array.key.removeprefix(f"{name}.").removeprefix(f"{module_of(name)}.")
        if place is None:
            faults.append(f"tensor {name!r}: plane {part!r} is missing")
        elif (place.entry.dtype, place.entry.shape) != needed:
            faults.append(
                f"tensor {name!r}: plane {part!r} is {place.entry.dtype} {place.entry.shape}, "
                f"{entry.format.name} {entry.shape} needs {needed[0]} {needed[1]}"
            )
        else:
            used.append(place)
    if len(faults) > before:
        return None
    load = partial(_unpack, entry.file_type or file_type, entry, used)
    nbytes = sum(place.entry.nbytes for place in used)
    return LazyTensor(name, entry.shape, entry.format, nbytes, used[0].file.name, load)


def _unpack(file_type: Directory, entry: QuantizedEntry, used: Sequence[Place]) -> QTensor:
    return file_type.unpack(entry.format, entry.shape, [map_tensor(*place) for place in used])


def _decode(entry: FloatEntry, used: Sequence[Place]) -> torch.Tensor:
    return entry.decode([map_tensor(*place) for place in used])
