"""Opening a model of any file type, which is told by its content.

    directory with fewbits.json      native         native.py
    directory with config.json       huggingface    huggingface.py
      and model.onnx, no weights     onnx           onnx.py
    file that begins with "GGUF"     gguf           gguf_model.py

A new file type to read is a row of OPENERS and a test of content in `open_file_type`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ..errors import FileError
from ..storage.mapped import first_bytes
from . import (
    awq,  # noqa: F401  they register their layouts
    bitsandbytes,  # noqa: F401  they register their layouts
    fp8,  # noqa: F401  they register their layouts
    gptq,  # noqa: F401  they register their layouts
    mlx,  # noqa: F401  they register their layouts
)
from .checkpoint import Checkpoint
from .compressed_tensors import layout as compressed  # noqa: F401  they register their layouts
from .experts import split_experts
from .gguf.model import open_gguf
from .huggingface import BIN, INDEX, SINGLE, open_huggingface
from .native import open_native
from .onnx.layout import GRAPH, open_onnx

FileType = Literal["huggingface", "gguf", "native", "onnx"]
OPENERS: dict[FileType, Callable[[Path], Checkpoint]] = {
    "gguf": open_gguf,
    "onnx": open_onnx,
    "native": lambda path: split_experts(open_native(path)),
    "huggingface": lambda path: split_experts(open_huggingface(path)),
}


def open_checkpoint(path: Path) -> Checkpoint:
    """A directory or file of any type above -> Checkpoint; experts one weight each. Only headers are read.

    >>> model = fewbits.open(tiny)
    >>> model.tensors["model.norm.weight"].shape
    (256,)
    >>> model.tensors["model.norm.weight"].load().dtype
    torch.float32
    """
    path = Path(path)
    return OPENERS[open_file_type(path)](path)


def open_file_type(path: Path) -> FileType:
    """Which file type lies at `path`, by its content; FileError for anything else."""
    path = Path(path)
    if path.is_dir():
        if (path / "fewbits.json").is_file():
            return "native"
        if (path / "config.json").is_file():
            weights = any((path / name).exists() for name in (SINGLE, INDEX, BIN, f"{BIN}.index.json"))
            return "onnx" if (path / GRAPH).is_file() and not weights else "huggingface"
        raise FileError(
            f"{path}: has neither config.json nor fewbits.json; give a model directory or a .gguf file"
        )
    magic = first_bytes(path, 4)
    if magic == b"GGUF":
        return "gguf"
    if path.suffix in (".safetensors", ".onnx"):
        raise FileError(f"{path}: is one file of a model; give its directory, with config.json")
    raise FileError(f"{path}: is neither a GGUF file (it begins {magic!r}) nor a model directory")
