"""What a runtime is to do with activations, as a native directory says it in fewbits.json.

"activations": {"scheme": "int8_dynamic", "left": ["model.layers.1.mlp.down_proj.weight", ...]}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..adapters.hf import load_model
from ..errors import CalibrationError
from .mixed import calibrate
from .quantizers import SCHEMES

if TYPE_CHECKING:
    from ..files.base import Checkpoint

WINDOWS = 8  # of the calibration text; the whole model is in memory meanwhile


def record(checkpoint: Checkpoint, name: str, windows: torch.Tensor | None) -> dict[str, Any]:
    """A scheme for this checkpoint, with the sites that cannot bear it, measured on windows `(w, t)` int64.

    Without windows no site is left out. PlanError for an unknown scheme, CalibrationError for a static
    one: its ranges cannot be recorded yet.
    """
    scheme = SCHEMES.get(name)
    if not scheme.dynamic:
        raise CalibrationError(f"{name}: a native directory records dynamic schemes only; use int8_dynamic")
    if windows is None:
        return {"scheme": name, "left": []}
    found = calibrate(load_model(checkpoint), windows[:WINDOWS], scheme)
    return {"scheme": name, "left": list(found.left)}
