"""Which tensors of a file are in which of a model's, by transformers' own conversion.

renamed      encoder.layer.0.attn_ln       is layers.0.post_attention_layernorm
in a stack   experts.7.gate_proj.weight    is a part of experts.gate_up_proj
split        attention.qkv_proj.weight     becomes self_attn.q_proj.weight, k_proj, v_proj
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from ..dtypes import DType
from ..files.checkpoint import LazyTensor
from ..files.experts import WHOLE, Place, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Views(TorchFunctionMode):
    """Keeps views: nothing is copied only to lie in one piece."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if function is torch.Tensor.contiguous else function(*args, **(kwargs or {}))


def saved_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, dict[str, Place]]:
    """key of a model's state -> the tensors of a file in it, and the place of each.

    names: those of the file. transformers' own conversion says what they become: it is applied backwards to
    empty tensors, whose views tell where each lies; a name that it only renames is followed forwards.
    """
    from transformers.core_model_loading import rename_source_key, revert_weight_conversion

    state = {key: torch.empty(value.shape, device="meta") for key, value in model.state_dict().items()}
    owner = {value.untyped_storage()._cdata: key for key, value in state.items()}
    found: dict[str, dict[str, Place]] = {key: {} for key in state}
    with _Views():
        saved = revert_weight_conversion(model, dict(state))
    for name, value in saved.items():
        key = owner.get(value.untyped_storage()._cdata)
        place = None if key is None else place_of(state[key], value)
        if key is not None and place is not None:
            found[key][name] = place
    renamings, converters = _steps(model)
    known = {name for made_of in found.values() for name in made_of}
    for name in names:
        if name in known:
            continue
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is None and key in found:
            found[key] = {name: WHOLE}
    return {key: made_of or {key: WHOLE} for key, made_of in found.items()}


def split_joined(
    model: PreTrainedModel, tensors: Mapping[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """-> the tensors, the parts of joined ones under the model's names, and a note. transformers' own
    conversion is applied to empty tensors, whose views tell where each part lies. A quantized tensor, and one
    whose parts are no views of it, stays as it is."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _steps(model)
    splits = [each for each in converters if splits_one(each)]
    if not splits:
        return dict(tensors), []
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


def splits_one(step: Any) -> bool:
    """Whether a converter makes several tensors of one."""
    return len(step.source_patterns) == 1 < len(step.target_patterns)


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


def _steps(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """What transformers does with the names of a file, and with its tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    steps = get_model_conversion_mapping(model)
    kinds = (WeightRenaming, WeightConverter)
    renamings, converters = ([step for step in steps if isinstance(step, kind)] for kind in kinds)
    return renamings, converters
