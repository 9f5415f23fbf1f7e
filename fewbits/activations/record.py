"""What a runtime is to do with activations, as a native directory says it in fewbits.json.

"activations": {"scheme": "int8_dynamic", "left": ["model.layers.1.mlp.down_proj.weight", ...]}

A static scheme has "ranges" besides, {site: [step, zero]}, and leaves no site out: engines have one scheme
for all. Only compressed-tensors files keep those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..adapters.hf import load_model
from ..errors import CalibrationError
from .mixed import calibrate, observe
from .quantizers import SCHEMES

if TYPE_CHECKING:
    from ..files.base import Checkpoint

RULE = "mse"  # of the observer that fixes a static range
WINDOWS = 8  # of the calibration text; the whole model is in memory meanwhile


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
