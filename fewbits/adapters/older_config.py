"""A config as transformers 4 and the models' own code wrote it, from what transformers 5 makes of it.

llama.cpp's converter reads the fields that published checkpoints have. transformers 5 reads these too, and
saves others: rotary settings in one dictionary, the kind of each layer as a list of names. Some of the fields
say what transformers' class always does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ModelError
from ..files.checkpoint import Checkpoint
from .transformers import model_config

Fields = dict[str, Any]
_GONE = object()
PATTERN = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "moe": "E"}


def full_config(checkpoint: Checkpoint) -> Fields:
    """The config with all that its class derives: defaults, other names. As it is without a class."""
    try:
        return _filled(model_config(checkpoint), checkpoint.config)
    except ModelError:
        return dict(checkpoint.config)


def _filled(config: Any, given: Mapping[str, Any]) -> Fields:
    found: Fields = config.to_dict()
    found |= {name: getattr(config, name, None) for name in type(config).attribute_map}
    found |= {name: value for name, value in given.items() if value is not None}
    for name in config.sub_configs:
        if hasattr(part := getattr(config, name, None), "attribute_map"):
            found[name] = _filled(part, given.get(name) or {})
    return found


def with_old_names(config: Fields) -> Fields:
    """A full config with the older fields that follow from it; what it has already stays, unless the new
    fields decide."""
    found = {name: value for name, value in _common(config).items() if value is not None}
    found |= {name: value for name, value in config.items() if value is not None or name not in found}
    rules = _DECIDED.get(config.get("model_type", ""), {})
    found |= {name: find(found) for name, find in rules.items()}
    if isinstance(text := config.get("text_config"), dict):
        found["text_config"] = with_old_names(text)
    return {name: value for name, value in found.items() if value is not _GONE}


def _common(config: Fields) -> Fields:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention") or rope
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is None and config.get("rope_parameters"):
        partial = 1.0
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    return {
        "n_ctx": config.get("n_positions"),
        "rotary_pct": partial if partial is not None else 1.0,
        "rotary_emb_base": rope.get("rope_theta"),
        "rope_theta": rope.get("rope_theta"),
        "partial_rotary_factor": partial,
        "layernorm_epsilon": config.get("rms_norm_eps"),
        "head_dim": width // heads if heads and width else None,
        "first_k_dense_replace": _leading(config.get("mlp_layer_types"), "dense"),
    }


def _leading(kinds: list[str] | None, kind: str) -> int | None:
    """How many layers of a kind come before the first of another."""
    if not kinds:
        return None
    return next((i for i, each in enumerate(kinds) if each != kind), len(kinds))


def _always(value: Any) -> Callable[[Fields], Any]:
    return lambda config: value


def _old_layers(config: Fields) -> list[str]:
    old = {"full_attention": "attention", "linear_attention": "mamba"}
    return [old.get(kind, kind) for kind in config["layer_types"]]


def _pattern(config: Fields) -> str:
    return "".join(PATTERN.get(kind, "-") for kind in config["layers_block_type"])


def _rotated(config: Fields) -> int:
    return int(config["head_dim"] * config["rotary_pct"])


def _global_head(config: Fields) -> int | None:
    return None if config["per_layer_config"] else int(config["head_dim"])


def _mimo_rope(config: Fields) -> Fields:
    return {**config["rope_parameters"]["full_attention"], **config["rope_parameters"]}


def _falcon_heads(config: Fields) -> int:
    if config.get("new_decoder_architecture"):
        return int(config["num_kv_heads"])
    return 1 if config.get("multi_query") else int(config["num_attention_heads"])


def _same(name: str) -> Callable[[Fields], Any]:
    return lambda config: config[name]


_Rules = dict[str, Callable[[Fields], Any]]
_SIGMOID: _Rules = {"scoring_func": _always("sigmoid")}
_DECIDED: dict[str, _Rules] = {
    "afmoe": {"route_norm": _always(True)},
    "bamba": {"layer_types": _old_layers, "attn_rotary_emb": _rotated},
    "deepseek_v3": _SIGMOID,
    "deepseek_v32": _SIGMOID,
    "dots1": _SIGMOID,
    "exaone_moe": _SIGMOID,
    "falcon": {"num_kv_heads": _falcon_heads},
    "gemma4_text": {"global_head_dim": _global_head},
    "gemma4_unified_text": {"global_head_dim": _global_head, "moe_intermediate_size": _always(None)},
    "glm4_moe_lite": _SIGMOID,
    "glm_moe_dsa": _SIGMOID,
    "granitemoehybrid": {"layer_types": _old_layers},
    "mimo_v2_flash": _SIGMOID
    | {
        **{f"swa_{name}": _same(name) for name in ("head_dim", "v_head_dim", "num_attention_heads")},
        "swa_num_key_value_heads": lambda it: 2 * it["num_key_value_heads"],
        "topk_method": _always("noaux_tc"),
        "rope_parameters": _mimo_rope,
        "hybrid_layer_pattern": lambda it: [int(kind == "sliding_attention") for kind in it["layer_types"]],
    },
    "minimax_m2": _SIGMOID | {"rotary_dim": _rotated},
    "nemotron_h": {
        "hybrid_override_pattern": _pattern,
        "num_experts_per_tok": lambda it: it["num_experts_per_tok"] if "E" in _pattern(it) else _GONE,
    },
    "sarvam_mla": _SIGMOID,
    "solar_open": _SIGMOID,
}
"""model type -> fields that transformers 5 has under other names, or not at all, and how they follow"""
