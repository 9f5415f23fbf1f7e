"""Opens a model of any file type, which is recognized by its content; this module registers all of them."""

from __future__ import annotations

from pathlib import Path

from ..errors import FileError
from ..storage.packed import READERS, SUFFIX, Contents
from .awq import AWQ_DIRECTORY
from .bitsandbytes import BITSANDBYTES
from .checkpoint import Checkpoint
from .compressed_tensors.filetype import COMPRESSED_TENSORS
from .directory import Directory
from .experts import split_experts
from .filetype import FILE_TYPES, FileType, Probe
from .fp8 import FP8
from .gguf.filetype import GGUF_FILE
from .gptq import GPTQ_V1, GPTQ_V2
from .huggingface import HUGGINGFACE, holds_floats
from .mlx import MLX_DIRECTORY
from .native import NATIVE
from .onnx.filetype import ONNX
from .side_files import check_links

for _file_type in (
    GGUF_FILE, NATIVE, HUGGINGFACE, GPTQ_V1, GPTQ_V2, AWQ_DIRECTORY, COMPRESSED_TENSORS, BITSANDBYTES, FP8,
    MLX_DIRECTORY, ONNX,
):  # fmt: skip
    FILE_TYPES.add(_file_type.name, _file_type)


def _read_packed(path: Path) -> Contents:
    from ..packing import open_packed  # only for those who have packed files: it imports torch

    return open_packed(path)


READERS[SUFFIX] = _read_packed

__all__ = ["FILE_TYPES", "GGUF_FILE", "as_checkpoint", "file_type_at", "open_checkpoint"]


def as_checkpoint(model: Checkpoint | str | Path) -> Checkpoint:
    """A model that is open already, or the one at a path."""
    return model if isinstance(model, Checkpoint) else open_checkpoint(Path(model))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A directory or file of any type -> Checkpoint; experts one weight each. Only headers are read.

    >>> model = fewbits.open(tiny)
    >>> model.tensors["model.norm.weight"].shape
    (256,)
    >>> model.tensors["model.norm.weight"].load().dtype
    torch.float32
    """
    path = Path(path)
    return split_experts(file_type_at(path).open(path))


def file_type_at(path: str | Path) -> FileType:
    """The type of the file or directory at `path`, by its content; FileError for anything else."""
    check_links(Path(path))
    probe = Probe(Path(path))
    known = [file_type for _, file_type in FILE_TYPES.items()]
    # Types that are marked by a separate file precede those in config.json.
    known.sort(key=lambda file_type: not getattr(file_type, "marks", ()))
    match = next((file_type for file_type in known if file_type.recognizes(probe)), None)
    if match is not None:
        return match
    if probe.has("config.json") and holds_floats(probe.path):
        return HUGGINGFACE
    if probe.has("config.json"):
        methods = sorted({t.method for t in known if isinstance(t, Directory) and t.method})
        method = str((probe.quantization or {}).get("quant_method"))[:40]
        raise FileError(
            f"{path}: config.json says quant_method {method!r}; supported: {', '.join(methods)}; load it "
            "with the tool that wrote it, or quantize the original float model"
        )
    if probe.has("adapter_config.json"):
        raise FileError(
            f"{path}: is a LoRA adapter and no model; merge it with its model first (fewbits merge MODEL "
            f"{path} -o DIR, or peft's merge_and_unload), then give DIR"
        )
    if probe.directory:
        raise FileError(f"{path}: has no config.json; give a model directory or a .gguf file")
    if probe.path.suffix in (".safetensors", ".onnx"):
        raise FileError(f"{path}: is one file of a model; give its directory, with config.json")
    raise FileError(f"{path}: is neither a GGUF file (it begins {probe.magic!r}) nor a model directory")
