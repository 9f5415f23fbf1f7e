"""Parameters that a class computes itself, and that its files lack: Marian's table of positions."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fill_computed(model: PreTrainedModel, made_of: dict[str, Any], names: Container[str]) -> None:
    """Give a model on the meta device, and take out of `made_of` (key -> the tensors in it), what none of
    `names` is, what the class says may be missing, and what it fills with the same values each time."""
    patterns = "|".join(model._keys_to_ignore_on_load_missing or [])
    for key in [key for key in made_of if patterns and re.search(patterns, key)]:
        path, _, leaf = key.rpartition(".")
        module = model.get_submodule(path)
        if any(name in names for name in made_of[key]) or leaf not in module._parameters:
            continue
        first, second = (_filled(model, module, leaf) for _ in range(2))
        if torch.equal(first, second):
            module._parameters[leaf] = torch.nn.Parameter(first, requires_grad=False)
            del made_of[key]


@torch.no_grad()
def _filled(model: PreTrainedModel, module: torch.nn.Module, leaf: str) -> torch.Tensor:
    """A parameter as the class initializes it; noise where it does not."""
    empty = module._parameters[leaf]
    assert empty is not None
    value = torch.nn.Parameter(torch.randn(empty.shape), requires_grad=False)
    module._parameters[leaf] = value
    try:
        model._init_weights(module)
        return value.detach().clone()
    finally:
        module._parameters[leaf] = empty
