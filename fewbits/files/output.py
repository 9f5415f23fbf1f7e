"""An output before a byte of it is written: its layout, and the jobs that fill it.

An Output is one StreamFile (a GGUF file, or the file of all arrays in a directory), the jobs that fill it,
and the small files beside it. A job is one tensor of the output:

    sources (Hugging Face names)  ->  load, reorder rows, add  ->  encode or cast  ->  spans of the file

GGUF stacks the experts of a block in one tensor, so a job may have many sources and fills its single
span with one chunk for each; in a directory every array of a tensor is a separate span.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileError
from ..formats.base import Format, Kind
from ..model.archs import GGUFEntry, rope_rows
from ..qtensor import QTensor
from ..storage.atomic import make_directory, write_atomic
from ..storage.stream import Span
from .checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch


def planes_of(q: QTensor) -> tuple[torch.Tensor, ...]:
    """The planes of a weight, in order."""
    return tuple(q.planes[plane.name] for plane in q.format.planes)


@dataclass(frozen=True)
class Job:
    """One tensor of the output. kind: its number type or format. entry: for GGUF only. pack: a weight -> the
    arrays of its spans."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind
    spans: tuple[str, ...]
    entry: GGUFEntry | None = None
    pack: Callable[[QTensor], tuple[torch.Tensor, ...]] = planes_of

    @property
    def quantized(self) -> bool:
        return isinstance(self.kind, Format)

    def shaped(self, value: torch.Tensor | QTensor) -> torch.Tensor | QTensor:
        """One source in the output's layout: rows reordered, the constant added."""
        entry = self.entry
        if entry is None or (entry.rows is None and not entry.add):
            return value
        if entry.rows == "rope":
            order = rope_rows(value.shape[0], entry.heads)
            value = value.take_rows(order) if isinstance(value, QTensor) else value[order]
        if entry.add:
            value = (value.decode() if isinstance(value, QTensor) else value.float()) + entry.add
        return value


@dataclass(frozen=True)
class Output:
    """A file to be written: `header`, `spans`, the jobs that fill them, and `finish` for the rest, which gets
    the data that only a finished run has (native directories store it in their index).

    measured: the jobs, once runtime schemes are measured. runtime: schemes for the runtime, by kind: a record
    of the input, or the name of a scheme that is not measured yet. notes: for the receipt. stale: files of
    the replaced output, deleted before the new one is in place. config: config.json of a directory."""

    path: Path
    header: bytes
    spans: Sequence[Span]
    jobs: tuple[Job, ...]
    receipt: Path
    finish: Callable[[Mapping[str, Any]], None]
    align: int = 1
    notes: tuple[str, ...] = ()
    stale: tuple[Path, ...] = ()
    measured: Callable[[Mapping[str, Any]], tuple[Job, ...]] | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def entry_shape(checkpoint: Checkpoint, entry: GGUFEntry) -> tuple[int, ...]:
    """The shape of a GGUF tensor: its source's, with the experts stacked in front."""
    if not entry.sources:
        return (len(entry.values),)
    shapes = {checkpoint.tensors[name].shape for name in entry.sources}
    if len(shapes) > 1:
        raise FileError(f"{entry.name}: its sources have different shapes {sorted(shapes)}")
    shape = shapes.pop()
    return shape if len(entry.sources) == 1 else (len(entry.sources), *shape)


def copy_side_files(files: Mapping[str, Path | bytes], directory: Path) -> None:
    """Write `files` (paths are copied) into `directory`."""
    for name, source in files.items():
        try:
            data = source if isinstance(source, bytes) else source.read_bytes()
        except OSError as error:
            raise FileError(f"{source!s}: cannot be read: {error.strerror}") from error
        make_directory((directory / name).parent)
        write_atomic(directory / name, data)


def side_files_of(checkpoint: Checkpoint) -> Mapping[str, Path | bytes]:
    """Tokenizer, template and the like: the source's files, or made from a GGUF file's keys."""
    if not checkpoint.gguf_keys or not checkpoint.config:
        return checkpoint.side_files
    from .gguf.metadata import side_files_from_keys

    keys = {
        name: value.plain() for name, value in checkpoint.gguf_keys.items() if name.startswith("tokenizer.")
    }
    return side_files_from_keys(keys) if "tokenizer.ggml.tokens" in keys else {}
