"""Checks config.json and the tensors of a decoder of the llama family for its ONNX graph.

    config.json   -> Decoder: sizes, rotary frequencies, windows; or all that the graph cannot express
    the tensors   -> each with its shape; or all that are missing, misshapen or unknown
    both          -> genai_config.json for onnxruntime-genai: names of the graph's inputs and outputs, tokens
                     that end a text, its greatest length

Both checks run before the first byte is written: a graph that lacks a property of the model would run, but
generate other tokens.
Source of the keys: onnxruntime.ai/docs/genai/reference/config; the required ones were tried with 0.18.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import PlanError, raise_all
from ...formats.base import Format
from ...lazy import torch
from ...model.rope import llama3_factors, rope_parameters
from ..directory import Stored

MODELS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
"""model_type -> the context, in tokens, that transformers takes where config.json names none"""
TABLE = "model.embed_tokens.weight"
INPUTS = ("input_ids", "attention_mask", "position_ids")
PER_BLOCK = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Decoder:
    """The values of config.json for the graph. frequencies: of the head_dim / 2 pairs, radians a token.
    windows: of each block, tokens; None: all. context: tokens that a text may have."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    frequencies: tuple[float, ...]
    windows: tuple[int | None, ...]
    tied: bool
    context: int


def decoder_of(config: Mapping[str, Any]) -> Decoder:
    """config.json -> Decoder; PlanError lists all that this graph cannot express."""
    kind, faults = config.get("model_type"), []
    if kind not in MODELS:
        raise PlanError(
            f"an onnx file holds decoders of {', '.join(MODELS)}, not {str(kind)[:40]!r}; the nearest file "
            "types are gguf, gptq and native"
        )
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    sizes = {key: config.get(key) for key in needed}
    sizes["num_key_value_heads"] = config.get("num_key_value_heads") or sizes["num_attention_heads"]
    wrong = [f"{key} is {str(value)[:20]}" for key, value in sizes.items() if not _is_count(value)]
    raise_all(PlanError, "config.json for an onnx file", wrong)
    hidden, heads, blocks, kv_heads = (int(str(value)) for value in sizes.values())
    head_dim = config.get("head_dim") or hidden // heads
    if not _is_count(head_dim) or head_dim % 2 or heads % kv_heads:
        faults.append(
            f"{heads} heads of {str(head_dim)[:20]} with {kv_heads} keys and values are no attention"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        faults.append(f"hidden_act is {str(config['hidden_act'])[:20]!r}; the graph has silu")
    eps = config.get("rms_norm_eps", 1e-6)
    if type(eps) not in (int, float):
        faults.append(f"rms_norm_eps is {str(eps)[:20]!r}")
    context = config.get("max_position_embeddings", MODELS[kind])
    if not _is_token(context) or context == 0:
        faults.append(f"max_position_embeddings is {str(context)[:20]!r}")
    rope, _ = rope_parameters(config)
    frequencies = () if faults else _frequencies(rope, int(head_dim), faults)
    windows = _windows(config, blocks, faults)
    raise_all(PlanError, "this model as an onnx file; use gguf or native", faults)
    tied = bool(config.get("tie_word_embeddings", False))
    return Decoder(hidden, heads, kv_heads, int(head_dim), float(eps), frequencies, windows, tied, context)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**20


def _frequencies(rope: Mapping[str, Any], dim: int, faults: list[str]) -> tuple[float, ...]:
    """Radians a token, computed in f32 like transformers."""
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        faults.append("rotary embedding of a part of each head; the graph turns all of it")
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if kind == "llama3":
        plain = plain / torch.tensor(llama3_factors(rope, dim))
    elif kind == "linear":
        plain = plain / float(rope["factor"])
    elif kind != "default":
        faults.append(f"rotary scaling {str(kind)[:20]!r}; the graph has default, linear and llama3")
    return tuple(plain.tolist())


def _windows(config: Mapping[str, Any], blocks: int, faults: list[str]) -> tuple[int | None, ...]:
    """mistral has its window in every block; qwen2 and qwen3 according to layer_types."""
    window, types = config.get("sliding_window"), config.get("layer_types")
    if config["model_type"] == "llama" or window is None:
        return (None,) * blocks
    if not _is_count(window):
        faults.append(f"sliding_window is {str(window)[:20]!r}")
    if config["model_type"] == "mistral" and types is None:
        return (window,) * blocks
    if isinstance(types, list) and len(types) == blocks:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    if types is not None or config.get("use_sliding_window"):
        faults.append(f"sliding windows without layer_types for each of the {blocks} blocks")
    return (None,) * blocks


def check_rows(decoder: Decoder, rows: Mapping[str, Stored]) -> None:
    """PlanError with every tensor that is missing, misshapen or unknown."""
    needed, optional = _shapes(decoder, rows)
    faults = [f"tensor {name!r} is missing" for name in needed if name not in rows]
    known = needed | optional
    for name, (kind, shape) in rows.items():
        if not isinstance(kind, Format) and not kind.weight:
            faults.append(f"tensor {name!r} is {kind.name}; the graph has f32, f16 and bf16")
        if name in known and shape != known[name]:
            faults.append(f"tensor {name!r} is {shape}, the config says {known[name]}")
        unused = name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and decoder.tied)
        if name not in known and not unused:
            faults.append(f"tensor {name!r} has no place in a decoder of the llama family")
    raise_all(PlanError, "this model as an onnx file", faults)


