"""Tensors of a file that transformers splits when it loads them: query, key and value in one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from ..dtypes import DType
from ..files.checkpoint import LazyTensor
from ..files.experts import Place, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def split_joined(
    model: PreTrainedModel, tensors: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """-> the tensors, the parts of joined ones under the model's names, and a note. transformers' own
    conversion is applied to empty tensors, whose views tell where each part lies. A quantized tensor, and one
    whose parts are no views of it, stays as it is."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    splits = [
        step for step in steps
        if isinstance(step, WeightConverter) and len(step.source_patterns) == 1 < len(step.target_patterns)
    ]  # fmt: skip
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    found: dict[str, LazyTensor] = {}
    first = ""
    for name, tensor in tensors.items():
        key, pattern = rename_source_key(name, renamings, splits, model.base_model_prefix, shapes)
        step = next((each for each in splits if pattern in each.source_patterns), None)
        parts = {} if step is None or name in shapes else _parts(model, step, key, tensor)
        if not parts or any(shapes.get(part) != place[1] for part, place in parts.items()):
            found[name] = tensor
            continue
        first = first or f"{name} becomes {', '.join(parts)}"
        found |= {part: _part(tensor, part, *place) for part, place in parts.items()}
    return found, [f"joined tensors are split as transformers does: {first}"] if first else []


def _parts(
    model: PreTrainedModel, step: Any, key: str, tensor: LazyTensor
) -> dict[str, tuple[Place, torch.Size]]:
    """Names of a joined tensor's parts -> their places in it, and shapes; none where they are no views."""
    if not isinstance(tensor.kind, DType):
        return {}
    whole = torch.empty(tensor.shape, device="meta")
    made: dict[str, Any] = {step.source_patterns[0]: [whole]}
    for operation in step.operations:
        made = operation.convert(
            made, source_patterns=step.source_patterns, target_patterns=step.target_patterns,
            full_layer_name=key, model=model, config=model.config, missing_keys=None,
        )  # fmt: skip
    before, _, after = key.partition(step.target_patterns[0])
    views = {
        f"{before}{name}{after}": part[0] if isinstance(part, list) else part for name, part in made.items()
    }
    places = {name: place_of(whole, view) for name, view in views.items()}
    if any(place is None for place in places.values()):
        return {}
    return {name: (place, views[name].shape) for name, place in places.items() if place is not None}


def _part(tensor: LazyTensor, name: str, place: Place, shape: torch.Size) -> LazyTensor:
    nbytes = tensor.nbytes * prod(shape) // max(1, prod(tensor.shape))
    load = partial(_loaded, tensor, place)
    return replace(tensor, name=name, shape=tuple(shape), nbytes=nbytes, load=load)


def _loaded(tensor: LazyTensor, place: Place) -> torch.Tensor:
    whole = tensor.load()
    assert isinstance(whole, torch.Tensor)
    return place.of(whole)
