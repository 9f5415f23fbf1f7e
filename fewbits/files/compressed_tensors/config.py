"""quantization_config of compressed-tensors: its schemes of weights, and our formats as schemes.

    weights    {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128}
    strategy   tensor, channel (a row), group, block ([128, 128]), tensor_group (groups and one for all)
    format     pack-quantized        integers of 1 to 8 bits in int32
               int-quantized         integers in int8, for integer activations
               float-quantized       e4m3            mxfp8-quantized          e4m3, scales E8M0
               nvfp4-pack-quantized  e2m1            mxfp4-, mxfp6-pack-...   e2m1, e2m3, scales E8M0
               naive-quantized       either of int-quantized and float-quantized

Groups of modules have schemes. A module uses the first that names it, else the first whose regex ("re:",
matched from the start) matches, else the one of its class. Source: compressed-tensors 0.20, quantization/
quant_args.py and quant_scheme.py (defaults), utils/match.py (order), compressors/format.py (formats).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import FormatError
from ...formats.actorder import SUFFIX, ActOrder
from ...formats.affine import Affine
from ...formats.base import FORMATS, SCALE_TYPES, Format
from ...formats.floats import ELEMENTS, NVFP4, Microscaling
from ...formats.levels import ScaledLevels
from ...model.sites import role_of

METHOD = "compressed-tensors"
PACKED, BYTES, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
TWO_LEVELS = "nvfp4-pack-quantized"
MICROSCALED = {"e2m1": "mxfp4-pack-quantized", "e2m3": "mxfp6-pack-quantized", "e4m3": "mxfp8-quantized"}
BLOCK = 128  # rows and columns of an e4m3 block
_MX = tuple(MICROSCALED.values())
_KNOWN: dict[str | None, set[tuple[int, str]]] = {
    "int": {(bits, strategy) for bits in range(2, 9) for strategy in ("tensor", "channel", "group")},
    FLOAT: {(8, strategy) for strategy in ("tensor", "channel", "group", "block")},
    TWO_LEVELS: {(4, "tensor_group")},
    **{storage: {(ELEMENTS[element].bits, "group")} for element, storage in MICROSCALED.items()},
}
"""bits and strategies that we have formats for, of integers and by format"""

# Input activations by the name of our scheme; dynamic ones are quantized token by token.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    name: {
        "num_bits": 4 if name.startswith("int4") else 8,
        "type": "float" if name.startswith("fp8") else "int",
        "symmetric": "asymmetric" not in name,
        "strategy": "token" if name.endswith("dynamic") else "tensor",
        "dynamic": name.endswith("dynamic"),
    }
    for name in ("int8_dynamic", "int8_static", "int8_asymmetric_dynamic", "int8_asymmetric_static",
                 "fp8_dynamic", "fp8_static", "int4_dynamic")
}  # fmt: skip


# Of keys and values, by the name of our scheme: accepted by vLLM 0.33 (validate_kv_cache_scheme).
CACHES: dict[str, dict[str, Any]] = {
    "fp8": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
}


def scheme_name(known: Mapping[str, Mapping[str, Any]], args: Mapping[str, Any]) -> str | None:
    """The name of the scheme with these quantization args; None for an unknown one."""
    default = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    settings = {**default, **{key: value for key, value in args.items() if value is not None}}
    if "strategy" not in settings:
        settings["strategy"] = "tensor" if "group_size" not in settings else "group"
    names = (name for name, row in known.items() if all(settings[key] == value for key, value in row.items()))
    return next(names, None)


def is_e4m3(format: Format) -> bool:
    """e4m3 under float scales."""
    return isinstance(format, ScaledLevels) and format.levels is ELEMENTS["e4m3"].levels


def scale_dtype(format: Format) -> str:
    """The type of the scales of an integer or e4m3 format."""
    return next(plane.type for plane in format.planes if plane.name == "scale")


def weights_of(format: Format) -> dict[str, Any]:
    """A supported format as the `weights` of a scheme."""
    args: dict[str, Any] = {"type": "float", "symmetric": True, "dynamic": False}
    if isinstance(format, NVFP4):
        of_scale = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
        return args | {"num_bits": 4, "strategy": "tensor_group", "group_size": format.block, **of_scale}
    if isinstance(format, Microscaling):
        of_scale = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        return args | {
            "num_bits": format.element.bits,
            "strategy": "group",
            "group_size": format.block,
            **of_scale,
        }
    assert isinstance(format, Affine | ScaledLevels)
    args["num_bits"] = format.bits
    if isinstance(format, Affine):
        args |= {"type": "int", "symmetric": format.zero == "none"}
    rows, columns = format.cells.rows, format.cells.columns
    if rows == BLOCK:
        return args | {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
    if columns is not None:
        return args | {"strategy": "group", "group_size": columns}
    return args | {"strategy": "tensor" if rows is None else "channel"}


def storage_of(format: Format, in_bytes: int) -> str:
    """The package's format for ours; integers of `in_bytes` bits or more are stored in bytes."""
    if isinstance(format, NVFP4):
        return TWO_LEVELS
    if isinstance(format, Microscaling):
        return MICROSCALED[format.element.name]
    if isinstance(format, ActOrder):
        return PACKED
    if isinstance(format, Affine):
        return BYTES if format.bits >= in_bytes else PACKED
    return FLOAT


