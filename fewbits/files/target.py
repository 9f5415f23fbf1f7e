"""What an output consists of before a byte of it is written: its layout, and the work that fills it.

A target is one StreamFile (a GGUF file, or the file of all arrays in a directory), the jobs
that fill it, and the small files beside it. A job is one tensor of the output:

    sources (Hugging Face names)  ->  load, reorder rows, add  ->  encode or cast  ->  spans of the file

GGUF stacks the experts of a block in one tensor, so a job may have many sources and fills its single
span with one chunk for each; in a native directory every plane of a tensor is a span of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gguf.constants import Keys

from ..errors import FileError, FormatError, raise_all
from ..formats import FLOATS, FORMATS
from ..formats.base import Format
from ..formats.ggml import Ggml
from ..model.archs import Architecture, GGUFEntry, rope_rows
from ..qtensor import QTensor
from ..storage.atomic import write_atomic
from ..storage.stream import Span
from .checkpoint import Checkpoint
from .gguf.file import gguf_header, gguf_nbytes
from .gguf.metadata import gguf_metadata, side_files_from_keys
from .layout import Layout, gathered, is_plain, laid_out, others_files, planes_of

ALIGNMENT = 32
NEAREST = {"int4": "q4_0 or q4_1", "int8": "q8_0", "int5": "q5_1", "int6": "q6_k", "int3": "q3_k",
           "int2": "q2_k", "nf4": "iq4_nl", "fp4": "iq4_nl", "mxfp4": "mxfp4_ggml", "nvfp4": "mxfp4_ggml",
           "fp8": "q8_0", "mxfp8": "q8_0", "mxfp6": "q6_k"}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One tensor of the output. `format`: a float dtype name or a format; `entry` for GGUF only. pack: a
    weight as the arrays of its spans."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    format: str
    spans: tuple[str, ...]
    entry: GGUFEntry | None = None
    pack: Callable[[QTensor], tuple[torch.Tensor, ...]] = planes_of

    def shaped(self, value: torch.Tensor | QTensor) -> torch.Tensor | QTensor:
        """One source as this output wants it: rows reordered, the constant added."""
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
class Target:
    """A file to be written: `header`, `spans`, the jobs that fill them, and `finish` for the rest, which is
    given what only the finished run knows (native directories keep it in their index).

    told: the jobs, once that is known. runtime: what it is told besides, by kind: a record that the input
    has, or the name of a scheme that is yet to be measured. notes: for the receipt. stale: what speaks of
    the output that this one replaces, and must be gone before it is in place.
    """

    path: Path
    header: bytes
    spans: Sequence[Span]
    jobs: tuple[Job, ...]
    receipt: Path
    finish: Callable[[Mapping[str, Any]], None]
    align: int = 1
    notes: tuple[str, ...] = ()
    stale: tuple[Path, ...] = ()
    told: Callable[[Mapping[str, Any]], tuple[Job, ...]] | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)


def nearest_ggml(name: str) -> str:
    """What GGUF has for a format that it cannot carry."""
    for prefix in sorted(NEAREST, key=len, reverse=True):
        if name.startswith(prefix):
            return NEAREST[prefix]
    return "q8_0"


def ggml_type(format: str) -> str:
    """Format name -> the name of the GGUF tensor type; FormatError for one that GGUF cannot carry."""
    if format in FLOATS:
        return format
    found = FORMATS.get(format)
    if not isinstance(found, Ggml):
        raise FormatError(
            f"a GGUF file cannot carry {format}; the nearest it has is {nearest_ggml(format)} (quantize the "
            "float model to that), or keep the native directory"
        )
    return found.type_name


def gguf_refusal(format: Format) -> str | None:
    """None where GGUF carries the format; else why not."""
    try:
        ggml_type(format.name)
    except FormatError as error:
        return str(error)
    return None


def gguf_target(
    checkpoint: Checkpoint,
    path: Path,
    entries: Sequence[GGUFEntry],
    formats: Mapping[str, str],
    arch: Architecture | None,
    file_type: int | None,
) -> Target:
    """A GGUF file: `entries` in order, each in `formats[entry.name]`; one span an entry."""
    infos, jobs = [], []
    refused: dict[str, list[str]] = {}
    for entry in entries:
        shape = entry_shape(checkpoint, entry)
        try:
            type_name = ggml_type(formats[entry.name])
        except FormatError as error:
            refused.setdefault(str(error), []).append(entry.name)
            continue
        infos.append((entry.name, shape, type_name))
        jobs.append(Job(entry.name, entry.sources, shape, formats[entry.name], (entry.name,), entry))
    raise_all(FormatError, str(path), gathered(refused))
    header, offsets = gguf_header(gguf_metadata(checkpoint, arch, file_type), infos)
    spans = [
        Span(name, offset, gguf_nbytes(kind, shape))
        for (name, shape, kind), offset in zip(infos, offsets, strict=True)
    ]
    receipt = path.with_name(path.name + ".receipt.json")
    return Target(path, header, spans, tuple(jobs), receipt, lambda found: None, ALIGNMENT, stale=(receipt,))


def entry_shape(checkpoint: Checkpoint, entry: GGUFEntry) -> tuple[int, ...]:
    """The shape of a GGUF tensor: its source's, with the experts stacked in front."""
    if not entry.sources:
        return (len(entry.values),)
    shapes = {checkpoint.tensors[name].shape for name in entry.sources}
    if len(shapes) > 1:
        raise FileError(f"{entry.name}: its sources have different shapes {sorted(shapes)}")
    shape = shapes.pop()
    return shape if len(entry.sources) == 1 else (len(entry.sources), *shape)