def _shapes(
    d: Decoder, rows: Mapping[str, Stored]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Required and optional tensors, with their shapes."""
    vocabulary = rows[TABLE][1][0] if TABLE in rows else 0
    needed: dict[str, tuple[int, ...]] = {TABLE: (vocabulary, d.hidden)}
    needed["model.norm.weight"] = (d.hidden,)
    if not d.tied:
        needed["lm_head.weight"] = (vocabulary, d.hidden)
    optional: dict[str, tuple[int, ...]] = {}
    for i in range(len(d.windows)):
        block = f"model.layers.{i}"
        width, q, kv = d.hidden, d.heads * d.head_dim, d.kv_heads * d.head_dim
        inner = rows[up][1][0] if (up := f"{block}.mlp.up_proj.weight") in rows else 0
        shapes = [(q, width), (kv, width), (kv, width), (width, q)]
        shapes += [(inner, width), (inner, width), (width, inner)]
        for part, shape in zip(PER_BLOCK, shapes, strict=True):
            module = f"{block}.{'self_attn' if len(part) == 1 else 'mlp'}.{part}_proj"
            needed[f"{module}.weight"], optional[f"{module}.bias"] = shape, shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            needed[f"{block}.{norm}.weight"] = (width,)
        optional |= {f"{block}.self_attn.{part}_norm.weight": (d.head_dim,) for part in "qk"}
    return needed, optional


def past(i: int | str) -> tuple[str, str]:
    """The inputs with the keys and values of block i; "%d" stands for every block."""
    return f"past_key_values.{i}.key", f"past_key_values.{i}.value"


def present(i: int | str) -> tuple[str, str]:
    """The outputs with them."""
    return f"present.{i}.key", f"present.{i}.value"


def genai_config(config: Mapping[str, Any], rows: Mapping[str, Stored], graph: str) -> dict[str, Any]:
    """genai_config.json for the model in the file `graph`: greedy, unless a generator is told otherwise.

    A buffer that past and present share is for an attention that writes into it; ours appends.
    """
    d = decoder_of(config)
    inputs = dict(zip(("past_key_names", "past_value_names"), past("%d"), strict=True))
    outputs = dict(zip(("present_key_names", "present_value_names"), present("%d"), strict=True))
    decoder = {
        "filename": graph,
        "session_options": {"provider_options": []},
        "hidden_size": d.hidden,
        "head_size": d.head_dim,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "num_hidden_layers": len(d.windows),
        "inputs": {name: name for name in INPUTS} | inputs,
        "outputs": {"logits": "logits"} | outputs,
    }
    model = {"type": config["model_type"], "context_length": d.context, "vocab_size": rows[TABLE][1][0]}
    return {
        "model": {**model, **_special_tokens(config), "decoder": decoder},
        "search": {"do_sample": False, "past_present_share_buffer": False},
    }


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of config.json (null and -1 are none); the padding token defaults to an end token."""
    ends = config.get("eos_token_id")
    ends = [token for token in (ends if isinstance(ends, list) else [ends]) if _is_token(token)]
    tokens = {key: config[key] for key in ("bos_token_id", "pad_token_id") if _is_token(config.get(key))}
    if not ends:
        return tokens
    return {"eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": ends[0], **tokens}


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31
