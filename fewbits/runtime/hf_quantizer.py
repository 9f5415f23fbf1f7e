"""transformers' side of native directories: quant_method "fewbits" in config.json.

    {"quant_method": "fewbits", "version": 1, "formats": {"nf4": {"model.layers.0....weight": [n, k], ...}}}

from_pretrained: the model is built without memory, the modules of those weights become packed ones, and
transformers fills their planes as it fills any buffer. What is no linear map or embedding there (experts
that it fuses into one array, GPT-2's transposed weights) is decoded to floats, and a warning says so.
save_pretrained: the state dict has the planes under the names of a native directory already.

Imported by register.py alone, when transformers is: these classes derive from its own.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..adapters.conversion import splits_one
from ..adapters.transformers import tensors_in
from ..errors import FileError, ModelError, raise_all
from ..files.directory import QuantizedEntry
from ..files.experts import Place
from ..files.native import METHOD, NATIVE, VERSION, named_formats
from ..formats.base import Format
from ..qtensor import QTensor
from .packed import PackedWeight, pack, packable, packed_modules, unpack_module

Shape = tuple[int, int]
_EXPERT = re.compile(r"\.experts\.\d+\.")


@register_quantization_config(METHOD)
class FewbitsConfig(QuantizationConfigMixin):
    """formats: format -> {tensor: [n, k]}, tensors as files name them."""

    def __init__(
        self, version: int = VERSION, formats: Mapping[str, Mapping[str, Any]] | None = None, **_: Any
    ) -> None:
        self.quant_method = METHOD
        self.version = version
        self.formats = {name: dict(tensors) for name, tensors in (formats or {}).items()}
        if version != VERSION:
            raise ModelError(
                f"config.json has version {version} of quant_method {METHOD}, this program reads {VERSION}; "
                "use the fewbits that wrote it"
            )

    def rows(self) -> dict[str, tuple[Format, Shape]]:
        """tensor -> its format and shape; FileError lists what is neither."""
        faults: list[str] = []
        held = NATIVE.find(self.to_dict(), {}, faults)
        raise_all(FileError, "quantization_config", faults)
        return {
            name: (row.format, row.shape) for name, row in held.items() if isinstance(row, QuantizedEntry)
        }

    def drop(self, tensors: set[str]) -> None:
        kept = {
            name: {tensor: shape for tensor, shape in found.items() if tensor not in tensors}
            for name, found in self.formats.items()
        }
        self.formats = {name: found for name, found in kept.items() if found}


class Decode(ConversionOps):
    """Planes of weights that stand in one fused array -> floats, before transformers' own steps join them.

    table: (fused array, pattern of the sources) -> their formats and shapes, in the order they come in.
    """

    def __init__(self, quantizer: FewbitsQuantizer) -> None:
        self.hf_quantizer = quantizer  # by this name transformers knows that dtypes are our affair

    def __deepcopy__(self, memo: Any) -> Decode:
        return self

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: Any,
        **_: Any,
    ) -> dict[str, list[torch.Tensor]]:
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        planes: dict[str, dict[str, list[torch.Tensor]]] = defaultdict(dict)
        done: dict[str, list[torch.Tensor]] = {}
        for pattern, tensors in input_dict.items():
            base, _dot, plane = pattern.rpartition(".")
            if (full_layer_name, base) in self.hf_quantizer.fused:
                planes[base][plane] = tensors
            else:
                done[pattern] = [tensor.to(dtype) for tensor in tensors]
        for base, found in planes.items():
            if base in done:
                raise ModelError(f"{full_layer_name}: some of {base} are quantized and some are not")
            queues = {plane: iter(tensors) for plane, tensors in found.items()}
            done[base] = [
                QTensor(form, shape, {p.name: next(queues[p.name]) for p in form.planes}).decode().to(dtype)
                for form, shape in self.hf_quantizer.fused[full_layer_name, base]
            ]
        return done


class Stack(ConversionOps):
    """Experts that transformers' own mapping does not know -> the array of the class; the last step."""

    def __init__(self, quantizer: FewbitsQuantizer) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: Any) -> Stack:
        return self

    def convert(
        self, input_dict: dict[str, list[torch.Tensor]], *_: Any, full_layer_name: str, model: Any, **__: Any
    ) -> dict[str, Any]:
        stacks, whole = self.quantizer.stacks, None
        for pattern, tensors in input_dict.items():
            places = stacks.get((full_layer_name, pattern))
            if places is None:
                return input_dict
            if whole is None:
                shape = model.get_parameter_or_buffer(full_layer_name).shape
                whole = torch.empty(shape, dtype=tensors[0].dtype, device=tensors[0].device)
            for place, tensor in zip(places, tensors, strict=True):
                place.of(whole).copy_(tensor)
        return {full_layer_name: whole}


