"""transformers' `fp8`: e4m3 under a scale for each 128 x 128 block, as DeepSeek-V3 and Qwen publish models.

    w (n, k) = e4m3 * scale of its block         despite its name weight_scale_inv is the factor itself

    <module>.weight            e4m3 (n, k)
    <module>.weight_scale_inv  f32  (ceil(n / 128), ceil(k / 128))       bf16 in some models

    config.json   {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic",
                   "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head", ...]}}

Engines also quantize the inputs, each token in groups of 128 columns. No scheme of ours matches that, so it
is listed as unread. transformers derives the rows of a block from rows / scales when it decodes, which is 128
only if 128 divides the rows. So written weights have whole blocks, while weights that are read may end in a
partial block. Scales of powers of two (`scale_fmt: ue8m0`) and experts in fp4 are refused. Source:
transformers 5.24, FineGrainedFP8Config and integrations/finegrained_fp8.py; vLLM 0.33, fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from ..errors import FormatError
from ..formats.base import FORMATS, Format
from ..lazy import torch
from ..model.sites import role_of
from ..qtensor import QTensor
from .compressed_tensors.config import BLOCK, scale_dtype
from .directory import (
    Array,
    Directory,
    FloatEntry,
    Place,
    QuantizedEntry,
    Shape,
    Stored,
    module_of,
)

SCALE = "weight_scale_inv"
_DTYPES = {"F32": "fp8_e4m3_block128", "BF16": "fp8_e4m3_block128_bf16"}


class Fp8(Directory):
    """e4m3 in square blocks."""

    name = "fp8"
    where = "an fp8 directory"
    method = "fp8"
    engines = ("transformers+accelerate", "vLLM")

    def reason(self, format: Format) -> str | None:
        return None if format.name in _DTYPES.values() else f"it holds e4m3 in blocks of {BLOCK} x {BLOCK}"

    def arrays(self, name: str, format: Format, shape: Shape) -> list[Array]:
        n, k = shape
        if n % BLOCK or k % BLOCK:
            raise FormatError(
                f"{name}: {n} x {k} is not in whole blocks of {BLOCK} x {BLOCK}, as readers of fp8 want it; "
                "leave this tensor in float with a rule, or use compressed-tensors"
            )
        return self._arrays(name, format, shape)

    def _arrays(self, name: str, format: Format, shape: Shape) -> list[Array]:
        module, (n, k) = module_of(name), shape
        scales = ceil(n / BLOCK), ceil(k / BLOCK)
        return [
            Array(name, "f8_e4m3", shape),
            Array(f"{module}.{SCALE}", scale_dtype(format), scales),
        ]

    def pack(self, q: QTensor) -> tuple[torch.Tensor, ...]:
        return q.planes["codes"].view(torch.float8_e4m3fn), q.planes["scale"]

    def unpack(self, format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
        return QTensor(format, shape, {"codes": arrays[0].view(torch.uint8), "scale": arrays[1]})

    def settings(
        self, rows: Mapping[str, Stored], config: Mapping[str, Any], about: Mapping[str, Any]
    ) -> dict[str, Mapping[str, Any]]:
        left = [
            module_of(name)
            for name, (kind, shape) in rows.items()
            if not isinstance(kind, Format)
            and len(shape) == 2
            and module_of(name) != name
            and role_of(name) != "embed"
        ]
        settings = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": sorted({*left, "lm_head"}),
        }
        return {"config.json": {**config, "quantization_config": settings}}

    def find(
        self, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> dict[str, QuantizedEntry | FloatEntry]:
        block, scales = config.get("weight_block_size"), config.get("scale_fmt", "float")
        experts = config.get("expert_dtype", "fp8")
        if block != [BLOCK, BLOCK] or scales != "float" or experts != "fp8":
            faults.append(
                f"fp8 with weight_block_size {str(block)[:40]}, scale_fmt {str(scales)[:20]!r}, expert_dtype "
                f"{str(experts)[:20]!r}; supported: blocks of [{BLOCK}, {BLOCK}], float scales and fp8 "
                "experts: use an engine that has these, or the float model"
            )
            return {}
        entries: dict[str, QuantizedEntry | FloatEntry] = {}
        for key, place in places.items():
            module = module_of(key)
            if module == key or place.entry.dtype != "F8_E4M3":
                continue
            shape, scale = place.entry.shape, places.get(f"{module}.{SCALE}")
            if len(shape) != 2 or 0 in shape or (scale is not None and scale.entry.dtype not in _DTYPES):
                kind = "missing" if scale is None else scale.entry.dtype
                faults.append(f"{module}: weight {shape} with scales in {kind} is no weight in e4m3 blocks")
                continue
            format = FORMATS.get(_DTYPES["F32" if scale is None else scale.entry.dtype])
            size = shape[0], shape[1]
            extra = [f"{module}.{part}" for part in ("activation_scale", "input_scale")]
            extra = [key for key in extra if key in places]
            entries[key] = QuantizedEntry(
                format, size, tuple(extra), arrays=tuple(self._arrays(key, format, size))
            )
        return entries

    def read_runtime(self, config: Mapping[str, Any], places: Mapping[str, Place]) -> dict[str, Any]:
        scheme = str(config.get("activation_scheme", "dynamic"))[:20]
        return {"unread": [f"engines quantize the inputs of weights in fp8 ({scheme}): not kept"]}


FP8 = Fp8()
