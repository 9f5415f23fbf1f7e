"""A Hugging Face model directory: config.json, safetensors in one file or in shards, side files.

    config.json                      the architecture
    model.safetensors                all tensors, or
    NAME.safetensors                 the same, the only one: gptq_model-4bit-128g, as AutoGPTQ saved it
    model.safetensors.index.json     {"weight_map": {tensor: "model-00001-of-00003.safetensors", ...}}
    pytorch_model.bin[.index.json]   the same as torch pickled it, where there are no safetensors
    tokenizer.json, ...              side files, kept with every output

Only headers are read here; a tensor's bytes are mapped when it is loaded. No pickle is ever executed:
torch_bin.py reads what a state dict needs of one, other pickles (`*.pt`, `*.ckpt`) are refused.
As an output it holds floats only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import FileError, FormatError, raise_all
from ..formats.base import FLOATS, Format
from ..qtensor import QTensor
from ..storage.json import read_json_object
from ..storage.safetensors import read_header
from .checkpoint import Checkpoint
from .layout import LAYOUTS, Array, Decoded, Held, Kind, Layout, Place, Shape, lazy_tensor, open_tensors
from .torch_bin import read_torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"  # in shards: BIN.index.json

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


class Floats(Layout):
    """The directory without any quantization: what every tool of the field reads."""

    name = "huggingface"

    def refusal(self, format: Format) -> str | None:
        if format.name in FLOATS:
            return None
        return (
            f"a huggingface directory holds floats only, not {format.name}; decode it: "
            "fewbits quantize --to bf16 --file huggingface"
        )

    def arrays(self, name: str, format: Format, shape: Shape) -> list[Array]:
        raise FormatError(f"{name}: {self.refusal(format) or 'floats have no planes'}")

    def pack(self, q: QTensor) -> tuple[torch.Tensor, ...]:
        raise FormatError(f"{self.refusal(q.format) or 'floats have no planes'}")

    def unpack(self, format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
        raise FormatError(f"{self.refusal(format) or 'floats have no planes'}")

    def settings(
        self, rows: Mapping[str, Kind], config: Mapping[str, Any], about: Mapping[str, Any]
    ) -> dict[str, Mapping[str, Any]]:
        return {"config.json": config}

    def find(
        self, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> dict[str, Held | Decoded]:
        return {}


LAYOUTS.add("huggingface", Floats())


def open_huggingface(path: Path) -> Checkpoint:
    """A model directory -> Checkpoint; every missing shard and tensor in one FileError."""
    path = Path(path)
    config = read_json_object(path / "config.json")
    files, weight_map = _weight_files(path)
    places = _places(path, files, weight_map)
    layout, settings = _layout_of(path, config)
    if layout is None:
        tensors = {key: lazy_tensor(*place) for key, place in places.items()}
    else:
        tensors = open_tensors(layout, settings, places, path)
    return Checkpoint(
        path,
        "huggingface",
        tensors,
        config,
        side_files=find_side_files(path),
        metadata={} if layout is None else {"layout": layout.name, **layout.spoken(settings, places)},
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
    for single, index in ((SINGLE, INDEX), (BIN, f"{BIN}.index.json")):
        if (path / single).is_file():
            return [path / single], {}
        if (path / index).is_file():
            return _shards(path, path / index, Path(single).suffix)
    named = [file for file in path.glob("*.safetensors") if not file.name.startswith("adapter_")]
    if len(named) == 1 and named[0].is_file():
        return named, {}
    pickles = sorted(file.name for file in path.glob("*") if file.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        raise FileError(
            f"{path}: holds only pickles ({', '.join(pickles[:3])}), which are never loaded: they can run "
            "code; where you trust them, load the model with transformers and save it: "
            "save_pretrained(DIR) writes safetensors"
        )
    raise FileError(f"{path}: has neither {SINGLE} nor {INDEX}; is this a model directory?")


def _shards(path: Path, index: Path, suffix: str) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{index}: has no weight_map of tensors to files; fetch it again")
    names = sorted({str(name) for name in weight_map.values()})
    # A shard lies beside its index: a name with a path in it would reach anywhere.
    faults = [
        f"shard name {name!r} is not a plain file name" for name in names if not _is_plain(name, suffix)
    ]
    raise_all(FileError, str(index), faults)
    missing = [f"{name} is missing; fetch it too" for name in names if not (path / name).is_file()]
    raise_all(FileError, str(path), missing)
    return [path / name for name in names], weight_map


def _is_plain(name: str, suffix: str) -> bool:
    return name.endswith(suffix) and "/" not in name and "\\" not in name and "\0" not in name


def _layout_of(path: Path, config: dict[str, Any]) -> tuple[Layout | None, dict[str, Any]]:
    """How the weights are laid out and the settings that say so; FileError for a way that is not known."""
    settings = config.pop("quantization_config", None)
    if isinstance(mlx := config.get("quantization"), dict) and "group_size" in mlx:
        settings = config.pop("quantization")  # as mlx-lm does: it names the other one for the same
    for method, file in (("gptq", "quantize_config.json"), ("awq", "quant_config.json")):
        if settings is None and (path / file).is_file():
            settings = {"quant_method": method, **read_json_object(path / file)}
    if settings is None:
        return None, {}
    settings = settings if isinstance(settings, dict) else {}
    for _, layout in LAYOUTS.items():
        if layout.reads(settings):
            return layout, settings
    known = sorted({layout.method for _, layout in LAYOUTS.items() if layout.method})
    raise FileError(
        f"{path}: config.json says quant_method {str(settings.get('quant_method'))[:40]!r}; read are "
        f"{', '.join(known)}: load it with the tool that wrote it, or quantize the original float model"
    )


def _places(path: Path, files: list[Path], weight_map: dict[str, str]) -> dict[str, Place]:
    """The arrays of all files; where the index names a file for one, of that file."""
    faults: list[str] = []
    tensors: dict[str, Place] = {}
    for file in files:
        for name, entry in (read_torch if file.suffix == ".bin" else read_header)(file).items():
            if weight_map.get(name, file.name) != file.name:
                continue
            if name in tensors:
                faults.append(f"tensor {name!r} stands in {tensors[name].file.name} and in {file.name}")
            tensors[name] = Place(file, entry)
    faults += [f"tensor {name!r} is not in {weight_map[name]}" for name in weight_map if name not in tensors]
    raise_all(FileError, str(path), faults)
    return tensors
