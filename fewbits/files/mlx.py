"""MLX's layout: affine groups packed along the input in u32, of mlx and mlx-lm.

    w (n, k) = scale * code + bias            one scale and bias for each row and group of columns

    <module>.weight   u32 (n, k / 32 * bits)  codes of a row, the first in the low bits; they straddle words
    <module>.scales   (n, groups)             f16, bf16 or f32
    <module>.biases   (n, groups)             of the scales' dtype

MLX has no zero points: bias = -zero * scale. A product with a power of two is exact, so a symmetric weight,
whose zero is 2^(bits-1), has both in its own dtype. An integer zero adds up to 8 bits to the 11 significant
bits of f16 or the 8 of bf16: such a weight has both in f32 (24 bits), which takes 64 bits per group instead
of 32. With f32 scales no zero is supported: scale * code needs more than 24 bits, so scale * code + bias
would be rounded. A float offset is stored directly as bias.

MLX decodes and multiplies in the type that the scales' and the input's types promote to: f16 only if both are
f16, f32 if either is f32, or if one is f16 and the other bf16. In f32 it decodes exactly the values of the
format.

config.json has the same settings twice, `quantization` (mlx-lm) and `quantization_config`: bits, group_size,
and exceptions under a module's name. `fewbits`: {"format", "modules"} records the formats behind the biases.
Other tools ignore it; without it a weight opens as `_asym_float` with the same values. The zero of a group
with scale 0 is lost and read as 0. Modes other than affine, and experts in one array, are refused. Source:
mlx 0.32, mlx.core.quantize and mlx.nn.quantize; mlx-lm, utils.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.pack import pack, unpack
from ..errors import FormatError
from ..formats.affine import Affine
from ..formats.base import FORMATS, Format
from ..lazy import torch
from ..qtensor import QTensor
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
from .integers import from_integers, integer_name, integers, scale_dtype

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
DEFAULT = {"bits": 4, "group_size": 64, "mode": "affine"}
SETTINGS = ("quantization", "quantization_config")
WORD = 32


class MLX(Directory):
    """int2 to int8 in groups, with any kind of zero."""

    name = "mlx"
    where = "an mlx directory"
    engines = ("mlx-lm",)
    run = "mlx_lm.generate --model {name} --prompt 'Once upon a time'"
    library = "mlx"
    tables = True

    def reads(self, settings: Mapping[str, Any]) -> bool:
        return "quant_method" not in settings and "bits" in settings and "group_size" in settings

    def reason(self, format: Format) -> str | None:
        if not isinstance(format, Affine):
            return "it holds integers in groups, columns in order"
        faults = []
        if format.bits not in BITS:
            faults.append(f"{format.bits} bits")
        if format.cells.rows != 1 or format.cells.columns not in GROUPS:
            faults.append(f"scales other than of {', '.join(map(str, GROUPS))} columns")
        if format.zero != "float" and format.scale_type == "f32":
            faults.append("zeros under f32 scales, whose products f32 cannot hold")
        return ", ".join(faults) or None

    def arrays(self, name: str, format: Format, shape: Shape) -> list[Array]:
        assert isinstance(format, Affine)
        (n, k), module, group = shape, module_of(name), format.cells.columns or 1
        if k % group:
            raise FormatError(
                f"{name}: MLX's layout has whole groups, row length {k} is not a multiple of {group}; use a "
                "format with smaller groups or add a rule"
            )
        dtype = "f32" if format.zero == "int" else format.scale_type
        return [
            Array(f"{module}.weight", "u32", (n, k // WORD * format.bits)),
            Array(f"{module}.scales", dtype, (n, k // group)),
            Array(f"{module}.biases", dtype, (n, k // group)),
        ]

    def pack(self, q: QTensor) -> tuple[torch.Tensor, ...]:
        format = q.format
        assert isinstance(format, Affine)
        if format.zero == "float":
            codes, scale = unpack(q.planes["codes"], format.bits, q.shape[1]), q.planes["scale"]
            bias = q.planes["minimum"]
        else:
            codes, scale, zero = integers(q)
            scale = scale.float() if format.zero == "int" else scale
            bias = _bias(scale, zero)
            lost = int((bias.isinf() & ~scale.isinf()).sum())
            if lost:
                raise FormatError(
                    f"{format.name}: {lost} scales times their zeros are past the range of {bias.dtype}, so "
                    "MLX's biases cannot hold them; use a format with float offsets"
                )
        return pack(codes, format.bits, torch.int32).view(torch.uint32), scale, bias

    def unpack(self, format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
        assert isinstance(format, Affine)
        words, scale, bias = arrays
        codes = unpack(words.view(torch.int32), format.bits, shape[1])
        if format.zero == "float":
            return QTensor(
                format, shape, {"codes": pack(codes, format.bits), "scale": scale, "minimum": bias}
            )
        half = 1 << (format.bits - 1)
        if format.zero == "none":
            zero = torch.full(scale.shape, half, dtype=torch.uint8)
        else:
            zero = torch.where(scale == 0, 0, -bias / scale).round().clamp(0, format.top).to(torch.uint8)
        stored = scale.to(format.dtype)
        wrong = ~(_bias(scale, zero) == bias) | (stored.to(scale.dtype) != scale)
        if wrong.any():
            raise FormatError(
                f"{int(wrong.sum())} of {bias.numel()} biases are no multiples of their {format.dtype} "
                f"scales, where `fewbits` in the config says {format.name}; without it they open as floats"
            )
        return from_integers(format, shape, codes, stored, zero)

    def settings(
        self, rows: Mapping[str, Stored], config: Mapping[str, Any], about: Mapping[str, Any]
    ) -> dict[str, Mapping[str, Any]]:
        kinds = {module_of(name): kind for name, (kind, _) in rows.items() if isinstance(kind, Format)}
        common = Counter(kinds.values()).most_common(1)[0][0] if kinds else FORMATS.get("int4_g64")
        other = {module: kind for module, kind in kinds.items() if kind != common}
        settings: dict[str, Any] = _settings_for(common)
        settings |= {
            module: _settings_for(kind)
            for module, kind in other.items()
            if _settings_for(kind) != _settings_for(common)
        }
        settings["fewbits"] = {"format": common.name, "modules": {m: kind.name for m, kind in other.items()}}
        return {"config.json": {**_older_rope(config), **config, **dict.fromkeys(SETTINGS, settings)}}

    def find(
        self, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> dict[str, QuantizedEntry | FloatEntry]:
        entries: dict[str, QuantizedEntry | FloatEntry] = {}
        for key in places:
            module = key.removesuffix(".scales")
            if module != key and f"{module}.weight" in places:
                entry = _find(module, config, places, faults)
                if entry is not None:
                    entries[f"{module}.weight"] = entry
        return entries


def _older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling for mlx-lm: transformers 5 writes only rope_parameters, and a missing
    rope_theta would silently be 10000."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        return {}
    fields: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return fields


def _bias(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """-zero * scale in the scale's dtype; 0, not -0, if the zero is 0."""
    return 0 - scale * zero.to(scale.dtype)


