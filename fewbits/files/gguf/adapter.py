"""Low-rank adapters as GGUF, which llama.cpp adds to a model when it runs (--lora).

    general.type = "adapter"   adapter.type = "lora"   adapter.lora.alpha   general.architecture: the model's
    <tensor>.lora_a  (r, k)    <tensor>.lora_b  (n, r)    f32; <tensor> as the model's file names it

llama.cpp adds alpha / r B A x. Rows of B follow those of the tensor: where q and k of a llama are reordered
in its file (rope_rows), B is too.
Sources: llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gguf.constants import GGUFType, Keys

from ...errors import FileError, ModelError, raise_all
from ...lazy import torch
from ...model.archs import GGUFEntry, gguf_entries, require_architecture, rope_rows
from ...storage.atomic import as_bytes, make_directory, write_file_atomic
from ..adapter import Adapter
from ..checkpoint import Checkpoint
from .file import gguf_header
from .metadata import f32, text


def write_adapter(adapter: Adapter, base: Checkpoint, out: Path, overwrite: bool = False) -> int:
    """Write an adapter for the GGUF file of `base`, whose config and names decide the layout -> its bytes.

    FileError for what is in the way. ModelError for an adapter of another model, an architecture that GGUF
    export does not know, and what a model's file stacks or shares."""
    if out.exists() and (not overwrite or out.is_dir()):
        raise FileError(f"{out}: exists; choose another output or pass --overwrite")
    arch = require_architecture(base.config)
    adapter.check_fits(base)
    entries = _entries(adapter, base)
    alphas = [added.scale * added.rank for added in adapter.weights.values()]
    metadata = {
        Keys.General.ARCHITECTURE: text(arch.gguf),
        Keys.General.TYPE: text(GGUFType.ADAPTER),
        Keys.General.NAME: text(adapter.path.resolve().name),
        Keys.Adapter.TYPE: text("lora"),
        Keys.Adapter.LORA_ALPHA: f32(alphas[0]),
    }
    tensors: dict[str, torch.Tensor] = {}
    for added, entry, alpha in zip(adapter.weights.values(), entries, alphas, strict=True):
        b = added.b * (alpha / alphas[0])  # ranks differ, and so may what alpha has to be
        if entry.rows == "rope":
            b = b[rope_rows(b.shape[0], entry.heads)]
        tensors |= {f"{entry.name}.lora_a": added.a, f"{entry.name}.lora_b": b}
    header, offsets = gguf_header(metadata, [(name, tuple(t.shape), "f32") for name, t in tensors.items()])
    make_directory(out.parent)
    write_file_atomic(out, _parts(header, list(tensors.values()), offsets))
    return out.stat().st_size


def _entries(adapter: Adapter, base: Checkpoint) -> list[GGUFEntry]:
    """The tensor of the model's file for each weight of the adapter."""
    arch = require_architecture(base.config)
    found = {
        source: entry for entry in gguf_entries(arch, base.config, base.tensors) for source in entry.sources
    }
    faults = [
        f"{name} has no tensor of its own in a GGUF file of this model"
        for name in adapter.weights
        if name not in found or len(found[name].sources) > 1
    ]
    way = "merge it into its model (`fewbits merge`), and convert that"
    raise_all(ModelError, f"{adapter.path}: GGUF cannot hold it; {way}", faults, limit=6)
    return [found[name] for name in adapter.weights]


def _parts(header: bytes, tensors: list[torch.Tensor], offsets: list[int]) -> Iterator[bytes | memoryview]:
    yield header
    end = len(header)
    for tensor, offset in zip(tensors, offsets, strict=True):
        yield bytes(offset - end)
        yield as_bytes(tensor.float())
        end = offset + 4 * tensor.numel()
    yield bytes(-end % 32)
