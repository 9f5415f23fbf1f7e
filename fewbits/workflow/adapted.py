"""Whether an adapter is of the model that it is given with, as far as this machine can tell.

Shapes alone do not: many models share them. Where the model that the adapter names is here, the vectors
(norms, biases) of both are compared: quantization keeps them, training moves them a little; another model, or
one rescaled by SmoothQuant, AWQ or a rotation, has others.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import torch

from ..adapters.as_loaded import as_loaded
from ..errors import FewbitsError, ModelError
from ..files.adapter import Adapter
from ..files.checkpoint import Checkpoint
from ..files.open import open_checkpoint

FAR = 0.1  # the median relative distance of vectors, above which two models are not one


def check_base(adapter: Adapter, given: Checkpoint) -> str | None:
    """ModelError where the vectors of `given` are not those of the model that the adapter names; a note where
    that model is not here and has another name, or cannot be read."""
    if not adapter.base:
        return None
    base = Path(adapter.base)
    if not base.exists():
        if _name(base) == _name(given.path):
            return None
        return f"the adapter names {adapter.base} as its model, which is not here to be compared"
    try:
        trained = as_loaded(open_checkpoint(base))
    except FewbitsError as error:
        return f"the adapter names {adapter.base} as its model, which is not compared: {error}"
    distances = _distances(trained, given)
    if distances and median(distances.values()) > FAR:
        name = max(distances, key=distances.__getitem__)
        raise ModelError(
            f"{adapter.path} is not of {given.path}; it was trained on {adapter.base}, whose {name} differs "
            f"by {distances[name]:.0%}: another model, or one rescaled by SmoothQuant, AWQ or a rotation; "
            "give a model made of that one"
        )
    return None


def _name(path: Path) -> str:
    return path.name.removesuffix(".gguf").lower()


def _distances(one: Checkpoint, other: Checkpoint) -> dict[str, float]:
    """The relative distance of each vector that both have."""
    found = {}
    for name, tensor in one.tensors.items():
        match = other.tensors.get(name)
        if match is None or len(tensor.shape) != 1 or match.shape != tensor.shape:
            continue
        a, b = tensor.load(), match.load()
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.is_floating_point():
            size = float(a.float().norm())
            found[name] = float((a.float() - b.float()).norm()) / size if size else 0.0
    return found
