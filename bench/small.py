"""A tiny random model of any language model class, from the fields of its config class."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

LAYERS = 4
_FIELDS: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*", 320),
    (r"num_(hidden_|decoder_|encoder_)?layers|n_layers?|(en|de)coder_layers|num_blocks", LAYERS),
    (r".*max_position.*|n_positions|n_ctx|seq_length|max_seq_len|max_.*_positions|context_length", 128),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|.*num_key_value_heads", 2),
    (r"linear_num_key_heads", 2),
    (r".*num_.*attention_heads|n_heads?|num_heads|.*attention_heads|linear_num_value_heads", 4),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r".*head_dim.*|mamba_d_head|mamba_headdim|attention_head_size|d_kv|.*head_size", 16),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|mamba_ngroups", 1),
    (r".*experts_per_tok.*|.*top_?k.*|num_selected_experts|moe_k", 2),
    (r"num_shared_experts|n_shared_experts|moe_num_shared_experts", 1),
    (r".*num_.*experts|n_routed_experts|num_local_experts|moe_num_experts", 4),
    (r"lru_width", 64),
    (r".*lora_rank|.*_rank|laurel_rank", 32),
    (r".*intermediate_size.*|.*ffn_dim|ffn_hidden.*|n_inner|d_inner|ffn_dim|.*ffn_size|dim_ff|dff|d_ff", 128),
    (r".*hidden_size|d_model|n_embd|dim|emb_dim|embed_dim|embedding_size|word_embed.*dim|.*ing_dim", 64),
    (r"state_size|ssm_state_size|mamba_d_state", 16),
    (r".*sliding_window|.*window_size|attention_window|.*chunk_size", 8),
)  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MLA = {"num_key_value_heads": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
         "glm_moe_dsa", "kimi_linear", "minicpm3", "sarvam_mla", "youtu"), _MLA,
    ),
    **dict.fromkeys(("dots3_note", "dots3_note_text"), _MLA),
    **{name: {"rotary_dim": 8} for name in ("codegen", "gptj")},
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 64, "ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    **{name: {"state_size": 8} for name in ("mamba", "falcon_mamba")},  # a small share, as in real ones
    "recurrent_gemma": {"num_attention_heads": 8},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {
        "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 64, "num_experts_per_tok": 2,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 16, "qk_head_dim": 32, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "attention_hidden_size": 128,
        "attention_head_dim": 32, "num_key_value_heads": 4, "n_mamba_heads": 2, "mamba_dt_rank": 16,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "attention_hidden_size": 128,
        "attention_head_dim": 32, "num_key_value_heads": 4, "mamba_headdim": 16, "kv_channels": 16,
        "num_query_groups": 4, "adapter_rank": 16,
    },
    "xlnet": {"d_head": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip
"""model type -> fields that the rules above get wrong"""


def ids_of() -> torch.Tensor:
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))


MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING",
    "embedding": "MODEL_MAPPING",
}
"""what a model gives -> transformers' table of classes, config -> class"""


def model_types(head: str) -> list[str]:
    """The model types of a table. Embeddings: those of encoders that read text."""
    import transformers

    kinds = list(dict.fromkeys(config.model_type for config in getattr(transformers, MAPPINGS[head])))
    if head == "embedding":
        causal, masked = set(model_types("causal")), set(model_types("masked"))
        kinds = [kind for kind in kinds if (kind in masked or kind not in causal) and _reads_text(kind)]
    return kinds


def _reads_text(kind: str) -> bool:
    from inspect import signature

    import transformers

    try:
        cls = transformers.MODEL_MAPPING[transformers.CONFIG_MAPPING[kind]]
        cls = cls[0] if isinstance(cls, tuple) else cls
        known = signature(cls.forward).parameters
    except (ImportError, ValueError):  # it needs packages that are not there, or names a class that is not
        return False
    return "input_ids" in known and not {"decoder_input_ids", "pixel_values"} & known.keys()


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of 320 words, which evaluating a model without a language model's head needs."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    words = [*special.values(), *(f"w{i}" for i in range(3, 320))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = special | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def small_model(model_type: str, head: str = "causal") -> Any:
    """A random model of a type, as `random_model` makes it."""
    import transformers

    known = transformers.CONFIG_MAPPING[model_type]
    fields = shrunk(known().to_dict()) | SPECIAL.get(model_type, {})
    config = known.from_dict(fields)
    cls = getattr(transformers, MAPPINGS[head])[type(config)]
    cls = cls[0] if isinstance(cls, tuple) else cls
    if not isinstance(config, cls.config_class):  # of a composed model, whose text model this is
        config = config.get_text_config()
    return random_model(cls, config)


def random_model(cls: Any, config: Any) -> Any:
    """A model in f32; what initializes to zeros or nothing is random too."""
    torch.manual_seed(0)
    model = cls(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
            elif not weight.isfinite().all() or weight.std() in (0, None) or weight.abs().max() > 20:
                weight.copy_(0.1 * torch.randn_like(weight))
    return model


def shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    """A config's fields -> the same, small; lists with an entry for each layer keep every kind of layer."""
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "per_layer_config" and value:
            small[name] = {i: entry for i, entry in value.items() if int(i) < LAYERS}
        elif isinstance(value, dict) and (name.endswith("config") or "model_type" in value):
            small[name] = shrunk(value)
        elif isinstance(value, bool) or not isinstance(value, int | list):
            small[name] = value
        elif isinstance(value, int):
            small[name] = min(value, _size(name, value))
        else:
            small[name] = value
    depth = next((fields[n] for n in fields if _size(n, -1) == LAYERS and isinstance(fields[n], int)), None)
    for name, value in fields.items():
        if isinstance(value, list) and depth and len(value) >= depth:
            small[name] = _layers(value, name)
    return small


def _size(name: str, value: int) -> int:
    if name.endswith("token_id"):
        return value if value < 320 else 2
    return next((size for pattern, size in _FIELDS if re.fullmatch(pattern, name)), value)


def _layers(value: list[Any], name: str) -> list[Any]:
    """LAYERS entries, each kind of entry among them."""
    kinds = list(dict.fromkeys(map(str, value)))
    kept = value[:LAYERS]
    for kind in kinds:
        if kind not in map(str, kept):
            repeated = [i for i in range(LAYERS) if list(map(str, kept)).count(str(kept[i])) > 1]
            if repeated:
                kept[repeated[-1]] = next(entry for entry in value if str(entry) == kind)
    return [min(v, _size(name, v)) if isinstance(v, int) and not isinstance(v, bool) else v for v in kept]
