"""File types: where the bytes of a checkpoint lie."""

from pathlib import Path
from typing import Literal

from ..errors import FileError
from .json_object import regular_size

__all__ = ["open_file_type"]


def open_file_type(path: Path) -> Literal["huggingface", "gguf", "native"]:
    """Which file type lies at `path`, by its content; FileError for anything else."""
    path = Path(path)
    if path.is_dir():
        if (path / "fewbits.json").is_file():
            return "native"
        if (path / "config.json").is_file():
            return "huggingface"
        raise FileError(
            f"{path}: has neither config.json nor fewbits.json; give a model directory or a .gguf file"
        )
    regular_size(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    if magic == b"GGUF":
        return "gguf"
    if path.suffix == ".safetensors":
        raise FileError(f"{path}: is one file of a model; give its directory, with config.json")
    raise FileError(f"{path}: is neither a GGUF file (it begins {magic!r}) nor a model directory")
