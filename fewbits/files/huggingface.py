"""A Hugging Face model directory: config.json, safetensors in one file or in shards, side files.

    config.json                      the architecture
    model.safetensors                all tensors, or
    model.safetensors.index.json     {"weight_map": {tensor: "model-00001-of-00003.safetensors", ...}}
    tokenizer.json, ...              side files, kept with every output

Only headers are read here; a tensor's bytes are mapped when it is loaded. Pickles (`*.bin`, `*.pt`)
are never loaded: opening one can run any code.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..errors import FileError, raise_all
from .base import Checkpoint, LazyTensor
from .json_object import read_json_object
from .safetensors import Entry, map_tensor, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

SIDE_FILES = (
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)


def open_huggingface(path: Path) -> Checkpoint:
    """A model directory -> Checkpoint; every missing shard and tensor in one FileError."""
    path = Path(path)
    config = read_json_object(path / "config.json")
    files, weight_map = _weight_files(path)
    tensors = _tensors(path, files, weight_map)
    return Checkpoint(
        path,
        "huggingface",
        tensors,
        config,
        side_files=find_side_files(path),
        provenance=describe_files(path, "huggingface", [path / "config.json", *files]),
    )


def find_side_files(path: Path) -> dict[str, Path]:
    """Tokenizer, templates, generation settings and licenses of a model directory: name -> path."""
    found = {file.name: file for pattern in SIDE_FILES for file in path.glob(pattern) if file.is_file()}
    return dict(sorted(found.items()))


def describe_files(path: Path, kind: str, files: list[Path]) -> dict[str, Any]:
    """What a receipt says of an input: where it lay, of which type, its files and their sizes."""
    sizes = [{"name": file.name, "nbytes": file.stat().st_size} for file in files]
    return {"reference": str(path), "type": kind, "files": sizes}


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files, and tensor -> file name as the index has it (empty without one)."""
    if (path / SINGLE).is_file():
        return [path / SINGLE], {}
    if (path / INDEX).is_file():
        weight_map = read_json_object(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FileError(f"{path / INDEX}: has no weight_map of tensors to files; fetch it again")
        names = sorted({str(name) for name in weight_map.values()})
        # A shard lies beside its index: a name with a path in it would reach anywhere.
        faults = [f"shard name {name!r} is not a plain file name" for name in names if not _is_plain(name)]
        raise_all(FileError, str(path / INDEX), faults)
        missing = [f"{name} is missing; fetch it too" for name in names if not (path / name).is_file()]
        raise_all(FileError, str(path), missing)
        return [path / name for name in names], weight_map
    pickles = sorted(file.name for file in path.glob("*") if file.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        raise FileError(
            f"{path}: holds only pickles ({', '.join(pickles[:3])}), which are never loaded: they can run "
            "code; where you trust them, load the model with transformers and save it: "
            "save_pretrained(DIR) writes safetensors"
        )
    raise FileError(f"{path}: has neither {SINGLE} nor {INDEX}; is this a model directory?")


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and "\\" not in name and "\0" not in name


def _tensors(path: Path, files: list[Path], weight_map: dict[str, str]) -> dict[str, LazyTensor]:
    """The tensors of all files; where the index names a file for one, of that file."""
    faults: list[str] = []
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if weight_map.get(name, file.name) != file.name:
                continue
            if name in tensors:
                faults.append(f"tensor {name!r} stands in {tensors[name].file} and in {file.name}")
            tensors[name] = lazy_tensor(file, entry)
    faults += [f"tensor {name!r} is not in {weight_map[name]}" for name in weight_map if name not in tensors]
    raise_all(FileError, str(path), faults)
    return tensors


def lazy_tensor(file: Path, entry: Entry) -> LazyTensor:
    """A safetensors entry as a float tensor of a checkpoint."""
    load = partial(map_tensor, file, entry)
    return LazyTensor(entry.name, entry.shape, entry.dtype.lower(), entry.nbytes, file.name, load)
