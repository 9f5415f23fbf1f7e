"""GGUF as a file type: a file of tensors under llama.cpp's names, with all settings in its header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...dtypes import F32, DType
from ...errors import FormatError, raise_all
from ...formats.base import Format, Kind
from ...formats.ggml import Ggml
from ...model.archs import GGUFEntry, architecture, engine_notes, require_architecture
from ...storage.stream import Span
from ..checkpoint import Checkpoint, LazyTensor
from ..filetype import FileType, Probe, gathered
from ..output import Job, Output, entry_shape

ALIGNMENT = 32


class GGUF(FileType):
    """One file that llama.cpp loads: GGML's types, in any mixture."""

    name = "gguf"
    where = "a GGUF file"
    suffix = ".gguf"
    engines: ClassVar[tuple[str, ...]] = ("llama.cpp",)
    run = "llama-cli -m {name} -p 'Once upon a time'"
    library = "gguf"
    tables = True
    writes_gguf_names = True

    def recognizes(self, probe: Probe) -> bool:
        return probe.magic == b"GGUF"

    def open(self, path: Path) -> Checkpoint:
        from .model import open_gguf

        return open_gguf(path)

    def inspect(self, path: Path) -> tuple[Mapping[str, Any], list[tuple[str, tuple[int, ...], str, int]]]:
        from .file import read_gguf

        file = read_gguf(path)
        return file.metadata, [(t.name, t.shape, t.type_name, t.nbytes) for t in file.tensors.values()]

    def reason(self, format: Format) -> str | None:
        return None if isinstance(format, Ggml) else "it holds the types of GGML"

    def plain_kind(self, entry: GGUFEntry, source: LazyTensor | None) -> Kind:
        """llama.cpp keeps vectors, norms and routers in f32."""
        if source is None:
            return F32
        small = len(source.shape) == 1 or "_norm.weight" in entry.name or "ffn_gate_inp" in entry.name
        if not isinstance(source.kind, DType):
            return source.kind
        return F32 if small or not source.kind.weight else source.kind

    def check_source(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.gguf_keys:
            require_architecture(checkpoint.config)

    def lay_out(
        self,
        checkpoint: Checkpoint,
        out: Path,
        entries: Sequence[GGUFEntry],
        kinds: Mapping[str, Kind],
        about: Mapping[str, Any],
    ) -> Output:
        from .file import gguf_header, gguf_nbytes
        from .metadata import gguf_metadata

        infos, jobs = [], []
        refused: dict[str, list[str]] = {}
        for entry in entries:
            shape, kind = entry_shape(checkpoint, entry), kinds[entry.name]
            fault = self.refusal(kind, (shape[-2], shape[-1])) if isinstance(kind, Format) else None
            if fault is not None:
                refused.setdefault(fault, []).append(entry.name)
                continue
            infos.append((entry.name, shape, kind.type_name if isinstance(kind, Ggml) else kind.name))
            jobs.append(Job(entry.name, entry.sources, shape, kind, (entry.name,), entry))
        raise_all(FormatError, str(out), gathered(refused))
        arch = architecture(checkpoint.config)
        header, offsets = gguf_header(gguf_metadata(checkpoint, arch, about["file_type"]), infos)
        spans = [
            Span(name, offset, gguf_nbytes(kind, shape))
            for (name, shape, kind), offset in zip(infos, offsets, strict=True)
        ]
        receipt = self.receipt_path(out)
        notes = tuple(engine_notes(arch, checkpoint.config)) if arch else ()
        return Output(
            out, header, spans, tuple(jobs), receipt, lambda records: None, ALIGNMENT, notes, stale=(receipt,)
        )

    def default_path(self, stem: str, to: str) -> Path:
        return Path(f"{stem}-{to.upper()}.gguf")

    def receipt_path(self, out: Path) -> Path:
        return out.with_name(out.name + ".receipt.json")

    def card_path(self, out: Path) -> Path:
        return out.with_name(out.name + ".README.md")


GGUF_FILE = GGUF()
