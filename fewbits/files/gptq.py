"""GPTQ's layout: integers packed along the input in int32, from AutoGPTQ; GPTQModel, transformers and vLLM
read it.

    w (n, k) = (code - zero) * scale          one scale and zero for each row and group of columns

    <module>.qweight  i32 (k / 32 * bits, n)        codes of a column of w^T, the first in the low bits
    <module>.scales   f16 (groups, n)
    <module>.qzeros   i32 (groups, n / 32 * bits)   zeros; `gptq` stores zero - 1, `gptq_v2` the zero
    <module>.g_idx    i32 (k,)                      the group of each column

Symmetric weights have the zero 2^(bits-1). Readers disagree on the zero 0 in version 1: GPTQModel subtracts
the 1 from whole words (2, 4 and 8 bits), which borrows from the next weight's zero, and adds it to whole
words, as is done here. Readers that add it to each zero decode other values. So `gptq`, which every tool
reads, is written only for symmetric weights, `gptq_v2` for both.

If g_idx does not rise with the columns, the weight is in act order (int4_g128_actorder), whatever the config
says. GPTQModel uses g_idx; vLLM's kernels use it only if `desc_act` is true. So desc_act is true if at least
one weight needs it; for the others g_idx rises and nothing changes.

`dynamic` has the exceptions of modules: "+:regex" changes settings, "-:regex" leaves a module in float; the
first match from the start of a name applies. Further layouts of GPTQModel 7.7 are refused: `gptq_p`, and 5, 6
and 7 bits, whose codes are stored in bit planes. Source: GPTQModel 7.7, quantization/config.py,
utils/model.py and nn_modules/qlinear; vLLM, gptq_marlin.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.pack import pack, unpack
from ..errors import FormatError
from ..formats.affine import Affine
from ..formats.base import FORMATS, Format
from ..lazy import torch
from ..qtensor import QTensor
from ..storage.safetensors import read_integers
from ..version import VERSION
from .directory import (
    Array,
    Directory,
    FloatEntry,
    Place,
    QuantizedEntry,
    Shape,
    Stored,
    module_of,
    stands,
)
from .filetype import ON_CPU
from .integers import (
    from_integers,
    group_of,
    in_order,
    index_of,
    integer_name,
    integers,
    plain_of,
    scale_dtype,
)

BITS = (2, 3, 4, 8)
WORD = 32  # bits, and rows and columns that are packed together
GROUP_SIZE = 128  # default if a config has none: GPTQModel 7.7 and transformers
FORMATS_READ = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class GPTQ(Directory):
    """version: of checkpoint_format: 1 is `gptq`, 2 is `gptq_v2`."""

    version: int
    method = "gptq"
    engines = ("GPTQModel", "transformers+gptqmodel", "vLLM", "vLLM+cpu")
    run = "vllm serve {name}        # or GPTQModel.load({name!r})" + ON_CPU

    @property
    def name(self) -> str:  # type: ignore[override]
        return "gptq" if self.version == 1 else "gptq_v2"

    def reads(self, settings: Mapping[str, Any]) -> bool:
        return settings.get("quant_method") == "gptq" and (_format_name(settings) == "gptq_v2") == (
            self.version == 2
        )

    def reason(self, format: Format) -> str | None:
        plain = plain_of(format)
        if not isinstance(plain, Affine) or plain.zero == "float":
            return "it holds integers with whole zero points"
        faults = []
        if plain.bits not in BITS:
            faults.append(f"{plain.bits} bits")
        if plain.scale_type != "f16":
            faults.append("scales that are not f16")
        if plain.cells.rows != 1:
            faults.append("one scale for the whole tensor")
        if plain.zero == "int" and self.version == 1:
            faults.append("zero points, which gptq_v2 can say to every reader")
        return ", ".join(faults) or None

    def arrays(self, name: str, format: Format, shape: Shape) -> list[Array]:
        plain, (n, k), module = plain_of(format), shape, module_of(name)
        assert isinstance(plain, Affine)
        if k % WORD or n % WORD:
            raise FormatError(
                f"{name}: GPTQ's layout packs {WORD} rows and columns together, {n} x {k} is not whole; "
                "leave this tensor in float with a rule, or use another file type"
            )
        groups = -(-k // group_of(format, k))
        return [
            Array(f"{module}.qweight", "i32", (k // WORD * plain.bits, n)),
            Array(f"{module}.scales", plain.scale_type, (groups, n)),
            Array(f"{module}.qzeros", "i32", (groups, n // WORD * plain.bits)),
            Array(f"{module}.g_idx", "i32", (k,)),
        ]

    def pack(self, q: QTensor) -> tuple[torch.Tensor, ...]:
        codes, scale, zero = integers(q)
        bits = plain_of(q.format).bits  # type: ignore[attr-defined]
        stored = zero.T.contiguous() - int(self.version == 1)
        return (
            pack(codes, bits, torch.int32).T.contiguous(),
            scale.T.contiguous(),
            pack(stored, bits, torch.int32),
            index_of(q),
        )

    def unpack(self, format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
        plain, (qweight, scales, qzeros, index) = plain_of(format), arrays
        assert isinstance(plain, Affine)
        codes = unpack(qweight.T.contiguous(), plain.bits, shape[1])
        whole, added = WORD % plain.bits == 0, int(self.version == 1)
        words = qzeros + added * sum(1 << at for at in range(0, WORD, plain.bits)) if whole else qzeros
        zero = unpack(words.contiguous(), plain.bits, shape[0]).T.contiguous()
        zero = zero if whole else zero + added & plain.top
        return from_integers(format, shape, codes, scales.T.contiguous(), zero, index)

    def settings(
        self, rows: Mapping[str, Stored], config: Mapping[str, Any], about: Mapping[str, Any]
    ) -> dict[str, Mapping[str, Any]]:
        kinds = {module_of(name): _scheme(k) for name, (k, _) in rows.items() if isinstance(k, Format)}
        common = Counter(kinds.values()).most_common(1)[0][0] if kinds else (4, 128, True)
        dynamic: dict[str, dict[str, Any]] = {
            f"+:^{re.escape(module)}$": _settings_for(scheme)
            for module, scheme in kinds.items()
            if scheme != common
        }
        left = _left_in_float(rows, kinds)
        dynamic |= {f"-:^{re.escape(module)}$": {} for module in left}
        ordered = any(kind.ordered for kind, _ in rows.values() if isinstance(kind, Format))
        meta = {"quantizer": [f"fewbits:{VERSION}"]} | ({"act_group_aware": False} if ordered else {})
        settings = {
            "quant_method": "gptq",
            **_settings_for(common),
            "desc_act": ordered,
            "lm_head": "lm_head" in kinds,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "true_sequential": True,
            "meta": meta,
        }
        settings |= {"dynamic": dynamic} if dynamic else {}
        return {"quantize_config.json": settings, "config.json": {**config, "quantization_config": settings}}

    def find(
        self, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> dict[str, QuantizedEntry | FloatEntry]:
        version, other = _format_name(config), config.get("format", _format_name(config))
        if version not in FORMATS_READ or other != version or config.get("pack_dtype", "int32") != "int32":
            faults.append(
                f"checkpoint_format {str(version)[:20]!r}, format {str(other)[:20]!r}, pack_dtype "
                f"{str(config.get('pack_dtype', 'int32'))[:20]!r}; supported: gptq and gptq_v2 in int32; "
                "save it as one of them with the tool that wrote it"
            )
            return {}
        entries: dict[str, QuantizedEntry | FloatEntry] = {}
        changes = _patterns(config.get("dynamic"), faults)
        for key in places:
            module = key.removesuffix(".qweight")
            if module != key:
                entry = self._find(module, _settings_of(config, changes, module), places, faults)
                if entry is not None:
                    entries[f"{module}.weight"] = entry
        return entries

    def _find(
        self, module: str, settings: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> QuantizedEntry | None:
        bits, group = settings.get("bits", 4), settings.get("group_size", GROUP_SIZE)
        sym = bool(settings.get("sym", True))
        shape = places[f"{module}.qweight"].entry.shape
        whole = len(shape) == 2 and bits in BITS and shape[0] % bits == 0 and shape[1] % WORD == 0
        if not whole or type(group) is not int or group == 0 or group < -1 or 0 in shape:
            faults.append(
                f"{module}: bits {str(bits)[:20]}, group_size {str(group)[:20]} and qweight {shape} are no "
                f"GPTQ weight; bits are {', '.join(map(str, BITS))}, group_size -1 or more, {WORD} rows and "
                "columns are packed together"
            )
            return None
        n, k = shape[1], shape[0] * WORD // bits
        columns = None if group == -1 or group >= k else group
        dtype = scale_dtype(places, f"{module}.scales")
        format = FORMATS.get(integer_name(bits, columns, not sym, dtype))
        arrays = self.arrays(f"{module}.weight", format, (n, k))
        if not all(stands(array, places) for array in arrays):
            return QuantizedEntry(format, (n, k))  # opening reports missing arrays
        order, width = read_integers(*places[f"{module}.g_idx"]), columns or k
        if order == in_order(k, width):
            return QuantizedEntry(format, (n, k))
        groups, low, high = -(-k // width), min(order), max(order)
        if low < 0 or high >= groups:
            faults.append(
                f"{module}: g_idx names group {low if low < 0 else high}, there are {groups}; it is damaged"
            )
            return None
        return QuantizedEntry(FORMATS.get(integer_name(bits, columns, not sym, dtype, ordered=True)), (n, k))


def _scheme(format: Format) -> tuple[int, int, bool]:
    """bits, group_size (-1: the row), symmetric."""
    format = plain_of(format)
    assert isinstance(format, Affine)
    return format.bits, format.cells.columns or -1, format.zero == "none"


def _settings_for(scheme: tuple[int, int, bool]) -> dict[str, Any]:
    return dict(zip(("bits", "group_size", "sym"), scheme, strict=True))


def _left_in_float(rows: Mapping[str, Stored], kinds: Mapping[str, Any]) -> list[str]:
    """Modules that readers assume to be quantized: matrices beside quantized ones in the blocks."""
    parts = {re.sub(r"\.\d+\.", ".*.", module) for module in kinds}
    return [
        module
        for name, (_, shape) in rows.items()
        if (module := module_of(name)) != name
        and module not in kinds
        and len(shape) == 2
        and re.sub(r"\.\d+\.", ".*.", module) in parts
    ]


def _format_name(config: Mapping[str, Any]) -> Any:
    return config.get("checkpoint_format", config.get("format", "gptq"))


def _patterns(dynamic: Any, faults: list[str]) -> list[tuple[re.Pattern[str], Mapping[str, Any]]]:
    """`dynamic` -> patterns of module names, and the settings that they change."""
    patterns: list[tuple[re.Pattern[str], Mapping[str, Any]]] = []
    for pattern, changes in dynamic.items() if isinstance(dynamic, dict) else ():
        try:
            if isinstance(changes, dict):
                patterns.append((re.compile(re.sub(r"^[+-]:", "", pattern)), changes))
                continue
            faults.append(f"dynamic {pattern[:60]!r} changes {str(changes)[:20]}; it holds settings")
        except re.error as error:
            faults.append(f"dynamic {pattern[:60]!r} is no regular expression: {error}")
    return patterns


def _settings_of(
    config: Mapping[str, Any], patterns: Sequence[tuple[re.Pattern[str], Mapping[str, Any]]], module: str
) -> Mapping[str, Any]:
    """The settings of one module: the common ones, changed by the first matching pattern."""
    return {**config, **next((changes for pattern, changes in patterns if pattern.match(module)), {})}


GPTQ_V1, GPTQ_V2 = GPTQ(1), GPTQ(2)
