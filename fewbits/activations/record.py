"""What a runtime is to do with activations and its cache, as a directory says it.

    "activations": {"scheme": "int8_dynamic", "left": ["model.layers.1.mlp.down_proj.weight", ...]}
    "kv_cache":    {"scheme": "fp8", "steps": {"model.layers.0.self_attn": [of keys, of values], ...}}

A static scheme has "ranges" besides, {site: [step, zero]}, and leaves no site out: engines have one scheme
for all. A native directory has these under those names in fewbits.json, compressed-tensors in words of its
own, which its reader turns into the same; no other file type says anything of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.transformers import load_model
from ..errors import CalibrationError, FileError, PlanError
from .kv_cache import CACHES, ranges
from .mixed import calibrate, observe
from .quantizers import SCHEMES

if TYPE_CHECKING:
    from ..files.checkpoint import Checkpoint

RULE = "mse"  # of the observer that fixes a static range
_PAIRS = [[a, b] for a in (int, float) for b in (int, float)]
WINDOWS = 8  # of the calibration text; the whole model is in memory meanwhile


def record_of(metadata: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """What a directory says of "activations" or "kv_cache"; FileError where that makes no sense."""
    said = metadata.get(kind)
    if said is None:
        return None
    pairs = {} if not isinstance(said, dict) else said.get({"kv_cache": "steps"}.get(kind, "ranges"), {})
    whole = isinstance(said, dict) and isinstance(said.get("scheme"), str) and isinstance(pairs, dict)
    whole = whole and isinstance(said.get("left", []), list)
    whole = whole and all(isinstance(pair, list) and [*map(type, pair)] in _PAIRS for pair in pairs.values())
    if not whole:
        raise FileError(f"{kind} is {str(said)[:80]}, no scheme with its ranges; quantize the model again")
    return dict(said)


def record(checkpoint: Checkpoint, name: str, windows: torch.Tensor | None) -> dict[str, Any]:
    """A scheme for this checkpoint, with the sites that cannot bear it, measured on windows `(w, t)` int64.

    Without windows no site is left out. PlanError for an unknown scheme, CalibrationError for a static
    one without windows.
    """
    scheme = SCHEMES.get(name)
    if not scheme.dynamic:
        if windows is None:
            raise CalibrationError(f"{name}: its ranges come from a text; give one, or use int8_dynamic")
        seen = observe(load_model(checkpoint), windows[:WINDOWS])
        ranges = {site: found.affine(scheme, RULE) for site, found in seen.items()}
        return {
            "scheme": name,
            "left": [],
            "ranges": {site: [float(at.step), int(at.zero)] for site, at in ranges.items()},
        }
    if windows is None:
        return {"scheme": name, "left": []}
    found = calibrate(load_model(checkpoint), windows[:WINDOWS], scheme)
    return {"scheme": name, "left": list(found.left)}


def record_cache(checkpoint: Checkpoint, name: str, windows: torch.Tensor | None) -> dict[str, Any]:
    """A cache's scheme for this checkpoint with its steps, measured on windows `(w, t)` int64.

    PlanError for a scheme that is not fixed beforehand: nothing need be said of that.
    """
    if not CACHES.get(name).fixed:
        known = ", ".join(each for each in CACHES if CACHES.get(each).fixed)
        raise PlanError(
            f"a cache in {name} has its steps from the tokens themselves, nothing is to be told of it; told "
            f"is {known}; what {name} costs is told by `fewbits evaluate --kv-cache {name}`"
        )
    if windows is None:
        raise CalibrationError(f"a cache in {name} has its steps from a text; give one")
    found = ranges(load_model(checkpoint), windows[:WINDOWS])
    return {"scheme": name, "steps": {module: list(steps) for module, steps in found.items()}}
