"""FileType: all that the program knows of one file type, in one value.

    name, run, library, engines     what --to takes; what a model card says; who reads it
    recognizes(probe), open(path)   reading: told by content, only headers are read
    reason(format), nearest(...)    which number formats it carries, and the one to take instead of another
    lay_out(...) -> Output          writing: names, packing, header, settings, side files

GGUF is a file (gguf/filetype.py); all others are directories with config.json (directory.py). Nothing else in
the program asks a file type for its name. A new one is a module here and a line in open.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..dtypes import BF16, F32
from ..errors import FewbitsError, FileError, PlanError
from ..formats.affine import Affine
from ..formats.base import FORMATS, Format, Kind
from ..formats.ggml import Ggml
from ..model.archs import GGUFEntry
from ..registry import Registry
from ..storage.json import read_json_object
from ..storage.mapped import first_bytes

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, LazyTensor
    from .output import Output

Shape = tuple[int, int]
USUAL: Shape = (4096, 4096)  # where the shape of a weight is not known


@dataclass(frozen=True)
class Probe:
    """What lies at a path, looked at once for all file types."""

    path: Path

    @cached_property
    def directory(self) -> bool:
        return self.path.is_dir()

    @cached_property
    def magic(self) -> bytes:
        """The first four bytes of a file."""
        return b"" if self.directory else first_bytes(self.path, 4)

    def has(self, name: str) -> bool:
        return self.directory and (self.path / name).exists()

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """quantization_config of config.json or of its older homes; None where nothing says anything."""
        return quantization_of(self.path, read_json_object(self.path / "config.json"))


def quantization_of(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Take the settings of quantization out of config.json; AutoGPTQ and AutoAWQ kept them in files of their
    own, mlx-lm keeps them twice."""
    settings = config.pop("quantization_config", None)
    if isinstance(mlx := config.get("quantization"), dict) and "group_size" in mlx:
        settings = config.pop("quantization")
    for method, file in (("gptq", "quantize_config.json"), ("awq", "quant_config.json")):
        if settings is None and (path / file).is_file():
            settings = {"quant_method": method, **read_json_object(path / file)}
    return settings if isinstance(settings, dict) else None if settings is None else {}


class FileType(ABC):
    """name: as `--to` and `--file` take it. where: how a message calls one. suffix: of a file type that is
    one file, else "". engines: names in engines/, of which the first is asked about each output. run:
    how people run it, for the card. library: library_name of the card. tables: may embeddings be
    quantized?"""

    name: str
    where: ClassVar[str] = "a {name} directory"
    suffix: ClassVar[str] = ""
    engines: ClassVar[tuple[str, ...]] = ()
    run: ClassVar[str] = "vllm serve {name}"
    library: ClassVar[str] = "transformers"
    tables: ClassVar[bool] = False
    verified: ClassVar[bool] = True  # is another engine waiting for it, so that each output is tried there?
    writes_gguf_names: ClassVar[bool] = False

    # ---- reading -------------------------------------------------------------------------------------

    @abstractmethod
    def recognizes(self, probe: Probe) -> bool:
        """Is what lies there of this type?"""

    @abstractmethod
    def open(self, path: Path) -> Checkpoint:
        """Only headers are read. FileError for damaged files, with all faults."""

    def inspect(self, path: Path) -> tuple[Mapping[str, Any], list[tuple[str, tuple[int, ...], str, int]]]:
        """Settings, and (name, shape, type, bytes) of each tensor, as they are stored."""
        checkpoint = self.open(path)
        rows = [(t.name, t.shape, t.kind.name, t.nbytes) for t in checkpoint.tensors.values()]
        return checkpoint.config, rows

    # ---- which formats -------------------------------------------------------------------------------

    @abstractmethod
    def reason(self, format: Format) -> str | None:
        """None where the file type carries the format exactly; else what of it it cannot hold."""

    def fits(self, format: Format, shape: Shape) -> bool:
        """Does it carry a weight of this shape in the format?"""
        try:
            format.check_shape(*shape, "weight")
        except FewbitsError:
            return False
        return self.reason(format) is None

    @cached_property
    def carries_formats(self) -> bool:
        """Does it carry any format, or floats alone?"""
        return any(self.reason(format) is None for format in _registered())

    def nearest(self, format: Format, shape: Shape = USUAL) -> Kind:
        """The format to take instead of one that is not carried: the registered one of the nearest size,
        rather larger than smaller, of the same making (even steps, a zero point or minimum); bf16 where none
        is.

        It is what a refusal names, and what `convert --requantize` quantizes to.
        """
        fits = [other for other in _candidates(format) if self.fits(other, shape)]
        return min(fits, key=lambda other: _distance(format, other), default=BF16)

    def refusal(self, format: Format, shape: Shape = USUAL) -> str | None:
        """None where the format is carried; else one sentence: why not, and the nearest that is."""
        reason = self.reason(format)
        if reason is None:
            return None
        where, near = self.where.format(name=self.name), self.nearest(format, shape)
        return f"{where} cannot carry {format.name} ({reason}); the nearest it can is {near.name}"

    # ---- writing -------------------------------------------------------------------------------------

    def with_runtime(self, activations: str | None = None, kv_cache: str | None = None) -> FileType:
        """This file type for weights that meet activations, and a cache, of a scheme; PlanError where a file
        cannot say so."""
        for what, scheme in (("activations", activations), ("a cache of keys and values", kv_cache)):
            if scheme is not None:
                raise PlanError(
                    f"{self.where.format(name=self.name)} cannot say anything of {what}; use "
                    "compressed-tensors or a native directory"
                )
        return self

    def plain_kind(self, entry: GGUFEntry, source: LazyTensor | None) -> Kind:
        """The type of a tensor that is not quantized: the source's own."""
        return source.kind if source else F32

    def check_source(self, checkpoint: Checkpoint) -> None:  # noqa: B027  most types take any architecture
        """ModelError where no model of this architecture can be written."""

    def check_kind(self, out: Path) -> None:
        """FileError where a directory stands in the place of a file, or the other way round."""
        if out.exists() and out.is_dir() == bool(self.suffix):
            kind = "a" if self.suffix else "not a"
            raise FileError(f"{out}: exists and is {kind} directory; choose another output")

    def check_place(self, out: Path, overwrite: bool) -> None:  # noqa: B027  a file is replaced or resumed
        """FileError where `out` holds what is not to be written over."""

    @abstractmethod
    def lay_out(
        self,
        checkpoint: Checkpoint,
        out: Path,
        entries: Sequence[GGUFEntry],
        kinds: Mapping[str, Kind],
        about: Mapping[str, Any],
    ) -> Output:
        """The output before a byte of it is written. kinds: by entry where `writes_gguf_names`, else by
        source. about: name, recipe and file_type of what is written. FormatError, all in one, for kinds not
        carried."""

    def default_path(self, stem: str, to: str) -> Path:
        """Where an output goes whose place is not given."""
        return Path(f"{stem}-{to}")

    def receipt_path(self, out: Path) -> Path:
        return out / "receipt.json"

    def card_path(self, out: Path) -> Path:
        return out / "README.md"


