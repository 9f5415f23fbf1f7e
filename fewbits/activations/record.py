"""The schemes for activations and the KV cache that a checkpoint directory records for its runtime.

    "activations": {"scheme": "int8_dynamic", "left": ["model.layers.1.mlp.down_proj.weight", ...]}
    "kv_cache":    {"scheme": "fp8", "steps": {"model.layers.0.self_attn": [of keys, of values], ...}}

A static scheme also has "ranges", {site: [scale, zero]}, and leaves no site out, because engines apply one
scheme to all sites. A native directory stores these records in fewbits.json. The reader of compressed-tensors
translates that file type's own fields into them. No other file type has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.transformers import load_model
from ..errors import CalibrationError, FileError, PlanError
from .kv_cache import CACHES, ranges
from .mixed import Activations, calibrate, observe
from .quantizers import SCHEMES, Affine, Quantizer

if TYPE_CHECKING:
    from ..files.checkpoint import Checkpoint

RULE = "mse"  # of the observer that fixes a static range
_PAIRS = [[a, b] for a in (int, float) for b in (int, float)]
WINDOWS = 8  # of the calibration text; the whole model is in memory meanwhile


def record_of(metadata: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """The record of "activations" or "kv_cache" in a directory's metadata; FileError if it is malformed."""
    entry = metadata.get(kind)
    if entry is None:
        return None
    pairs = {} if not isinstance(entry, dict) else entry.get({"kv_cache": "steps"}.get(kind, "ranges"), {})
    valid = isinstance(entry, dict) and isinstance(entry.get("scheme"), str) and isinstance(pairs, dict)
    valid = valid and isinstance(entry.get("left", []), list)
    valid = valid and all(isinstance(pair, list) and [*map(type, pair)] in _PAIRS for pair in pairs.values())
    if not valid:
        raise FileError(f"{kind} is {str(entry)[:80]}, no scheme with its ranges; quantize the model again")
    return dict(entry)


def activations_of(said: Mapping[str, Any]) -> Activations:
    """A record of "activations" -> what changes the inputs so."""
    scheme = SCHEMES.get(said["scheme"])
    known = {
        site: Quantizer(scheme, Affine(torch.tensor(float(step)), torch.tensor(float(zero))))
        for site, (step, zero) in said.get("ranges", {}).items()
    }
    return Activations(scheme, known, left=tuple(said.get("left", ())))


def record(checkpoint: Checkpoint, name: str, windows: torch.Tensor | None) -> dict[str, Any]:
    """The record of a scheme for this checkpoint, measured on windows `(w, t)` int64.

    "left" names the sites that the scheme damages too much; without windows no site is left out. PlanError
    for an unknown scheme, CalibrationError for a static one without windows.
    """
    scheme = SCHEMES.get(name)
    if not scheme.dynamic:
        if windows is None:
            raise CalibrationError(f"{name}: its ranges come from a text; give one, or use int8_dynamic")
        seen = observe(load_model(checkpoint), windows[:WINDOWS])
        ranges = {site: observer.affine(scheme, RULE) for site, observer in seen.items()}
        return {
            "scheme": name,
            "left": [],
            "ranges": {site: [float(at.scale), int(at.zero)] for site, at in ranges.items()},
        }
    if windows is None:
        return {"scheme": name, "left": []}
    left = calibrate(load_model(checkpoint), windows[:WINDOWS], scheme).left
    return {"scheme": name, "left": list(left)}


def record_cache(checkpoint: Checkpoint, name: str, windows: torch.Tensor | None) -> dict[str, Any]:
    """The record of a cache scheme for this checkpoint with its scales, measured on windows `(w, t)` int64.

    PlanError for a scheme whose scales come from the tokens: it needs no record.
    """
    if not CACHES.get(name).fixed:
        known = ", ".join(each for each in CACHES if CACHES.get(each).fixed)
        raise PlanError(
            f"a KV cache in {name} computes its scales from the tokens, so no file records it; use "
            f"{known}, or measure {name} with `fewbits evaluate --kv-cache {name}`"
        )
    if windows is None:
        raise CalibrationError(f"a KV cache in {name} needs scales measured on calibration text; give one")
    scales = ranges(load_model(checkpoint), windows[:WINDOWS])
    return {"scheme": name, "steps": {module: list(pair) for module, pair in scales.items()}}
