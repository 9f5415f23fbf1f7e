"""A quantized model as a transformers model: its weights stay packed in memory.

    load("model.gguf")               -> any file type that fewbits opens

What the modules are, and what they cost, stands in packed.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..adapters.as_loaded import as_loaded
from ..adapters.hub import resolve
from ..adapters.observed import seen_in
from ..adapters.transformers import decoded, filled_model, model_config, needed_tensors, unknown_experts
from ..dtypes import dtype_of
from ..errors import ModelError, raise_all
from ..files.checkpoint import MEMORY, Checkpoint, LazyTensor
from ..files.directory import Stored
from ..files.huggingface import HUGGINGFACE
from ..files.native import quantization_config
from ..files.open import open_checkpoint
from ..qtensor import QTensor
from .register import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of weights


def load(
    model: str | Path | Checkpoint, dtype: torch.dtype = torch.float32, cache_dir: Path | None = None
) -> PreTrainedModel:
    """A model of any file type -> transformers model in evaluation mode, quantized weights packed.

    model: a path, a hub name, or what `fewbits.open` gives. dtype: of activations and of what is not
    quantized. Errors: FileError, ModelError.

        >>> receipt = fewbits.quantize(tiny, out, to="nf4", effort="fast")
        >>> model = fewbits.load(out)
        >>> model.model.layers[0].mlp.up_proj.weight
        PackedWeight(nf4, (512, 256))
        >>> tuple(model(torch.tensor([[1, 2, 3]])).logits.shape)
        (1, 3, 600)
    """
    if not isinstance(model, Checkpoint):
        model = open_checkpoint(resolve(str(model), cache_dir))
    return load_packed(model, dtype)


def load_packed(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A checkpoint -> its transformers model, as `load_model` has it, but quantized weights stay packed.

    Floats are `dtype`. Generates with the checkpoint's generation_config. Errors: those of `load_model`.
    """
    from transformers import GenerationConfig

    checkpoint = as_loaded(checkpoint)
    config = model_config(checkpoint)
    weights: dict[str, torch.Tensor] = {}
    kinds: dict[str, Stored] = {}
    floats = {piece for places, _ in unknown_experts(checkpoint).values() for piece in places}
    for name, tensor in needed_tensors(checkpoint, config).items():
        value = tensor.load()
        if isinstance(value, QTensor) and name not in floats:
            weights |= {f"{name}.{plane}": part.clone() for plane, part in value.planes.items()}
            kinds[name] = (value.format, value.shape)
        else:
            weights[name] = decoded(value, dtype)
    if kinds:
        register()
        config.quantization_config = quantization_config(kinds)
    model = filled_model(checkpoint, config, weights, dtype)
    model.name_or_path = model.config.name_or_path = str(checkpoint.path)  # what an adapter belongs to
    if "generation_config.json" in checkpoint.side_files:
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    return model


def model_checkpoint(model: PreTrainedModel) -> tuple[dict[str, str], Checkpoint]:
    """A model in memory as a checkpoint under the names that files have; and name in files -> in the model.

    Tied copies are left out. What files hold otherwise (fused experts) has the model's name. The roles of its
    modules are those of a file's tensors, where its blocks can be told.
    """
    from .hf_quantizer import file_names

    state = model.state_dict()
    for key in model.all_tied_weights_keys:
        state.pop(key, None)
    names = file_names(model, state)
    names |= {key: key for key in state if key not in names.values()}
    tensors = {
        name: LazyTensor(name, tuple(value.shape), dtype_of(value.dtype), value.nbytes, MEMORY,
                         partial(state.__getitem__, key))
        for name, key in names.items() if (value := state[key]).dtype in _DTYPES
    }  # fmt: skip
    path = Path(getattr(model.config, "name_or_path", "") or type(model).__name__)
    try:
        seen = seen_in(model, {key: {name: None} for name, key in names.items()})
    except ModelError:
        seen = {}
    return names, Checkpoint(path, HUGGINGFACE, tensors, model.config.to_dict(), seen=seen)


def pack_weights(model: PreTrainedModel, found: Mapping[str, tuple[str, QTensor]]) -> PreTrainedModel:
    """Replace weights of a model, in place. found: name in files -> (name in the model, quantized).

    ModelError lists those that belong to no linear map or embedding.
    """
    from .hf_quantizer import pack_in_place
    from .packed import packable

    faults = [
        f"{key} belongs to a {type(module).__name__}, which cannot be packed; leave it out by a rule"
        for key, q in found.values()
        if not packable(module := model.get_submodule(key.rpartition(".")[0]), q.shape)
    ]
    raise_all(ModelError, type(model).__name__, faults)
    packed: PreTrainedModel = pack_in_place(model, found)
    return packed