def _settings_for(format: Format) -> dict[str, Any]:
    assert isinstance(format, Affine)
    return {**DEFAULT, "bits": format.bits, "group_size": format.cells.columns}


def _find(
    module: str, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
) -> QuantizedEntry | None:
    """One module's weight from its settings; or None and `faults`."""
    settings = {**DEFAULT, **(config[module] if isinstance(config.get(module), dict) else config)}
    bits, group, mode = settings["bits"], settings["group_size"], settings["mode"]
    shape = places[f"{module}.weight"].entry.shape
    if mode != "affine" or bits not in BITS or group not in GROUPS:
        faults.append(
            f"{module}: mode {str(mode)[:20]!r}, {str(bits)[:20]} bits, group_size {str(group)[:20]}; "
            f"supported: affine, bits {', '.join(map(str, BITS))}, groups of {', '.join(map(str, GROUPS))}"
        )
        return None
    k = shape[1] * WORD // bits if len(shape) == 2 else 0
    if 0 in (*shape, k) or k * bits != shape[1] * WORD or k % group:
        faults.append(
            f"{module}: weight {shape} has no whole groups of {group} columns in {bits} bits"
            + ("; experts in one array are not read: save them one by one" if len(shape) == 3 else "")
        )
        return None
    name = integer_name(bits, group, False, "f16") + "_asym_float"
    dtype = scale_dtype(places, f"{module}.scales")
    floats = FORMATS.get(name if dtype == "f16" else f"{name}_{dtype}")
    return QuantizedEntry(_meant(module, config, settings, faults) or floats, (shape[0], k))


def _meant(
    module: str, config: Mapping[str, Any], settings: Mapping[str, Any], faults: list[str]
) -> Affine | None:
    """The format that `fewbits` records for a module, if any; a fault if the settings differ."""
    ours = config.get("fewbits")
    if not isinstance(ours, dict):
        return None
    modules = ours.get("modules")
    name = (modules if isinstance(modules, dict) else {}).get(module) or ours.get("format")
    try:
        format: Format | None = FORMATS.get(str(name))
    except FormatError:
        format = None
    if isinstance(format, Affine) and (format.bits, format.cells.columns, format.cells.rows) == (
        settings["bits"],
        settings["group_size"],
        1,
    ):
        return format
    faults.append(
        f"{module}: `fewbits` says {str(name)[:40]}, the settings {settings['bits']} bits in groups of "
        f"{settings['group_size']}; remove `fewbits` from config.json to open it as floats"
    )
    return None


MLX_DIRECTORY = MLX()
