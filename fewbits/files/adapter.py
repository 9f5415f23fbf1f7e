"""Low-rank adapters (LoRA) in the directories of PEFT, read without it.

    adapter_config.json          r, lora_alpha, use_rslora, base_model_name_or_path ...
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, k), .lora_B.weight (n, r)

    W + scale B A                scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

What changes a model in another way (DoRA's magnitudes, trained biases or whole modules, an initialization
that moves the model's own weights ...) is refused by name.
Sources: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; PEFT, docs/source/developer_guides/checkpoint.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from ..errors import FileError, ModelError, raise_all
from ..lazy import torch
from ..storage.json import read_json_object
from ..storage.safetensors import map_tensor, read_header
from .checkpoint import Checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_OTHER = (
    "use_dora", "alpha_pattern", "lora_bias", "modules_to_save", "trainable_token_indices",
    "target_parameters", "layer_replication", "fan_in_fan_out", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "megatron_config", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config",
)  # fmt: skip
"""fields of adapter_config.json that, if set, make the adapter more than W + scale B A"""
_MOVES = ("pissa", "olora", "corda", "lora_ga")
"""values of init_lora_weights that begin so take what A and B begin with out of W"""


@dataclass(frozen=True)
class LowRank:
    """What is added to one weight `(n, k)`: scale B A. a `(r, k)`, b `(n, r)`, f32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def product(self) -> torch.Tensor:
        """-> `(n, k)` f32."""
        return self.scale * (self.b @ self.a)


@dataclass(frozen=True)
class Adapter:
    """base: the model it was trained on, as its config names it. weights: by the name of the weight that each
    is added to, as transformers names it."""

    path: Path
    base: str
    weights: Mapping[str, LowRank]

    def check_fits(self, checkpoint: Checkpoint) -> None:
        """ModelError that lists what the adapter adds to and the model does not have, or has in another
        shape."""
        faults = []
        for name, added in self.weights.items():
            tensor = checkpoint.tensors.get(name)
            if tensor is None:
                faults.append(f"adds to {name}, which the model does not have")
            elif tensor.shape != added.shape:
                faults.append(f"adds {added.shape} to {name}, which is {tensor.shape} in the model")
        way = f"give the model that it was trained on ({self.base or 'its config names none'})"
        raise_all(ModelError, f"{self.path} is not of {checkpoint.path}; {way}", faults, limit=6)


def is_adapter(path: Path) -> bool:
    return (path / CONFIG).is_file()


def open_adapter(path: str | Path) -> Adapter:
    """A directory of PEFT -> Adapter, its factors in memory.

    FileError for a damaged one, with every fault; ModelError for one that is not LoRA, or more than that."""
    path = Path(path)
    if not is_adapter(path):
        raise FileError(f"{path}: has no {CONFIG}; give the directory of an adapter that PEFT saved")
    config = read_json_object(path / CONFIG)
    _check_kind(path, config)
    alpha = _alpha(path, config)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    faults = []
    file = path / WEIGHTS
    if not file.is_file():
        raise FileError(f"{path}: has no {WEIGHTS}; save it with PEFT's save_pretrained, as safetensors")
    for name, entry in read_header(file).items():
        match = _NAME.fullmatch(name)
        if match is None:
            faults.append(f"{name!r} is not an A or B of a linear layer")
            continue
        value = map_tensor(file, entry)
        if value.ndim != 2 or not value.is_floating_point() or not value.numel():
            faults.append(f"{name!r} is {entry.dtype} {entry.shape}, floats of two dimensions are needed")
        elif not bool(torch.isfinite(value.float()).all()):
            faults.append(f"{name!r} has values that are NaN or infinite")
        pairs.setdefault(match["module"], {})[match["factor"]] = value
    weights: dict[str, LowRank] = {}
    for module, pair in pairs.items():
        fault = _pair_fault(pair, config)
        if fault:
            faults.append(f"{module}: {fault}")
        elif not faults:
            a, b = pair["A"].float(), pair["B"].float()
            scale = alpha / (sqrt(len(a)) if config.get("use_rslora") else len(a))
            weights[f"{module}.weight"] = LowRank(a, b, scale)
    if not pairs and not faults:
        faults.append("holds no adapter; save it again")
    raise_all(FileError, str(file), faults, limit=6)
    base = config.get("base_model_name_or_path")
    known = "" if base in (None, "None") else str(base)  # PEFT may write None as a word
    return Adapter(path, known, weights)


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type"))[:40]
    if kind != "LORA":
        raise ModelError(f"{path}: is an adapter of kind {kind}; only LORA is supported")
    used = [name for name in _OTHER if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append(f"bias {str(config['bias'])[:20]!r}")
    if str(start := config.get("init_lora_weights")).lower().startswith(_MOVES):
        used.append(f"init_lora_weights {start!r}")
    if used:
        raise ModelError(
            f"{path}: {', '.join(used)}: more than W + scale B A, which is not supported; merge it with PEFT "
            "(merge_and_unload) into the float model, and quantize that"
        )


def _alpha(path: Path, config: Mapping[str, Any]) -> float:
    alpha: Any = config.get("lora_alpha")
    if type(alpha) not in (int, float) or not isfinite(alpha) or alpha <= 0:
        raise FileError(f"{path / CONFIG}: lora_alpha is {str(alpha)[:40]!r}, not positive; damaged file")
    return float(alpha)


def _pair_fault(pair: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> str | None:
    missing = [name for name in "AB" if name not in pair]
    if missing:
        return f"lora_{missing[0]} is missing"
    a, b = pair["A"], pair["B"]
    if a.shape[0] != b.shape[1]:
        return f"A {tuple(a.shape)} and B {tuple(b.shape)} have different ranks"
    if not config.get("rank_pattern") and a.shape[0] != config.get("r"):
        return f"A {tuple(a.shape)} has not the rank of {CONFIG}, {config.get('r')}"
    return None