FILE_TYPES: Registry[FileType] = Registry("file type", FileError)


def _registered() -> list[Format]:
    """The formats that can stand for others: none in act order, which takes a text."""
    return [format for _, format in FORMATS.items() if format.ordered is None]


def _candidates(format: Format) -> list[Format]:
    """What may be near a format: all that are registered, and integers with groups of the same size."""
    plain = format.ordered or format
    if not isinstance(plain, Affine) or plain.cells.rows != 1:
        return _registered()
    group = "channel" if plain.cells.columns is None else f"g{plain.cells.columns}"
    names = [f"int{bits}_{group}{zero}" for bits in range(2, 9) for zero in ("", "_asym")]
    return [*map(FORMATS.get, names), *_registered()]


def _traits(format: Format) -> tuple[bool, bool]:
    """Even steps? An offset: a zero point or a minimum?"""
    plain = format.ordered or format
    if isinstance(plain, Affine):
        return True, plain.zero != "none"
    return isinstance(plain, Ggml) and plain.kind in ("symmetric", "affine"), (
        isinstance(plain, Ggml) and plain.kind == "affine"
    )


def _weights_a_scale(format: Format) -> int:
    """How many weights of a usual shape share a scale."""
    cells = getattr(format, "cells", None)
    if cells is None:
        return int(getattr(format, "group", format.block))
    return (cells.columns or USUAL[1]) * (cells.rows or USUAL[0])


def _distance(format: Format, other: Format) -> float:
    """How far apart two formats are; the same for weights of any shape, for engines want q, k and v alike."""
    plain = format.ordered or format
    ratio = log2(other.bits_per_weight(*USUAL) / plain.bits_per_weight(*USUAL))
    (even, offset), (other_even, other_offset) = _traits(plain), _traits(other)
    making = 0.1 * ((even != other_even) + (offset != other_offset) + (offset > other_offset))
    coarser = log2(_weights_a_scale(other) / _weights_a_scale(plain))
    return (ratio if ratio >= 0 else -2.5 * ratio) + making + 0.05 * max(0, coarser)


def gathered(faults: Mapping[str, Sequence[str]]) -> list[str]:
    """Faults and the tensors that have them -> one line a fault."""
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {fault}"
        for fault, names in faults.items()
    ]
