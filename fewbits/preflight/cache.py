"""The KV cache of a model, from its config: the memory of each token of the context.

    numbers per token, layer  = 2 x key-value heads x head size           grouped heads share keys and values
                              = kv_lora_rank + qk_rope_head_dim            latent attention (DeepSeek)
    tokens kept by a layer    = the context, or a sliding window if that is less

Layers without attention (linear attention, state spaces) have a state of fixed size, which is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..activations.kv_cache import CACHES
from ..errors import ModelError
from ..files.checkpoint import Checkpoint
from ..formats import FORMATS

KINDS = ("f16", "fp8", "q8_0", "q4_0", "int8", "int4")
_SPELLINGS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
}
_GGUF = {
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "hidden_size": "embedding_length",
    "head_dim": "attention.key_length",
    "v_head_dim": "attention.value_length",
    "sliding_window": "attention.sliding_window",
    "vocab_size": "vocab_size",
    "intermediate_size": "feed_forward_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}


@dataclass(frozen=True)
class Layer:
    """numbers: stored for each token. window: largest number of stored tokens; None: the whole context."""

    numbers: int
    window: int | None = None


@dataclass(frozen=True)
class KVCache:
    """layers: those with keys and values. head: size of a head, which decides the bits of codes in groups.
    notes: what is not counted."""

    layers: tuple[Layer, ...]
    head: int
    notes: tuple[str, ...] = ()

    def bits(self, kind: str) -> float:
        """Bits of one stored number, scales included."""
        if kind == "f16":
            return 16.0
        if kind in CACHES:
            return CACHES.get(kind).bits_per_number(self.head)
        return float(FORMATS.get(kind).bits_per_weight())

    def per_token(self, kind: str) -> int:
        """Bytes of one more token while no window is full."""
        return round(sum(layer.numbers for layer in self.layers) * self.bits(kind) / 8)

    def nbytes(self, kind: str, context: int, batch: int = 1) -> int:
        """Bytes of `batch` sequences of `context` tokens."""
        kept = sum(
            layer.numbers * (context if layer.window is None else min(context, layer.window))
            for layer in self.layers
        )
        return round(batch * kept * self.bits(kind) / 8)


def fields_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of the text model; for a GGUF file of unknown architecture, its keys with the config's
    names."""
    if checkpoint.config or not checkpoint.gguf_keys:
        return dict(checkpoint.text_config)
    keys = {name: value.value for name, value in checkpoint.gguf_keys.items()}
    arch = keys.get("general.architecture")
    return {field: keys[f"{arch}.{key}"] for field, key in _GGUF.items() if f"{arch}.{key}" in keys}


def kv_cache(config: Mapping[str, Any], windows: bool = True) -> KVCache:
    """From a config's fields. windows: whether the engine uses sliding windows. ModelError for a config
    without the number of layers and heads."""
    fields = {name: _first(config, names) for name, names in _SPELLINGS.items()}
    count, heads = fields["layers"], fields["heads"]
    heads = max(heads) if isinstance(heads, list) else heads
    head = config.get("head_dim") or (fields["hidden"] // heads if fields["hidden"] and heads else None)
    if not count or not heads or not head:
        raise ModelError(
            "the config lacks the number of layers, heads or the head size, so the KV cache is unknown"
        )
    kv = fields["kv_heads"] or (1 if config.get("multi_query") else heads)
    kv_heads = list(kv) if isinstance(kv, list) else [kv] * count
    if config.get("kv_lora_rank"):
        numbers = [config["kv_lora_rank"] + (config.get("qk_rope_head_dim") or 0)] * count
    else:
        numbers = [n * (head + (config.get("v_head_dim") or head)) for n in kv_heads]
    kinds = _kinds(config, count) if windows else ["full"] * count
    size = config.get("sliding_window") or config.get("attention_chunk_size")
    own = count - (config.get("num_kv_shared_layers") or 0)
    layers = [
        Layer(int(n), int(size) if kind == "window" and size else None)
        for n, kind in list(zip(numbers, kinds, strict=True))[:own]
        if kind != "state" and n
    ]
    left = kinds.count("state")
    notes = (f"{left} of {count} layers keep a state of fixed size, not counted",) if left else ()
    return KVCache(tuple(layers), int(head), notes)


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name)), None)


def _kinds(config: Mapping[str, Any], count: int) -> list[str]:
    """ "full", "window" or "state" of each layer."""
    layer_types = config.get("layer_types")
    if layer_types:
        words = {"sliding": "window", "chunked": "window", "full": "full", "attention": "full"}
        return [words.get(str(kind).split("_")[0], "state") for kind in layer_types]
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return ["full"] * count
    pattern, first = config.get("sliding_window_pattern"), 0
    if config.get("use_sliding_window"):
        first = config.get("max_window_layers") or 0
    return [
        "full" if i < first or (isinstance(pattern, int) and not (i + 1) % pattern) else "window"
        for i in range(count)
    ]
