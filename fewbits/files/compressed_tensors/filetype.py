"""compressed-tensors: the file type of vLLM and llm-compressor, several formats of weights under one config.

    config.json   {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
                   "config_groups": {"group_0": {"targets": ["Linear"], "weights": {...}, ...}},
                   "ignore": ["lm_head"], ...}}

The fields of the config are in config.py, the arrays in arrays.py. Integers are packed, except for those of 8
bits with integer activations (W8A8): these are stored in bytes, for which engines have kernels. A static
scheme adds input_scale f32 (1,) to each weight, and input_zero_point i8 if it is asymmetric. Engines convert
the scales of integers to the model's type: those of a bf16 model are rounded to bf16 unless the format has
bf16 scales (int4_g128_bf16).

A single scheme has the target "Linear". Several schemes list their modules, because vLLM checks the class
before it splits q, k, v (find_matched_target). vLLM fuses q, k and v into one matrix, gate and up too, and
all experts of a block: these must have one scheme. A KV cache in fp8 adds k_scale and v_scale f32 (1,) to
each attention and a kv_cache_scheme to the config. Weights in act order (weight_g_idx, actorder "group") are
read but not written: the package removed them in 0.20 and refuses such a config.

Source: compressed-tensors 0.20, quantization/lifecycle/; vLLM, quantization/compressed_tensors/utils.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from ...errors import FormatError, PlanError, raise_all
from ...formats.affine import Affine
from ...formats.base import Format
from ...formats.floats import NVFP4, Microscaling
from ...lazy import torch
from ...model.fused import fused_groups, mixed_groups
from ...model.sites import Site, role_of, sites
from ...qtensor import QTensor
from ...storage.safetensors import read_integers
from ..directory import (
    Array,
    Directory,
    FloatEntry,
    Place,
    QuantizedEntry,
    Shape,
    Stored,
    module_of,
)
from ..filetype import ON_CPU
from ..integers import in_order
from .arrays import ARRAYS, PACK, UNPACK
from .config import (
    ACTIVATIONS,
    BYTES,
    CACHES,
    FLOAT,
    METHOD,
    MICROSCALED,
    PACKED,
    Scheme,
    is_e4m3,
    read_schemes,
    storage_of,
    weights_of,
)
from .runtime import cached_by, read_runtime, scale_key

NEVER = 9  # more bits than any of our integers
INPUTS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_STEPS = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point")
_NUMBER = re.compile(r"\.\d+")


@dataclass(frozen=True)
class Compressed(Directory):
    """in_bytes: integers with at least this many bits are stored in bytes. activations, kv_cache: names of
    schemes."""

    in_bytes: int = NEVER
    activations: str | None = None
    kv_cache: str | None = None
    name = METHOD
    method = METHOD
    engines = ("transformers+compressed-tensors", "vLLM", "vLLM+cpu")
    asks_loader = True
    run = Directory.run + ON_CPU

    @property
    def static(self) -> bool:
        return self.activations is not None and not ACTIVATIONS[self.activations]["dynamic"]

    def with_runtime(self, activations: str | None = None, kv_cache: str | None = None) -> Compressed:
        for what, name, known in (
            ("activations", activations, ACTIVATIONS),
            ("a cache of keys and values in", kv_cache, CACHES),
        ):
            if name is not None and name not in known:
                raise PlanError(f"a {METHOD} file cannot say {what} {name}; it can say {', '.join(known)}")
        integer = activations is not None and ACTIVATIONS[activations]["type"] == "int"
        return replace(self, in_bytes=8 if integer else NEVER, activations=activations, kv_cache=kv_cache)

    def reason(self, format: Format) -> str | None:
        carried = isinstance(format, NVFP4) or is_e4m3(format)
        carried |= isinstance(format, Affine) and format.zero != "float"
        carried |= isinstance(format, Microscaling) and format.element.name in MICROSCALED
        if carried:
            return None
        return "it holds integers with whole zero points, e4m3, MX and NVFP4, columns in order"

    def layout_of(self, name: str) -> Compressed:
        """The layout of one weight. Weights outside the blocks and routers have float activations."""
        return self if _NUMBER.search(name) and role_of(name) != "router" else Compressed()

    def arrays(self, name: str, format: Format, shape: Shape) -> list[Array]:
        module, layout = module_of(name), self.layout_of(name) if self.activations else self
        cache_scale = scale_key(module) if self.kv_cache else None
        parts = ARRAYS[storage_of(format, layout.in_bytes)](format, shape, name)
        if layout.static:
            parts.append(("input_scale", "f32", (1,)))
            if not ACTIVATIONS[str(self.activations)]["symmetric"]:
                parts.append(("input_zero_point", "i8", (1,)))
        arrays = [Array(f"{module}.{part}", dtype, size) for part, dtype, size in parts]
        return arrays + ([] if cache_scale is None else [Array(cache_scale, "f32", (1,))])

    def pack(self, q: QTensor) -> tuple[torch.Tensor, ...]:
        return PACK[storage_of(q.format, self.in_bytes)](q)

    def unpack(self, format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
        return UNPACK[storage_of(format, self.in_bytes)](format, shape, arrays)

    def packer(self, name: str, about: Mapping[str, Any]) -> Callable[[QTensor], tuple[torch.Tensor, ...]]:
        layout, more = self.layout_of(name), []
        if layout.static:
            scale, zero = _pair(about, "activations", "ranges", name)
            more.append(torch.tensor([scale], dtype=torch.float32))
            if not ACTIVATIONS[str(self.activations)]["symmetric"]:
                more.append(torch.tensor([zero], dtype=torch.int8))
        cached = cached_by(module_of(name)) if self.kv_cache else None
        if cached is not None:
            scale = _pair(about, "kv_cache", "steps", cached[0])[cached[1]]
            more.append(torch.tensor([scale], dtype=torch.float32))
        return (lambda q: (*layout.pack(q), *more)) if more else layout.pack

    def settings(
        self, rows: Mapping[str, Stored], config: Mapping[str, Any], about: Mapping[str, Any]
    ) -> dict[str, Mapping[str, Any]]:
        quantized = {name: kind for name, (kind, _) in rows.items() if isinstance(kind, Format)}
        formats = {name: quantized[name].name if name in quantized else "float" for name in rows}
        shapes = {name: SimpleNamespace(shape=shape) for name, (_, shape) in rows.items()}
        all_sites = sites(SimpleNamespace(tensors=shapes, config=config))
        faults = [
            f"{mixed}: they are one matrix in vLLM; give all of them one format"
            for mixed in mixed_groups(all_sites, formats)
        ]
        faults += [
            f"{name}: embeddings in {quantized[name].name} are not loaded; leave them in float with a rule"
            for name in quantized
            if role_of(name) in ("embed", "position")
        ]
        if self.kv_cache is not None:
            faults += _without_scales(rows, quantized)
        if self.static:
            faults += [
                f"{site.name}: the inputs of experts have no range of their own; use a dynamic scheme"
                for site in all_sites
                if site.expert is not None and site.name in quantized
            ]
        left = _left(all_sites, (about.get("activations") or {}).get("left", ()))
        groups: dict[str, list[str]] = {}
        for name, format in quantized.items():
            scheme = self.layout_of(name)._scheme(name, format, name in left, faults)
            groups.setdefault(json.dumps(scheme), []).append(module_of(name))
        raise_all(PlanError, METHOD, faults)
        if not groups:
            return {"config.json": config}
        written = {
            **_settings(groups, rows, about.get("unquantized", ())),
            "kv_cache_scheme": self.kv_cache and CACHES[self.kv_cache],
        }
        return {"config.json": {**config, "quantization_config": written}}

    def _scheme(self, name: str, format: Format, left: bool, faults: list[str]) -> dict[str, Any]:
        """weights, input_activations and format of a config group."""
        weights, inputs = weights_of(format), None
        if self.activations is not None and not left:
            inputs = dict(ACTIVATIONS[self.activations])
            if inputs["type"] != weights["type"] and not (
                weights["type"] == "int" and inputs["type"] == "float"
            ):
                faults.append(f"{name}: no engine multiplies {format.name} with {self.activations}")
            if weights["type"] == "float" and not is_e4m3(format):
                faults.append(
                    f"{name}: {format.name} does not support {self.activations}; leave activations out"
                )
        storage = storage_of(format, self.in_bytes)
        return {
            "weights": weights,
            "input_activations": inputs,
            "output_activations": None,
            "format": storage,
        }

    def find(
        self, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> dict[str, QuantizedEntry | FloatEntry]:
        schemes = read_schemes(config, faults)
        if faults:
            return {}
        entries: dict[str, QuantizedEntry | FloatEntry] = {}
        for module in _modules(places):
            scheme = schemes.of(module)
            if scheme is None or schemes.ignores(module):
                why = "ignore leaves it in float" if scheme else "no config group has it as a target"
                faults.append(f"{module}: is quantized, and {why}; the config is of another model")
                continue
            entry = _entry(module, scheme, places, faults)
            if entry is not None:
                entries[f"{module}.weight"] = entry
        return entries

    def read_runtime(self, config: Mapping[str, Any], places: Mapping[str, Place]) -> dict[str, Any]:
        return read_runtime(config, read_schemes(config, []), _modules(places), places)


# ---- the config that is written ----------------------------------------------------------------------


def _pair(about: Mapping[str, Any], kind: str, part: str, name: str) -> Sequence[float]:
    """The two numbers that a record has for a weight or an attention."""
    pair: Sequence[float] | None = about[kind].get(part, {}).get(name)
    if pair is None:
        raise PlanError(f"{name}: the record of {kind} has no {part} for it; quantize the model again")
    return pair


def _without_scales(rows: Mapping[str, Stored], quantized: Mapping[str, Format]) -> list[str]:
    """Faults of a model without a place for cache scales, which lie beside quantized k_proj and v_proj."""
    beside = [name for name in rows if scale_key(module_of(name)) is not None]
    if not beside:
        return ["the scales of a KV cache lie beside k_proj and v_proj, which this model does not have"]
    return [
        f"{name}: stays in float, but scales of a KV cache lie beside quantized k_proj and v_proj; give it a "
        "format or leave the cache in float"
        for name in beside
        if name not in quantized
    ]


def _left(all_sites: Sequence[Site], named: Sequence[str]) -> set[str]:
    """The weights whose inputs stay in float: those named, and all of a group that an engine fuses. Experts
    may be named as one, as in `layers.0.mlp.experts.down_proj`."""
    left = set(named)
    experts = {name.split(".experts.")[0] for name in named if ".experts." in name}
    left |= {site.name for site in all_sites if site.name.split(".experts.")[0] in experts}
    for group in fused_groups(all_sites).values():
        left |= set(group) if left & set(group) else set()
    return left


def _settings(
    groups: Mapping[str, Sequence[str]], rows: Mapping[str, Stored], more: Sequence[str]
) -> dict[str, Any]:
    """groups: a scheme as JSON -> the modules that have it. more: modules in float that no tensor names."""
    quantized = {module for modules in groups.values() for module in modules}
    left = [
        module_of(name)
        for name, (_, shape) in rows.items()
        if len(shape) == 2
        and name.endswith(".weight")
        and module_of(name) not in quantized
        and role_of(name) not in ("embed", "position")
    ]
    if not any(role_of(name) == "output" for name in rows):
        left.append("lm_head")  # a linear layer that shares the weight of the embeddings
    left += more
    config_groups = {}
    for i, (scheme, modules) in enumerate(groups.items()):
        others = {*left, *quantized} - {*modules}
        targets = ["Linear"] if len(groups) == 1 else _targets(modules, others)
        config_groups[f"group_{i}"] = {"targets": targets, **json.loads(scheme)}
    storages = {group["format"] for group in config_groups.values()}
    return {
        "quant_method": METHOD,
        "format": storages.pop() if len(storages) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": _targets(left, quantized),
    }


def _targets(modules: Sequence[str], others: Set[str]) -> list[str]:
    """Modules by name; those that differ only in numbers by one regex, if it matches none of `others`."""
    other_patterns = {_NUMBER.sub(".*", module) for module in others}
    patterns = []
    for module in modules:
        pattern = _NUMBER.sub(".*", module)
        regex = r"\.\d+".join(map(re.escape, pattern.split(".*")))
        patterns.append(module if pattern == module or pattern in other_patterns else f"re:{regex}$")
    return list(dict.fromkeys(patterns))


# ---- reading quantized weights ----------------------------------------------------------------------


def _modules(places: Mapping[str, Place]) -> list[str]:
    """The modules whose weights are quantized, in the order of the file."""
    return list(dict.fromkeys(key.rpartition(".")[0] for key in places if _marks(key, places[key])))


def _marks(key: str, place: Place) -> bool:
    """Whether this array belongs to a quantized weight."""
    tail = key.rpartition(".")[2]
    return tail in ("weight_packed", "weight_scale") or (
        tail == "weight" and place.entry.dtype in ("I8", "F8_E4M3")
    )


def _entry(
    module: str, scheme: Scheme, places: Mapping[str, Place], faults: list[str]
) -> QuantizedEntry | None:
    scale, shape = places.get(f"{module}.weight_scale"), _shape(module, scheme, places, faults)
    if shape is None:
        return None
    try:
        dtype = scale.entry.dtype.lower() if scale else "f16"
        format = scheme.format(dtype)
        layout = Compressed(2 if scheme.storage == BYTES else NEVER)
        layout.arrays(module, format, shape)
    except FormatError as error:
        faults.append(f"{module}: {scheme.bits} bits by {scheme.strategy} under {scheme.group}: {error}")
        return None
    extra = [f"{module}.{part}" for part in INPUTS]
    parent, _, last = module.rpartition(".")
    extra += [f"{parent}.{part}" for part in _STEPS if last == f"{part[0]}_proj"]
    extra = [key for key in extra if key in places]
    order = f"{module}.weight_g_idx"
    if order in places and scheme.storage == PACKED:
        if _moves(order, format.cells.columns or shape[1], shape[1], places, faults):  # type: ignore[attr-defined]
            format = scheme.format(dtype, ordered=True)
        else:
            extra.append(order)
    return QuantizedEntry(format, shape, tuple(extra), layout)


def _moves(key: str, columns: int, k: int, places: Mapping[str, Place], faults: list[str]) -> bool:
    """Whether weight_g_idx, the group of each of k columns, differs from columns in order. Files in order may
    have -1 for all columns."""
    shape = places[key].entry.shape
    index = read_integers(*places[key]) if shape == (k,) else ()
    if index and (index == in_order(k, columns) or max(index) == -1):
        return False
    if index and min(index) >= 0 and max(index) < k // columns:
        return True
    faults.append(
        f"{key}: {shape} does not say the group of each of {k} columns, of which there are "
        f"{k // columns}; it is damaged"
    )
    return False


def _shape(module: str, scheme: Scheme, places: Mapping[str, Place], faults: list[str]) -> Shape | None:
    """(n, k) of a weight, or None and a fault."""
    plain = scheme.storage in (BYTES, FLOAT, MICROSCALED["e4m3"])
    key = f"{module}.weight" if plain else f"{module}.weight_packed"
    stored = places.get(f"{module}.weight_shape")
    if (
        scheme.storage == PACKED
        and stored is not None
        and (stored.entry.dtype, stored.entry.shape) == ("I64", (2,))
    ):
        n, k = read_integers(*stored)
        if 0 < n < 2**31 and 0 < k < 2**31:
            return n, k
        faults.append(f"{module}: weight_shape is {n} x {k}; it is damaged")
    elif key not in places:
        faults.append(f"{module}: plane {key.rpartition('.')[2]!r} is missing, which {scheme.storage} needs")
    elif len(shape := places[key].entry.shape) != 2 or 0 in shape:
        faults.append(f"{module}: plane {key.rpartition('.')[2]!r} is {shape}, no weight (n, k)")
    else:
        word = 32 if scheme.storage == PACKED else 8
        return shape[0], shape[1] if plain else shape[1] * word // scheme.bits
    return None


COMPRESSED_TENSORS = Compressed()
