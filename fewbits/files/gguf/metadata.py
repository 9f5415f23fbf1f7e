"""The GGUF keys of a model: hyperparameters, rotary embedding, tokenizer, template, `general.*`.

The mapping of config fields to keys is data (model/archs.toml, model/rope.py); this module converts values in
both directions. A GGUF source keeps its own keys.
Spec: github.com/ggml-org/ggml, docs/gguf.md; key names: `gguf.constants.Keys`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import size_label
from gguf.constants import GGML_QUANT_VERSION, Keys

from ...errors import FileError, ModelError, raise_all
from ...model.archs import (
    Architecture,
    architectures,
    check_values,
    complete,
    expert_count,
    require_architecture,
)
from ...model.rope import original_context, rope_from_keys, rope_keys
from ...storage.json import read_json_object
from ..checkpoint import Checkpoint
from ..side_files import card_fields
from .file import GGUFValue, GGUFValueType
from .tokenizer import strings, tokenizer_json, tokenizer_keys, with_added

_TYPES = {"u32": GGUFValueType.UINT32, "f32": GGUFValueType.FLOAT32}
_DROPPED = re.compile(r"^(split\.|general\.(alignment|file_type|quantization_version)$)")
_PATTERN = "attention.sliding_window_pattern"
_SPECIAL = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "sep": Keys.Tokenizer.SEP_ID,
}
GENERATION = "generation_config.json"
_ENDS = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
_KNOWN_ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "[e~[",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>",
    "<|end_of_text|>", "<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>",
})  # fmt: skip
"""Texts of tokens at which llama.cpp stops, whatever a file says: llama.cpp, src/llama-vocab.cpp, its list of
end-of-generation tokens"""


def u32(value: int) -> GGUFValue:
    return GGUFValue(GGUFValueType.UINT32, int(value))


def f32(value: float) -> GGUFValue:
    return GGUFValue(GGUFValueType.FLOAT32, float(value))


def text(value: str) -> GGUFValue:
    return GGUFValue(GGUFValueType.STRING, value)


def flag(value: bool) -> GGUFValue:
    return GGUFValue(GGUFValueType.BOOL, bool(value))


# ---- Hugging Face -> keys ------------------------------------------------------------------------


def gguf_metadata(
    checkpoint: Checkpoint, arch: Architecture | None, file_type: int | None = None, pre: str | None = None
) -> dict[str, GGUFValue]:
    """Every key of the GGUF file of a checkpoint, typed.

    arch: None for a GGUF source, whose keys are copied for every architecture.
    file_type: llama.cpp's number of the mixture (`general.file_type`). pre: names the pre-tokenizer
    if it is not recognized. Raises ModelError for facts that GGUF cannot express.
    """
    if checkpoint.gguf_keys:
        keys = {key: value for key, value in checkpoint.gguf_keys.items() if not _DROPPED.match(key)}
    else:
        arch = arch or require_architecture(checkpoint.config)
        keys = general_keys(checkpoint, arch) | hyperparameter_keys(checkpoint.config, arch)
        keys |= _tokenizer(checkpoint, pre)
    keys[Keys.General.QUANTIZATION_VERSION] = u32(GGML_QUANT_VERSION)
    if file_type is not None:
        keys[Keys.General.FILE_TYPE] = u32(file_type)
    return keys


def general_keys(checkpoint: Checkpoint, arch: Architecture) -> dict[str, GGUFValue]:
    """`general.*`: architecture, name, size, and license and base model from a README."""
    keys = {
        Keys.General.ARCHITECTURE: text(arch.gguf),
        Keys.General.TYPE: text("model"),
        Keys.General.NAME: text(model_name(checkpoint)),
        Keys.General.SIZE_LABEL: text(_size_label(checkpoint, expert_count(arch, checkpoint.config))),
    }
    card = _card(checkpoint.side_files.get("README.md"))
    if "license" in card:
        keys[Keys.General.LICENSE] = text(card["license"])
    if "base_model" in card:
        organization, _, name = card["base_model"].rpartition("/")
        keys[Keys.General.BASE_MODEL_COUNT] = u32(1)
        keys[Keys.General.BASE_MODEL_NAME.format(id=0)] = text(name)
        if organization:
            keys[Keys.General.BASE_MODEL_ORGANIZATION.format(id=0)] = text(organization)
            keys[Keys.General.BASE_MODEL_REPO_URL.format(id=0)] = text(
                f"https://huggingface.co/{card['base_model']}"
            )
    return keys


def model_name(checkpoint: Checkpoint) -> str:
    """The model's name: its own, that in a native directory, or that of its path."""
    if Keys.General.NAME in checkpoint.gguf_keys:
        return str(checkpoint.gguf_keys[Keys.General.NAME].value)
    if isinstance(checkpoint.metadata.get("name"), str):
        return str(checkpoint.metadata["name"])
    given = str(checkpoint.config.get("_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1]
    return given or checkpoint.path.resolve().name


def _size_label(checkpoint: Checkpoint, experts: int) -> str:
    """Rounded parameter count: 163M, or 8x7B with shared parameters counted for each expert."""
    counts = {name: prod(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    routed = sum(count for name, count in counts.items() if ".experts." in name)
    total = sum(counts.values())
    return str(size_label(total, total - routed, routed // max(experts, 1), experts))


def _card(readme: Path | None) -> dict[str, str]:
    """`license` and `base_model` of a model card; the first if there are several."""
    known = card_fields(readme)
    fields = {field: known[field] for field in ("license", "base_model") if field in known}
    return {field: value if isinstance(value, str) else value[0] for field, value in fields.items()}


def hyperparameter_keys(config: Mapping[str, Any], arch: Architecture) -> dict[str, GGUFValue]:
    """A config -> `<arch>.*`; it has passed `archs.check_config`."""
    fields = complete(config)
    keys: dict[str, GGUFValue] = {}
    for key in arch.keys:
        value = next((fields[field] for field in key.fields if fields.get(field) is not None), None)
        if value is None and not key.optional:
            raise ModelError(
                f"config field {' or '.join(key.fields)} is missing (GGUF key {arch.gguf}.{key.name})"
            )
        if value is not None and not (key.optional and not value):
            keys[key.name] = GGUFValue(_TYPES[key.type], value)
    for name, number in rope_keys(fields, arch.rope).items():
        keys[name] = (
            text(number)
            if isinstance(number, str)
            else u32(number)
            if isinstance(number, int)
            else f32(number)
        )
    if arch.gguf == "gemma3":
        keys |= _window_pattern(fields)
    return {f"{arch.gguf}.{name}": value for name, value in keys.items()}


def _window_pattern(fields: Mapping[str, Any]) -> dict[str, GGUFValue]:
    """p if every p-th layer has full attention, else a flag for each layer."""
    layers = int(fields["num_hidden_layers"])
    period = fields.get("_sliding_window_pattern") or fields.get("sliding_window_pattern") or 6
    types = fields.get("layer_types")
    sliding = (
        [(i + 1) % period != 0 for i in range(layers)]
        if types is None
        else [t == "sliding_attention" for t in types]
    )
    if len(sliding) != layers:
        raise ModelError(f"layer_types has {len(sliding)} entries for {layers} layers")
    for p in range(1, layers + 2):
        if sliding == [(i + 1) % p != 0 for i in range(layers)]:
            same = [(i + 1) % period != 0 for i in range(layers)] == sliding
            return {_PATTERN: u32(period if same else p)}
    return {_PATTERN: GGUFValue(GGUFValueType.ARRAY, sliding, GGUFValueType.BOOL)}


def _tokenizer(checkpoint: Checkpoint, pre: str | None) -> dict[str, GGUFValue]:
    """`tokenizer.*` from the side files: tokenizer.json, tokenizer_config.json, templates."""
    files, config = checkpoint.side_files, checkpoint.config
    if "tokenizer.json" not in files:
        raise FileError(
            f"{checkpoint.path}: no tokenizer.json, from which the tokenizer of a GGUF file is made; "
            "save the tokenizer with a current transformers (save_pretrained writes it)"
        )
    spec = read_json_object(files["tokenizer.json"])
    settings = read_json_object(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    spec = with_added(spec, settings)
    keys = tokenizer_keys(spec, int(config["vocab_size"]), pre, files.get("tokenizer.model"))
    ids = _special_ids(settings, config, keys[Keys.Tokenizer.LIST].value)
    keys |= {_SPECIAL[name]: u32(index) for name, index in ids.items()}
    keys |= _further_ends(checkpoint, keys[Keys.Tokenizer.LIST].value, ids.get("eos"))
    adds = _adds_special(spec, ids)
    for name, key in (("bos", Keys.Tokenizer.ADD_BOS), ("eos", Keys.Tokenizer.ADD_EOS)):
        keys[key] = flag(adds[name] and name in ids)
    return keys | _templates(files.get("chat_template.jinja"), settings)


def _special_ids(settings: Mapping[str, Any], config: Mapping[str, Any], tokens: list[str]) -> dict[str, int]:
    """bos, eos ... -> id: from the tokenizer, else from the config."""
    index = {token: i for i, token in enumerate(tokens)}
    ids = {}
    for name in _SPECIAL:
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = index.get(token) if token is not None else config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < len(tokens):
            ids[name] = number
    return ids


def _further_ends(checkpoint: Checkpoint, tokens: list[str], eos: int | None) -> dict[str, GGUFValue]:
    """The keys of two more tokens that end a text, where llama.cpp does not know them by their words."""
    files = checkpoint.side_files
    generation = read_json_object(files[GENERATION]) if GENERATION in files else {}
    said = [fields.get("eos_token_id") for fields in (generation, checkpoint.text_config)]
    ends = dict.fromkeys(i for ids in said for i in (ids if isinstance(ids, list) else [ids]))
    more = [i for i in ends if isinstance(i, int) and i != eos and 0 <= i < len(tokens)]
    return {
        key: u32(i)
        for key, i in zip(_ENDS[1:], [i for i in more if tokens[i] not in _KNOWN_ENDS], strict=False)
    }


def _adds_special(spec: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, bool]:
    """Whether the tokenizer adds BOS before and EOS after a text: as in AutoTokenizer, that is for its
    post-processor to say, not for `add_bos_token` of tokenizer_config.json."""
    from tokenizers import Tokenizer

    around = Tokenizer.from_str(json.dumps(spec)).encode("a").ids
    return {"bos": around[:1] == [ids.get("bos")], "eos": around[-1:] == [ids.get("eos")]}


def _templates(jinja: Path | None, settings: Mapping[str, Any]) -> dict[str, GGUFValue]:
    """The chat template, and further ones by name."""
    given = settings.get("chat_template")
    named = {"default": given} if isinstance(given, str) else {t["name"]: t["template"] for t in given or []}
    if jinja is not None:
        named["default"] = jinja.read_text(encoding="utf-8")
    keys = {}
    others = sorted(set(named) - {"default"})
    if "default" in named:
        keys[Keys.Tokenizer.CHAT_TEMPLATE] = text(named["default"])
    if others:
        keys[Keys.Tokenizer.CHAT_TEMPLATES] = strings(others)
        keys |= {Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name): text(named[name]) for name in others}
    return keys


# ---- keys -> Hugging Face ------------------------------------------------------------------------


def architecture_of(metadata: Mapping[str, Any]) -> Architecture | None:
    """The architecture of a GGUF file's plain keys, or None if it is unknown."""
    name = metadata.get(Keys.General.ARCHITECTURE)
    for arch in architectures().values():
        if arch.gguf == name and all(metadata.get(f"{name}.{key}") for key in arch.when):
            return arch
    return None


def config_from_keys(
    metadata: Mapping[str, Any], arch: Architecture, factors: Mapping[str, tuple[float, ...]], names: set[str]
) -> dict[str, Any]:
    """Plain GGUF keys -> a Hugging Face config.

    factors: values of rotary factor tensors. names: the file's tensor names, which decide whether there
    are biases and a separate output. ModelError lists required keys that are missing.
    """
    prefix = f"{arch.gguf}."
    keys = {key.removeprefix(prefix): _shortest(v) for key, v in metadata.items() if key.startswith(prefix)}
    _check_tokenizer_types(metadata)
    if Keys.Tokenizer.LIST in metadata:
        keys.setdefault("vocab_size", len(metadata[Keys.Tokenizer.LIST]))
    config: dict[str, Any] = {"architectures": [arch.name], "model_type": arch.model_type}
    config |= {field: rule["is"] for field, rule in arch.fixed.items()}
    config |= {
        key.fields[0]: keys[key.name]
        for key in arch.keys
        if key.name in keys and (keys[key.name] or not key.optional)
    }
    check_values(arch, config)
    config = complete(config)
    missing = [key.name for key in arch.keys if not key.optional and config.get(key.fields[0]) is None]
    if missing:
        raise ModelError(
            f"GGUF keys {', '.join(prefix + name for name in missing)} are missing; the file is incomplete"
        )
    config["rope_parameters"] = rope_from_keys(keys, factors, config)
    if arch.gguf == "phi3":
        config["original_max_position_embeddings"] = original_context(config["rope_parameters"], config)
    config["tie_word_embeddings"] = "output.weight" not in names
    if arch.name == "LlamaForCausalLM":
        config["attention_bias"] = "blk.0.attn_output.bias" in names
        config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    if arch.gguf == "gemma3":
        config |= _gemma3_fields(keys, config)
    ids = {name: metadata.get(key) for name, key in _SPECIAL.items() if name in ("bos", "eos", "pad")}
    return config | {f"{name}_token_id": index for name, index in ids.items()}


def _check_tokenizer_types(metadata: Mapping[str, Any]) -> None:
    """ModelError that lists each key of the tokenizer with a wrong type."""
    lists: dict[str, type | tuple[type, ...]] = {
        Keys.Tokenizer.LIST: str,
        Keys.Tokenizer.MERGES: str,
        Keys.Tokenizer.TOKEN_TYPE: int,
        Keys.Tokenizer.SCORES: (int, float),
    }
    plain = dict.fromkeys(_SPECIAL.values(), int) | {Keys.Tokenizer.CHAT_TEMPLATE: str}
    faults = [f"GGUF key {key} has a value of the wrong type" for key, kind in plain.items()
              if key in metadata and not isinstance(metadata[key], kind)]  # fmt: skip
    for key, kinds in lists.items():
        value = metadata.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, kinds) for item in value):
            faults.append(f"GGUF key {key} has a value of the wrong type")
    raise_all(ModelError, "tokenizer", faults)


def side_files_from_keys(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Plain GGUF keys -> tokenizer.json, tokenizer_config.json and template, for a directory."""
    tokens = metadata[Keys.Tokenizer.LIST]
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in _SPECIAL.items():
        if 0 <= metadata.get(key, -1) < len(tokens):
            settings[f"{name}_token"] = tokens[metadata[key]]
    for name, key in (("add_bos_token", Keys.Tokenizer.ADD_BOS), ("add_eos_token", Keys.Tokenizer.ADD_EOS)):
        if key in metadata:
            settings[name] = metadata[key]
    files = {
        "tokenizer.json": json.dumps(tokenizer_json(metadata), ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode(),
    }
    named = [metadata[key] for key in _ENDS if 0 <= metadata.get(key, -1) < len(tokens)]
    ends = list(dict.fromkeys([*named, *(i for i, token in enumerate(tokens) if token in _KNOWN_ENDS)]))
    if len(ends) > 1:
        files[GENERATION] = json.dumps({"eos_token_id": ends}, indent=2).encode()
    if Keys.Tokenizer.CHAT_TEMPLATE in metadata:
        files["chat_template.jinja"] = metadata[Keys.Tokenizer.CHAT_TEMPLATE].encode()
    return files


def _gemma3_fields(keys: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    pattern = keys.get(_PATTERN, 6)
    if isinstance(pattern, int):
        pattern = (
            [(i + 1) % pattern != 0 for i in range(layers)]
            if keys.get("attention.sliding_window")
            else [False] * layers
        )
    implied = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else config["head_dim"]
    return {
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in pattern[:layers]],
        "query_pre_attn_scalar": implied,
    }


def _shortest(value: Any) -> Any:
    """An f32 read as f64 back to the shortest decimal that gives the same f32: 9.99999974e-06 -> 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