@dataclass(frozen=True)
class Scheme:
    """The scheme of a group of modules: args of the weights, with defaults, and their storage format. inputs:
    our scheme of their inputs, None if they are float, "" for an unknown one."""

    group: str
    targets: tuple[str, ...]
    bits: int
    integer: bool
    symmetric: bool
    strategy: str
    columns: int | None
    storage: str
    inputs: str | None = None

    def format(self, dtype: str, ordered: bool = False) -> Format:
        """Of weights whose scales are `dtype` (f16 ...), in act order or not; FormatError if we have
        none."""
        if self.storage in (PACKED, BYTES, FLOAT) and dtype not in SCALE_TYPES:
            raise FormatError(
                f"its scales are {dtype}; scales of {self.storage} are {', '.join(SCALE_TYPES)}"
            )
        if self.storage == TWO_LEVELS:
            return FORMATS.get("nvfp4")
        if self.storage in _MX:
            return FORMATS.get({4: "mxfp4", 6: "mxfp6_e2m3", 8: "mxfp8_e4m3"}[self.bits])
        cells = f"g{self.columns}" if self.strategy == "group" else self.strategy
        cells = "block128" if cells == "block" else cells
        if self.integer:
            kind = f"{'' if self.symmetric else '_asym'}{SUFFIX if ordered else ''}"
            return FORMATS.get(f"int{self.bits}_{cells}{kind}_{dtype}")
        return FORMATS.get(f"fp8_e4m3_{cells}_{dtype}")


@dataclass(frozen=True)
class Schemes:
    """The groups of a quantization_config, and the modules in float."""

    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...]

    def of(self, module: str) -> Scheme | None:
        """The scheme of a module that is known to be a linear layer."""
        named = sorted((("re:" in t, t), i) for i, s in enumerate(self.schemes) for t in s.targets)
        for (_, target), i in named:
            if matches(module, target):
                return self.schemes[i]
        embeds = role_of(f"{module}.weight") == "embed"
        classes = [
            i
            for (pattern, target), i in named
            if not pattern and "." not in target and (target == "Embedding") == embeds
        ]
        return self.schemes[classes[0]] if classes else None

    def ignores(self, module: str) -> bool:
        return any(matches(module, target) for target in self.ignore)


def matches(module: str, target: str) -> bool:
    """Whether a target matches this module."""
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error:
        return False


def read_schemes(config: Mapping[str, Any], faults: list[str]) -> Schemes:
    """A quantization_config -> its schemes; faults are appended to `faults`."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        faults.append("quantization_config has no config_groups, which describe the weights; write it again")
        groups = {}
    for key, what in (("transform_config", "rotates activations"), ("sparsity_config", "has sparse weights")):
        settings = config.get(key)
        if settings and not (isinstance(settings, dict) and settings.get("format") in ("dense",)):
            faults.append(
                f"{key}: this model {what} when it runs, which fewbits does not read; use its engine"
            )
    schemes = [_scheme(name, group, config, faults) for name, group in groups.items()]
    ignore = config.get("ignore") or []
    named = tuple(str(target) for target in ignore) if isinstance(ignore, list) else ()
    return Schemes(tuple(scheme for scheme in schemes if scheme is not None), named)


def _scheme(name: str, group: Any, config: Mapping[str, Any], faults: list[str]) -> Scheme | None:
    weights = group.get("weights") if isinstance(group, dict) else None
    targets = group.get("targets") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or not isinstance(targets, list):
        if not isinstance(group, dict) or weights is not None:
            faults.append(f"config_groups: {name} is {str(group)[:60]}; it needs targets and weights")
        return None  # a group of activations only has no weights
    bits, columns = weights.get("num_bits", 8), weights.get("group_size")
    integer, strategy = weights.get("type", "int") == "int", weights.get("strategy")
    if strategy is None and (columns is None or type(columns) is int):
        strategy = "tensor" if columns is None else "channel" if columns == -1 else "group"
    named = group.get("format") or config.get("format")
    storage = {NAIVE: BYTES if integer else FLOAT}.get(named, named) if isinstance(named, str) else None
    of_block = weights.get("block_structure") in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}")
    known = _KNOWN.get("int" if integer else storage, ())
    fits = type(bits) is int and (storage in (PACKED, BYTES)) == integer and (bits, str(strategy)) in known
    fits &= columns == {TWO_LEVELS: 16}.get(storage, 32) if storage in (TWO_LEVELS, *_MX) else True
    fits &= type(columns) is int and columns > 0 if strategy == "group" else True
    if not fits or (strategy == "block" and not of_block):
        what = {"num_bits": bits, "type": weights.get("type"), "strategy": strategy, "group_size": columns}
        faults.append(
            f"config_groups: {name} has weights {str(what)[:120]} and format {str(named)[:40]!r}, which "
            "fewbits does not read; load it with the tool that wrote it, or quantize the float model"
        )
        return None
    given = group.get("input_activations")
    return Scheme(
        name,
        tuple(map(str, targets)),
        bits,
        integer,
        weights.get("symmetric", True) is not False,
        str(strategy),
        columns or None,
        str(storage),
        (scheme_name(ACTIVATIONS, given) or "") if isinstance(given, dict) else None,
    )
