"""A Hugging Face model directory: config.json, safetensors in one file or in shards, side files.

    config.json                      the architecture
    model.safetensors                all tensors, or
    NAME.safetensors                 a single file with another name: gptq_model-4bit-128g of AutoGPTQ
    model.safetensors.index.json     {"weight_map": {tensor: "model-00001-of-00003.safetensors", ...}}
    pytorch_model.bin[.index.json]   a pickle of torch, used if there are no safetensors
    tokenizer.json, ...              side files, kept with every output

Only headers are read here; a tensor's bytes are mapped when it is loaded. No pickle is ever executed:
torch_bin.py interprets state dicts, other pickles (`*.pt`, `*.ckpt`) are refused. Outputs of this type have
only floats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FileError, FormatError, raise_all
from ..formats.base import Format
from ..lazy import torch
from ..qtensor import QTensor
from ..storage.json import read_json_object
from ..storage.packed import found_at, plain_name
from ..storage.safetensors import read_header
from .checkpoint import Checkpoint
from .directory import (
    Array,
    Directory,
    FloatEntry,
    Place,
    QuantizedEntry,
    Shape,
    Stored,
    module_of,
    open_tensors,
)
from .filetype import Probe, quantization_of
from .side_files import describe_files, find_side_files
from .torch_bin import read_torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LEFT_OVER = "config.json has a quantization_config ({}), but all weights are plain floats: it is dropped"
IN_TRAINING = ".latent"  # how prepare_qat's weights end
BIN = "pytorch_model.bin"  # in shards: BIN.index.json


class Floats(Directory):
    """The directory without quantization, which every tool reads."""

    name = "huggingface"
    engines = ("transformers", "vLLM+cpu")
    run = "AutoModelForCausalLM.from_pretrained({name!r})"

    def recognizes(self, probe: Probe) -> bool:
        return probe.has("config.json") and probe.quantization is None

    def reason(self, format: Format) -> str | None:
        return "it holds floats only"

    def arrays(self, name: str, format: Format, shape: Shape) -> list[Array]:
        raise FormatError(f"{name}: {self.refusal(format)}")

    def pack(self, q: QTensor) -> tuple[torch.Tensor, ...]:
        raise FormatError(self.refusal(q.format) or "")

    def unpack(self, format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
        raise FormatError(self.refusal(format) or "")

    def settings(
        self, rows: Mapping[str, Stored], config: Mapping[str, Any], about: Mapping[str, Any]
    ) -> dict[str, Mapping[str, Any]]:
        return {"config.json": config}

    def find(
        self, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> dict[str, QuantizedEntry | FloatEntry]:
        faults += [
            f"{name} is {place.entry.dtype}{_with_scales(name, places)}, and nothing says how it was "
            "quantized (quantization_config in config.json); load it with the tool that wrote it, or use the "
            "float model"
            for name, place in places.items()
            if _quantized(name, place, places)
        ]
        if any(name.endswith(IN_TRAINING) for name in places):
            faults.append(
                "saved from a model that fewbits.prepare_qat changed; load the model that it was made of, "
                "call prepare_qat, then load_state_dict with this file, and write it with fewbits.export"
            )
        return {}


HUGGINGFACE = Floats()
_PLAIN = {"F64", "F32", "F16", "BF16", "BOOL", "I64", "U64"}


def _quantized(name: str, place: Place, places: Mapping[str, Place]) -> bool:
    """Whether an array is codes of another tool: integers, or fp8 under scales. fp8 alone is a float; a mask
    or a table of positions has one row, or 64 bits."""
    dtype, shape = place.entry.dtype, place.entry.shape
    if len(shape) < 2 or shape[0] == 1 or dtype in _PLAIN:
        return False
    return dtype not in ("F8_E4M3", "F8_E5M2") or bool(_with_scales(name, places))


def _with_scales(name: str, places: Mapping[str, Place]) -> str:
    parts = (f"{name}_scale", f"{name}_scale_inv", f"{module_of(name)}.scale", f"{module_of(name)}.scales")
    found = next((part for part in parts if part in places), None)
    return f" under {found}" if found else ""


def holds_floats(path: Path) -> bool:
    """Whether a directory has plain weights only, whatever its quantization settings say."""
    return not _any_quantized(_places(path, *_weight_files(path)))


def _any_quantized(places: Mapping[str, Place]) -> bool:
    return any(_quantized(name, place, places) for name, place in places.items())


def open_directory(path: Path, file_type: Directory) -> Checkpoint:
    """A directory of the type in its config -> Checkpoint; FileError with every missing shard and tensor."""
    path = Path(path)
    config = read_json_object(path / "config.json")
    settings = quantization_of(path, config)
    files, weight_map = _weight_files(path)
    places = _places(path, files, weight_map)
    metadata = file_type.read_runtime(settings or {}, places)
    left_over = settings is not None and not metadata.keys() - {"unread"} and not _any_quantized(places)
    return Checkpoint(
        path,
        file_type,
        open_tensors(file_type, settings or {}, places, path),
        config,
        side_files=find_side_files(path),
        metadata={} if left_over else metadata,
        provenance=describe_files(path, "huggingface", [path / "config.json", *files]),
        notes=(LEFT_OVER.format(str((settings or {}).get("quant_method"))[:40]),) if left_over else (),
    )


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files, and tensor -> file name from the index (empty without one)."""
    for single, index in ((SINGLE, INDEX), (BIN, f"{BIN}.index.json")):
        if (whole := found_at(path / single)).is_file():
            return [whole], {}
        if (path / index).is_file():
            return _shards(path, path / index, Path(single).suffix)
    named = [file for file in path.glob("*.safetensors") if not file.name.startswith("adapter_")]
    if len(named) == 1 and named[0].is_file():
        return named, {}
    pickles = sorted(file.name for file in path.glob("*") if file.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        raise FileError(
            f"{path}: holds only pickles ({', '.join(pickles[:3])}), which are never loaded: they can run "
            "code; if you trust them, load the model with transformers and save it: "
            "save_pretrained(DIR) writes safetensors"
        )
    if shards := sorted(file.name for file in named if "-of-" in file.name):
        raise FileError(f"{path}: has {len(shards)} files ({shards[0]} ...), but no {INDEX}; fetch that too")
    raise FileError(f"{path}: has neither {SINGLE} nor {INDEX}; is this a model directory?")


def _shards(path: Path, index: Path, suffix: str) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{index}: has no weight_map of tensors to files; fetch it again")
    names = sorted({str(name) for name in weight_map.values()})
    # A shard must be beside its index: a name with a path could be anywhere.
    faults = [
        f"shard name {name!r} is not a plain file name" for name in names if not _is_plain(name, suffix)
    ]
    raise_all(FileError, str(index), faults)
    files = [found_at(path / name) for name in names]
    missing = [f"{file.name} is missing; fetch it too" for file in files if not file.is_file()]
    raise_all(FileError, str(path), missing)
    return files, weight_map


def _is_plain(name: str, suffix: str) -> bool:
    return name.endswith(suffix) and "/" not in name and "\\" not in name and "\0" not in name


def _places(path: Path, files: list[Path], weight_map: dict[str, str]) -> dict[str, Place]:
    """The arrays of all files; if the index names a file for an array, of that file."""
    faults: list[str] = []
    tensors: dict[str, Place] = {}
    for file in files:
        for name, entry in (read_torch if file.suffix == ".bin" else read_header)(file).items():
            if weight_map.get(name, plain_name(file)) != plain_name(file):
                continue
            if name in tensors:
                faults.append(f"tensor {name!r} is in {tensors[name].file.name} and in {file.name}")
            tensors[name] = Place(file, entry)
    faults += [f"tensor {name!r} is not in {weight_map[name]}" for name in weight_map if name not in tensors]
    raise_all(FileError, str(path), faults)
    return tensors