def directory_target(
    checkpoint: Checkpoint,
    directory: Path,
    formats: Mapping[str, str],
    layout: Layout,
    about: Mapping[str, Any],
) -> Target:
    """A directory of one layout: every tensor of the checkpoint, each in `formats[name]`."""
    layout = layout.of(checkpoint.config)
    rows = {name: (formats[name], tensor.shape) for name, tensor in checkpoint.tensors.items()}
    header, spans, keys = laid_out(layout, rows)
    small = layout.settings(rows, checkpoint.config, about)
    jobs = tuple(
        Job(name, (name,), shape, kind, keys[name], pack=layout.pack) for name, (kind, shape) in rows.items()
    )

    def told(found: Mapping[str, Any]) -> tuple[Job, ...]:
        return tuple(
            job if is_plain(job.format) else replace(job, pack=layout.packer(job.name, found)) for job in jobs
        )

    side_files = {name: file for name, file in side_files_of(checkpoint).items() if name != "README.md"}

    def finish(found: Mapping[str, Any]) -> None:
        copy_side_files(side_files, directory)
        for name, content in layout.settings(rows, checkpoint.config, {**about, **found}).items():
            if not isinstance(content, bytes):
                text = json.dumps(content, indent=2 if name == "config.json" else 1, ensure_ascii=False)
                content = text.encode() + b"\n"
            write_atomic(directory / name, content)

    receipt = directory / "receipt.json"
    stale = (*(directory / name for name in [*small, *others_files(layout)]), receipt)
    return Target(directory / layout.weights, header, spans, jobs, receipt, finish, stale=stale, told=told)


def copy_side_files(files: Mapping[str, Path | bytes], directory: Path) -> None:
    """Write `files` (paths are copied) into `directory`."""
    for name, source in files.items():
        try:
            data = source if isinstance(source, bytes) else source.read_bytes()
        except OSError as error:
            raise FileError(f"{source!s}: cannot be read: {error.strerror}") from error
        write_atomic(directory / name, data)


def side_files_of(checkpoint: Checkpoint) -> Mapping[str, Path | bytes]:
    """Tokenizer, template and the like: the source's files, or made of a GGUF file's keys."""
    if checkpoint.kind != "gguf" or not checkpoint.config:
        return checkpoint.side_files
    keys = {
        name: value.plain() for name, value in checkpoint.metadata.items() if name.startswith("tokenizer.")
    }
    return side_files_from_keys(keys) if Keys.Tokenizer.LIST in keys else {}
