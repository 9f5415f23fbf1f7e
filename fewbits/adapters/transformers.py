"""transformers: runs a checkpoint of any kind as a float model.

The model is built empty from the config, then every weight is decoded in turn and loaded. transformers itself
puts experts into its fused arrays, ties weights and computes the rotary buffers. Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ModelError, raise_all
from ..files.checkpoint import Checkpoint, LazyTensor
from ..files.experts import WHOLE, Place, arrays, joined
from ..files.gguf.tokenizer import tokenizer_json
from ..qtensor import QTensor
from ..storage.json import read_json_object
from .conversion import saved_names
from .forward import GENERATES, with_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEADS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING"),
    "sequence": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",),
    "token": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING",),
    "embedding": ("MODEL_MAPPING",),
}
"""what a model gives -> transformers' tables of classes, config -> class"""
POOLING = "modules.json"  # of sentence-transformers: what follows the hidden states
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # here -> in GGUF's key
_ENCODERS = ("cls", "sep", "mask")  # tokens that encoders have besides


def load_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A checkpoint -> its transformers model in evaluation mode, weights decoded to `dtype`.

    Raises ModelError for an architecture that transformers does not have, and one that lists every
    tensor that is missing, unexpected or of another shape.
    """
    from .as_loaded import as_loaded

    checkpoint = as_loaded(checkpoint)
    config = model_config(checkpoint)
    weights = {
        name: decoded(tensor.load(), dtype) for name, tensor in needed_tensors(checkpoint, config).items()
    }
    return filled_model(checkpoint, config, weights, dtype)


def needed_tensors(checkpoint: Checkpoint, config: Any) -> dict[str, LazyTensor]:
    """The tensors that fill a model: all of its own, except for a stored but tied output."""
    left = checkpoint.aside
    if getattr(config, "tie_word_embeddings", False):
        left |= {"lm_head.weight"}
    return {name: tensor for name, tensor in checkpoint.tensors.items() if name not in left}


def filled_model(
    checkpoint: Checkpoint, config: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """The model of a config with these weights; ModelError lists every mismatch."""
    cls = model_class(checkpoint, config)
    for name, (places, shape) in unknown_experts(checkpoint).items():
        if places.keys() <= weights.keys():
            weights[name] = joined({piece: weights.pop(piece) for piece in places}, places, shape)
    with quiet():
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are returned in `info` and refused below, with the rest
        )
    faults = [f"tensor {name!r} is missing" for name in sorted(info["missing_keys"])]
    faults += [f"tensor {name!r} is not one of the model's" for name in sorted(info["unexpected_keys"])]
    faults += [f"tensor {row[0]!r} is {tuple(row[1])}, the config says {tuple(row[2])}"
               for row in sorted(info["mismatched_keys"])]  # fmt: skip
    raise_all(ModelError, f"{checkpoint.path} as {cls.__name__}", faults)
    return model.eval()


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """A checkpoint -> its transformers model in evaluation mode, without weights.

    Every parameter is on the meta device and takes no memory; buffers (rotary frequencies, scales of
    embeddings) are real. Attention is "sdpa" where the class has it; experts run one after the other, each a
    plain linear.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def hollow(module: Any, name: str, parameter: torch.nn.Parameter) -> Any:
        return torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    config = model_config(checkpoint)
    cls = model_class(checkpoint, config)
    config._attn_implementation = None  # sdpa where a class has it, towers too
    config._experts_implementation = "eager"
    for each in filter(None, (config, getattr(config, "text_config", None))):
        if getattr(each, "use_cache", False):
            each.use_cache = False  # not every class passes the argument on
    hook = register_module_parameter_registration_hook(hollow)
    try:
        with quiet():
            return cls(config).eval()
    finally:
        hook.remove()


def tensors_in(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, dict[str, Place]]:
    """key of the model -> the tensors of the checkpoint in it, experts one by one, and the place of each."""
    made_of = saved_names(model, checkpoint.tensors)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    whole = {name: key for key, found in made_of.items() for name, place in found.items() if place == WHOLE}
    split = arrays({name: shapes[key] for name, key in whole.items()}, checkpoint.config)
    for name, pieces in split.items():
        if name not in checkpoint.tensors:
            made_of[whole[name]] = pieces
    return made_of


def unknown_experts(checkpoint: Checkpoint) -> dict[str, tuple[dict[str, Place], tuple[int, ...]]]:
    """Arrays of experts that transformers reads as they are, and the checkpoint has one expert at a time:
    the name in a file of transformers -> the checkpoint's tensors with their places, and the whole shape."""
    if not any(".experts." in name for name in checkpoint.tensors):
        return {}
    model = empty_model(checkpoint)
    state = model.state_dict()
    shapes = {
        name: tuple(state[key].shape)
        for key, made_of in saved_names(model, checkpoint.tensors).items()
        for name, place in made_of.items()
        if place == WHOLE and name not in checkpoint.tensors
    }
    return {name: (places, shapes[name]) for name, places in arrays(shapes, checkpoint.config).items()}


def model_class(checkpoint: Checkpoint, config: Any) -> Any:
    """transformers' class that runs a checkpoint: the one that its config names, or AutoModel's where a
    directory of sentence-transformers pools hidden states; else the first of HEADS that has this config."""
    return _head(checkpoint, config)[1]


def head_of(checkpoint: Checkpoint, config: Any = None) -> str:
    """What a checkpoint's model gives: a key of HEADS."""
    return _head(checkpoint, model_config(checkpoint) if config is None else config)[0]


