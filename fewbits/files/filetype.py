"""FileType: the description of one file type.

    name, run, library, engines     values of --to; text of the model card; engines
    recognizes(probe), open(path)   reading: recognized by content; only headers are read
    reason(format), nearest(...)    supported number formats, and the nearest one to another
    lay_out(...) -> Output          writing: names, packing, header, settings, side files

GGUF is a file (gguf/filetype.py); all others are directories with config.json (directory.py). No other code
depends on the name of a file type. A new one is a module here and a line in open.py.
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
ON_CPU = "\nVLLM_CPU_INT4_W4A8=0 vllm serve {name}        # on a CPU; else it rounds activations to 8 bits"
USUAL: Shape = (4096, 4096)  # if the shape of a weight is unknown
_SEPARATE = {
    "gptq": "quantize_config.json", "awq": "quant_config.json", "modelopt": "hf_quant_config.json",
}  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """The content of a path, read once for all file types."""

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
        """quantization_config of config.json or of older files; None if there is none."""
        return quantization_of(self.path, read_json_object(self.path / "config.json"))


def quantization_of(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Remove the quantization settings from config.json. Multimodal models have them in a part, compressed-
    tensors named them differently, AutoGPTQ, AutoAWQ and ModelOpt keep them in other files, mlx-lm twice."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    given = [part.pop("quantization_config", None) for part in parts]
    settings = next((each for each in given if each is not None), None)
    older = config.pop("compression_config", None)
    if settings is None and isinstance(older, dict):
        settings = {"quant_method": "compressed-tensors", **older}
    if isinstance(mlx := config.get("quantization"), dict) and "group_size" in mlx:
        settings = config.pop("quantization")
    for method, file in _SEPARATE.items():
        if settings is None and (path / file).is_file():
            settings = {"quant_method": method, **read_json_object(path / file)}
    return settings if isinstance(settings, dict) else None if settings is None else {}


class FileType(ABC):
    """name: a value of `--to` and `--file`. where: its name in messages. suffix: of a file type that is one
    file, else "". engines: names in engines; the first verifies each output. run: how to run it, for
    the card. library: library_name of the card. tables: whether embeddings may be quantized. asks_loader:
    whether transformers' own loader, which then reads it, is asked before it is written."""

    name: str
    where: ClassVar[str] = "a {name} directory"
    suffix: ClassVar[str] = ""
    engines: ClassVar[tuple[str, ...]] = ()
    run: ClassVar[str] = "vllm serve {name}"
    library: ClassVar[str] = "transformers"
    tables: ClassVar[bool] = False
    asks_loader: ClassVar[bool] = False
    writes_gguf_names: ClassVar[bool] = False

    # ---- reading -------------------------------------------------------------------------------------

    @abstractmethod
    def recognizes(self, probe: Probe) -> bool:
        """Whether the content is of this type."""

    @abstractmethod
    def open(self, path: Path) -> Checkpoint:
        """Only headers are read. FileError for damaged files, with all faults."""

    def inspect(self, path: Path) -> tuple[Mapping[str, Any], list[tuple[str, tuple[int, ...], str, int]]]:
        """Settings, and (name, shape, type, bytes) of each stored tensor."""
        checkpoint = self.open(path)
        rows = [(t.name, t.shape, t.kind.name, t.nbytes) for t in checkpoint.tensors.values()]
        return checkpoint.config, rows

    # ---- which formats -------------------------------------------------------------------------------

    @abstractmethod
    def reason(self, format: Format) -> str | None:
        """None if the file type supports the format exactly; else what is not supported."""

    def fits(self, format: Format, shape: Shape) -> bool:
        """Whether it supports a weight of this shape in the format."""
        try:
            format.check_shape(*shape, "weight")
        except FewbitsError:
            return False
        return self.reason(format) is None

    @cached_property
    def carries_formats(self) -> bool:
        """Whether it supports any format besides floats."""
        return any(self.reason(format) is None for format in _registered())

    def nearest(self, format: Format, shape: Shape = USUAL) -> Kind:
        """The substitute for an unsupported format: the registered one of the nearest size, preferably
        larger, of the same kind (uniform, with a zero point or offset); bf16 if there is none.

        A refusal names it, and `convert --requantize` quantizes to it.
        """
        fits = [other for other in _candidates(format) if self.fits(other, shape)]
        return min(fits, key=lambda other: _distance(format, other), default=BF16)

    def refusal(self, format: Format, shape: Shape = USUAL) -> str | None:
        """None if the format is supported; else a sentence with the reason and the nearest format."""
        reason = self.reason(format)
        if reason is None:
            return None
        where, near = self.where.format(name=self.name), self.nearest(format, shape)
        return (
            f"{where} does not support {format.name} ({reason}); the nearest supported format is {near.name}"
        )

    # ---- writing -------------------------------------------------------------------------------------

    def with_runtime(self, activations: str | None = None, kv_cache: str | None = None) -> FileType:
        """This file type with schemes for activations and the KV cache; PlanError if it cannot record
        them."""
        for what, scheme in (("activations", activations), ("a scheme of the KV cache", kv_cache)):
            if scheme is not None:
                raise PlanError(
                    f"{self.where.format(name=self.name)} cannot record {what}; use compressed-tensors or a "
                    "native directory"
                )
        return self

    def plain_kind(self, entry: GGUFEntry, source: LazyTensor | None) -> Kind:
        """The type of an unquantized tensor: that of the source."""
        return source.kind if source else F32

    def check_source(self, checkpoint: Checkpoint) -> None:  # noqa: B027  most types take any architecture
        """ModelError if no model of this architecture can be written."""

    def check_kind(self, out: Path) -> None:
        """FileError if a directory is in the place of a file, or a file in that of a directory."""
        if out.exists() and out.is_dir() == bool(self.suffix):
            kind = "a" if self.suffix else "not a"
            raise FileError(f"{out}: exists and is {kind} directory; choose another output")

    def check_place(self, out: Path, overwrite: bool) -> None:  # noqa: B027  a file is replaced or resumed
        """FileError if `out` has files that must not be overwritten."""

    @abstractmethod
    def lay_out(
        self,
        checkpoint: Checkpoint,
        out: Path,
        entries: Sequence[GGUFEntry],
        kinds: Mapping[str, Kind],
        about: Mapping[str, Any],
    ) -> Output:
        """The output before a byte of it is written. kinds: by entry if `writes_gguf_names`, else by source.
        about: name, recipe and file_type of the output. One FormatError for all unsupported kinds."""

    def default_path(self, stem: str, to: str) -> Path:
        """The default path of an output."""
        return Path(f"{stem}-{to}")

    def receipt_path(self, out: Path) -> Path:
        return out / "receipt.json"

    def card_path(self, out: Path) -> Path:
        return out / "README.md"