@register_quantizer(METHOD)
class FewbitsQuantizer(HfQuantizer):
    """Loads native directories; to quantize a float model there is fewbits.quantize_model."""

    requires_calibration = True  # in transformers' words: no quantizing while loading

    def __init__(self, quantization_config: FewbitsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.planes: set[str] = set()  # the keys that are filled with planes
        self.fused: dict[tuple[str, str], list[tuple[Format, Shape]]] = {}
        self.stacks: dict[tuple[str, str], list[Place]] = {}  # as `fused`: where each lies in its array
        self.decoded: set[str] = set()
        self._changed: dict[int, Any] = {}

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        weights, fused = {}, defaultdict(list)
        state = model.state_dict()
        rows, find = self.quantization_config.rows(), _finder(model, state)
        found = {name: find(name) for name in rows}
        single = _single_experts(model, rows, found, state)
        for name in sorted(rows, key=dot_natural_key):
            form, shape = rows[name]
            key, pattern = found[name]
            if name in single:
                pattern = _EXPERT.sub(".experts.*.", key)
                key, place = single[name]
                self.stacks.setdefault((key, pattern), []).append(place)
            path, _dot, last = key.rpartition(".")
            module = model.get_submodule(path) if last == "weight" and key in state else None
            if pattern is None and module is not None and packable(module, shape):
                planes = {plane.name: plane.empty(*shape) for plane in form.planes}
                weights[path] = PackedWeight(QTensor(form, shape, planes), module.weight.dtype)
            elif pattern is not None or key in state:
                fused[key, pattern or key].append((form, shape))
                self.decoded.add(name)
        self.fused = dict(fused)
        pack(model, weights)
        self.planes = {f"{n}.weight.{p.name}" for n, w in weights.items() for p in w.format.planes}

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        planes = {plane.name for rows in self.fused.values() for form, _ in rows for plane in form.planes}
        return {"weight": ["weight", *(f"weight.{plane}" for plane in sorted(planes))]}

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": Decode}

    def get_weight_conversions(self) -> list[Any]:
        made: dict[str, list[str]] = {}
        for (key, pattern), rows in self.fused.items():
            if key == pattern or (key, pattern) in self.stacks:
                planes = dict.fromkeys(plane.name for form, _ in rows for plane in form.planes)
                made.setdefault(key, []).extend(f"{pattern}.{plane}" for plane in planes)
        return [WeightConverter(sources, [key], [Decode(self), Stack(self)]) for key, sources in made.items()]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        if not self.fused:
            return weight_conversions
        # A quantized tensor is stored in the parts that the model has: what splits one has floats to read.
        joined = [each for each in weight_conversions if splits_one(each)]
        rest = [each for each in weight_conversions if not splits_one(each)]
        updated = super().update_weight_conversions(rest, model)
        self._changed = {id(ours): theirs for ours, theirs in zip(updated, rest, strict=False)} | {
            id(ours): None for ours in updated[len(rest) :]
        }
        return [*joined, *updated]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return None if converter.target_patterns[0] in self.planes else super().get_new_dtype(
            converter, param, dtype
        )  # fmt: skip

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self.decoded:
            warnings.warn(
                f"{len(self.decoded)} quantized weights, such as {min(self.decoded)}, are held as floats: "
                "transformers has no linear module for each of them (experts are fused there)",
                stacklevel=2,
            )
            self.quantization_config.drop(self.decoded)
            # Saving undoes the conversions of loading: the model's own, for these are floats now.
            used = [self._changed.get(id(found), found) for found in model._weight_conversions]
            model._weight_conversions = [found for found in used if found is not None]
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        done: dict[int, torch.nn.Parameter] = {}
        for _, module, weight in list(packed_modules(model)):
            if id(weight) not in done:
                done[id(weight)] = torch.nn.Parameter(weight.decode(dtype), requires_grad=False)
            unpack_module(module, done[id(weight)])
        model.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _finder(model: Any, state: Mapping[str, Any]) -> Callable[[str], tuple[str, str | None]]:
    """-> name of a tensor in a file -> (its name in the model, the pattern of the conversion it goes through,
    None where it is only renamed). state: the model's."""
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    prefix = model.base_model_prefix

    def find(name: str) -> tuple[str, str | None]:
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        return key, pattern

    return find


def _single_experts(
    model: Any, rows: Mapping[str, Any], found: Mapping[str, tuple[str, str | None]], state: Mapping[str, Any]
) -> dict[str, tuple[str, Place]]:
    """Experts of which transformers' mapping knows nothing: name in a file -> array of the class, place."""
    lost = {name for name, (key, pattern) in found.items() if pattern is None and key not in state}
    if not any(_EXPERT.search(name) for name in lost):
        return {}
    file: Any = SimpleNamespace(tensors=rows, config=model.config.to_dict())
    made_of = tensors_in(model, file)
    return {
        name: (key, place) for key, parts in made_of.items() for name, place in parts.items() if name in lost
    }


def file_names(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The tensors of a model's state that are saved as they are: name in files -> name in the model."""
    mine = {id(value): key for key, value in state.items()}
    saved = revert_weight_conversion(model, dict(state))
    return {name: mine[id(value)] for name, value in saved.items() if id(value) in mine}


def pack_in_place(model: Any, found: Mapping[str, tuple[str, QTensor]]) -> Any:
    """Weights of a float model -> packed. found: name in files -> (name in the model, quantized)."""
    weights = {}
    for key, q in found.values():
        module = key.removesuffix(".weight")
        weights[module] = PackedWeight(q, model.get_submodule(module).weight.dtype)
    pack(model, weights)
    formats = named_formats({name: (q.format, q.shape) for name, (_, q) in found.items()})
    old = getattr(model, "hf_quantizer", None)
    if isinstance(old, FewbitsQuantizer):
        for name, tensors in old.quantization_config.formats.items():
            formats.setdefault(name, {}).update(tensors)
    config = FewbitsConfig(formats=formats)
    model.hf_quantizer = FewbitsQuantizer(config)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, METHOD
    return model
