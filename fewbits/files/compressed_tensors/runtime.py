"""The activation and KV cache schemes of a compressed-tensors directory.

    input_activations of a scheme    inputs          dynamic; or static, with <module>.input_scale f32 (1,)
                                                     and input_zero_point i8 (1,)
    kv_cache_scheme                  keys, values    <attention>.k_scale and v_scale f32 (1,)

Both become the records of activations/record.py, so that a conversion keeps them if the other file type
supports them. Other schemes (inputs in nvfp4, several schemes at once) are listed under "unread". Source:
compressed-tensors 0.20, quantization/lifecycle/initialize.py; vLLM 0.33, class
CompressedTensorsKVCacheMethod.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...storage.safetensors import map_tensor
from ..directory import Place
from .config import ACTIVATIONS, CACHES, Schemes, scheme_name

CACHED = ("k_proj", "v_proj")  # modules beside which the scale of a KV cache lies, as k_scale and v_scale


def cached_by(module: str) -> tuple[str, int] | None:
    """`...self_attn.v_proj` -> its attention, 0 for keys and 1 for values; None for another module."""
    parent, _, last = module.rpartition(".")
    return (parent, CACHED.index(last)) if last in CACHED else None


def scale_key(module: str) -> str | None:
    """The key of the cache scale that lies beside a module, if it is one of CACHED."""
    cached = cached_by(module)
    return None if cached is None else f"{cached[0]}.{'kv'[cached[1]]}_scale"


def read_runtime(
    config: Mapping[str, Any], schemes: Schemes, modules: Iterable[str], places: Mapping[str, Place]
) -> dict[str, Any]:
    """modules: those whose weights are quantized."""
    records: dict[str, Any] = {}
    unread = []
    inputs = {module: scheme.inputs for module in modules if (scheme := schemes.of(module)) is not None}
    names = {name for name in inputs.values() if name is not None}
    if len(names) == 1 and "" not in names:
        record = _activations(names.pop(), inputs, places)
        records |= {} if record is None else {"activations": record}
        unread += [] if record else ["the inputs of some weights have no static range of their own: not kept"]
    elif names:
        found_schemes = " and ".join(sorted(names - {""})) or "a scheme unknown to fewbits"
        unread.append(f"the inputs of weights are quantized in {found_schemes}: not kept")
    if isinstance(given := config.get("kv_cache_scheme"), dict):
        name = scheme_name(CACHES, given)
        record = _cache(name, inputs, places) if name is not None else None
        records |= {} if record is None else {"kv_cache": record}
        unread += [] if record else [f"the cache of keys and values is in {str(given)[:200]}: not kept"]
    return records | ({"unread": unread} if unread else {})


def _activations(
    name: str, inputs: Mapping[str, str | None], places: Mapping[str, Place]
) -> dict[str, Any] | None:
    left = [f"{module}.weight" for module, scheme in inputs.items() if scheme is None]
    if ACTIVATIONS[name]["dynamic"]:
        return {"scheme": name, "left": left}
    if left:
        return None
    ranges = {}
    for module in (module for module, scheme in inputs.items() if scheme is not None):
        scale = _number(places, f"{module}.input_scale")
        zero = 0.0 if ACTIVATIONS[name]["symmetric"] else _number(places, f"{module}.input_zero_point")
        if scale is None or zero is None:
            return None
        ranges[f"{module}.weight"] = [scale, int(zero)]
    return {"scheme": name, "left": left, "ranges": ranges}


def _cache(name: str, modules: Iterable[str], places: Mapping[str, Place]) -> dict[str, Any] | None:
    """None unless every attention has both scales."""
    steps: dict[str, list[float]] = {}
    for attention in dict.fromkeys(cached[0] for module in modules if (cached := cached_by(module))):
        pair = [_number(places, f"{attention}.{part}_scale") for part in "kv"]
        if None in pair:
            return None
        steps[attention] = [float(scale) for scale in pair if scale is not None]
    return {"scheme": name, "steps": steps} if steps else None


def _number(places: Mapping[str, Place], key: str) -> float | None:
    """The one number of an array; None if it is not there, or has more."""
    if key not in places or map_tensor(*places[key]).numel() != 1:
        return None
    return float(map_tensor(*places[key]).reshape(()))