def _head(checkpoint: Checkpoint, config: Any) -> tuple[str, Any]:
    import transformers
    from transformers.models.auto import modeling_auto

    found: list[tuple[str, Any]] = []
    for head, tables in HEADS.items():
        for classes in (getattr(modeling_auto, table) for table in tables):
            if type(config) in classes:
                cls = classes[type(config)]
                found += [(head, each) for each in (cls if isinstance(cls, tuple) else (cls,))]
    named = checkpoint.config.get("architectures") or ()
    if POOLING in checkpoint.side_files and "embedding" in dict(found):
        return "embedding", dict(found)["embedding"]
    parts = [getattr(transformers, name, None) for name in named]  # of larger models: in no table
    found += [
        ("causal", cls)
        for cls in parts
        if cls is not None and getattr(cls, "config_class", None) is type(config) and cls.can_generate()
    ]
    for head, cls in found:
        if getattr(cls, "__name__", None) in named:
            return with_head(head, cls, config)
    if not found or (named and found[0][0] not in GENERATES):
        known = ", ".join(f"{cls.__name__} ({head})" for head, cls in found if isinstance(cls, type))
        raise ModelError(
            f"{checkpoint.path}: config.json names {', '.join(named) or 'no architecture'}; of "
            f"{config.model_type!r} these can be run: {known or 'none'}"
        )
    return with_head(*found[0], config)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with its special tokens and chat template: that of AutoTokenizer, or of
    tokenizer.json alone where transformers does not know its class."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if checkpoint.gguf_keys:
        return _gguf_tokenizer(checkpoint)
    files = checkpoint.side_files
    if not files:
        raise ModelError(f"{checkpoint.path}: no tokenizer files; copy the model's tokenizer.json there")
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                checkpoint.path, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        if "tokenizer.json" not in files:
            raise ModelError(
                f"{checkpoint.path}: transformers makes no tokenizer of its files; copy the model's "
                "tokenizer.json there"
            ) from error
    settings = read_json_object(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    given = {f"{name}_token": _content(settings.get(f"{name}_token")) for name in (*_SPECIAL, *_ENCODERS)}
    template = settings.get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(files["tokenizer.json"]),
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in given.items() if token is not None},
    )


def _gguf_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    metadata = {
        key: value.plain() for key, value in checkpoint.gguf_keys.items() if key.startswith("tokenizer.")
    }
    spec = tokenizer_json(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)},
    )


def _content(token: Any) -> str | None:
    """A special token of tokenizer_config.json: a string, or a dictionary with its content."""
    return token.get("content") if isinstance(token, dict) else token


def model_config(checkpoint: Checkpoint) -> Any:
    """The checkpoint's config as transformers' own class."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    kind = checkpoint.config.get("model_type")
    if kind is None:
        raise ModelError(
            f"{checkpoint.path}: no config from which to run this model; its architecture "
            f"({checkpoint.provenance.get('architecture', 'unnamed')}) is unknown"
        )
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{checkpoint.path}: transformers has no model of type {kind!r}; code that comes with a "
            "checkpoint is never run. Quantizing works, evaluating does not"
        )
    given = deepcopy(checkpoint.config)  # transformers changes its argument
    given.pop("quantization_config", None)
    with quiet():
        return CONFIG_MAPPING[kind].from_dict(PreTrainedConfig._decode_special_floats(given))


def classes_of(model_type: str) -> list[str]:
    """The classes that AutoModelForCausalLM and AutoModel take for a model type."""
    from transformers.models.auto import modeling_auto as auto

    tables = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_MAPPING_NAMES)
    return [name for table in tables if isinstance(name := table.get(model_type), str)]


def default_fields(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that config.json leaves to the class, with the values that it derives; and under the usual names
    (num_hidden_layers) those that the class calls otherwise (n_layer)."""
    from transformers import PreTrainedConfig

    common = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for field in fields(type(config))} - common
    known = {name: value for name, value in config.to_dict().items() if name in own}
    known |= {usual: known.get(name) for usual, name in type(config).attribute_map.items()}
    known = {name: value for name, value in known.items() if given.get(name) is None and value is not None}
    encoded: dict[str, Any] = config._encode_special_floats(known)  # as config.json has infinities
    return encoded


def decoded(value: torch.Tensor | QTensor, dtype: torch.dtype) -> torch.Tensor:
    """A float copy that does not reference the mapped file."""
    return value.decode().to(dtype) if isinstance(value, QTensor) else value.to(dtype, copy=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses progress bars and advice of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def known_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config with every field that the installed transformers derives (layer types, windows), or None for a
    model type that it does not have."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    given = {key: value for key, value in deepcopy(dict(config)).items() if key != "quantization_config"}
    if given.get("model_type") not in CONFIG_MAPPING:
        return None
    with quiet():
        full = CONFIG_MAPPING[given["model_type"]].from_dict(PreTrainedConfig._decode_special_floats(given))
    fields: dict[str, Any] = full.get_text_config().to_dict()
    return fields


def known_models() -> set[str]:
    """The model types of which the installed transformers has a model of one of HEADS."""
    from transformers.models.auto import modeling_auto

    tables = [table for tables in HEADS.values() for table in tables]
    return {kind for table in tables for kind in getattr(modeling_auto, f"{table}_NAMES")}


def quantization_methods() -> set[str]:
    """The values of quant_method that the installed transformers reads."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return set(AUTO_QUANTIZATION_CONFIG_MAPPING)


def gguf_architectures() -> set[str]:
    """The architectures whose GGUF files the installed transformers reads (and decodes to float)."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return {name.replace("_", "") for name in GGUF_SUPPORTED_ARCHITECTURES}