FILE_TYPES: Registry[FileType] = Registry("file type", FileError)


def _registered() -> list[Format]:
    """The formats that can replace others; none in act order, which needs text."""
    return [format for _, format in FORMATS.items() if format.ordered is None]


def _candidates(format: Format) -> list[Format]:
    """Candidates near a format: all registered ones, and integers with groups of the same size."""
    plain = format.ordered or format
    if not isinstance(plain, Affine) or plain.cells.rows != 1:
        return _registered()
    group = "channel" if plain.cells.columns is None else f"g{plain.cells.columns}"
    names = [f"int{bits}_{group}{zero}" for bits in range(2, 9) for zero in ("", "_asym")]
    return [*map(FORMATS.get, names), *_registered()]


def _traits(format: Format) -> tuple[bool, bool]:
    """Whether it is uniform, and whether it has a zero point or an offset."""
    plain = format.ordered or format
    if isinstance(plain, Affine):
        return True, plain.zero != "none"
    return isinstance(plain, Ggml) and plain.kind in ("symmetric", "affine"), (
        isinstance(plain, Ggml) and plain.kind == "affine"
    )


def _weights_a_scale(format: Format) -> int:
    """The number of weights that share a scale, for a usual shape."""
    cells = getattr(format, "cells", None)
    if cells is None:
        return int(getattr(format, "group", format.block))
    return (cells.columns or USUAL[1]) * (cells.rows or USUAL[0])


def _distance(format: Format, other: Format) -> float:
    """The distance of two formats; independent of the shape, because engines need equal formats for q, k and
    v."""
    plain = format.ordered or format
    ratio = log2(other.bits_per_weight(*USUAL) / plain.bits_per_weight(*USUAL))
    (even, offset), (other_even, other_offset) = _traits(plain), _traits(other)
    making = 0.1 * ((even != other_even) + (offset != other_offset) + (offset > other_offset))
    coarser = log2(_weights_a_scale(other) / _weights_a_scale(plain))
    return (ratio if ratio >= 0 else -2.5 * ratio) + making + 0.05 * max(0, coarser)


def gathered(faults: Mapping[str, Sequence[str]]) -> list[str]:
    """Faults and their tensors -> one line per fault."""
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {fault}"
        for fault, names in faults.items()
    ]
