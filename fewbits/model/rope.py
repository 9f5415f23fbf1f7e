"""Rotary position embedding: a normal form of its parameters, and its GGUF keys.

Position p rotates pair i by p * theta^(-2i/d) / f_i. The kinds differ in f and in a factor on cos, sin:

    default    f = 1
    linear     f = factor                                    GGUF: rope.scaling.type, .factor
    yarn       ramp between 1 and factor (arXiv:2309.00071)  GGUF: ... and original_context_length
    llama3     ramp by wavelength                            GGUF: tensor rope_freqs.weight = f
    longrope   f listed, one list below and one above the    GGUF: tensors rope_factors_short.weight and
               original context (arXiv:2402.13753)           _long.weight, rope.scaling.attn_factor

transformers 5 has `rope_parameters` (a dictionary, or one for each layer type); before, `rope_theta`
and `rope_scaling` (`type` or `rope_type`), and gemma3's `rope_local_base_freq`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ModelError
from ..lazy import torch

Rope = dict[str, Any]


def rope_parameters(config: Mapping[str, Any]) -> tuple[Rope, Rope | None]:
    """A config of any version -> (parameters of full attention, of sliding attention or None)."""
    given = config.get("rope_parameters") or {}
    full = dict(given.get("full_attention") or given)
    sliding = dict(given["sliding_attention"]) if given.get("sliding_attention") else None
    if not given:
        full = dict(config.get("rope_scaling") or {})
        if config.get("rope_local_base_freq") is not None:
            sliding = {"rope_type": "default", "rope_theta": float(config["rope_local_base_freq"])}
    full.setdefault("rope_theta", float(config.get("rope_theta") or 10000.0))
    kind = full.pop("type", None)
    full["rope_type"] = full.get("rope_type") or kind or "default"
    if full["rope_type"] == "su":
        full["rope_type"] = "longrope"
    if config.get("partial_rotary_factor") is not None:
        full.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if full["rope_type"] in ("yarn", "longrope", "llama3"):
        full["original_max_position_embeddings"] = original_context(full, config)
    return full, sliding


def original_context(rope: Rope, config: Mapping[str, Any]) -> int:
    """Tokens of context before scaling, as in transformers."""
    for place in (rope, config):
        if place.get("original_max_position_embeddings"):
            return int(place["original_max_position_embeddings"])
    return int(config["max_position_embeddings"])


def rotary_dim(config: Mapping[str, Any]) -> int:
    """Rotated dimensions of a head; `config` has head_dim."""
    rope, _ = rope_parameters(config)
    return int(config["head_dim"] * rope.get("partial_rotary_factor", 1.0))


def rope_keys(config: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, float | int | str]:
    """GGUF keys after `<arch>.`; floats are f32, integers u32. ModelError for a kind not `allowed`."""
    rope, sliding = rope_parameters(config)
    kind = _kind(rope, allowed)
    keys: dict[str, float | int | str] = {
        "rope.dimension_count": rotary_dim(config),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if sliding is not None:
        keys["rope.freq_base_swa"] = float(sliding["rope_theta"])
        _kind(sliding, ())
    if kind in ("linear", "yarn", "longrope") and not _is_plain_factors(rope):
        keys["rope.scaling.type"] = kind
    if kind in ("linear", "yarn"):
        keys["rope.scaling.factor"] = _factor(rope, config)
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        keys |= _yarn_keys(rope, _factor(rope, config))
    if kind == "longrope" and not _is_plain_factors(rope):
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        keys["rope.scaling.attn_factor"] = _longrope_attention(rope, config)
    return keys


def _kind(rope: Rope, allowed: Sequence[str]) -> str:
    kind = rope["rope_type"]
    if kind != "default" and kind not in allowed:
        raise ModelError(
            f"rotary scaling {kind!r}: llama.cpp applies {', '.join(['default', *allowed])} to this "
            "architecture, not this kind; the native directory supports it"
        )
    return str(kind)


def _factor(rope: Rope, config: Mapping[str, Any]) -> float:
    if rope.get("factor") is not None:
        return float(rope["factor"])
    return config["max_position_embeddings"] / original_context(rope, config)


def _yarn_keys(rope: Rope, factor: float) -> dict[str, float | int | str]:
    """llama.cpp uses the paper's betas and attention factor; another attention factor is stored relative to
    it."""
    wrong = [
        f"{name} = {rope[name]} (llama.cpp: {value})"
        for name, value in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True))
        if rope.get(name) not in (None, value)
    ]
    if wrong:
        raise ModelError(
            f"yarn rotary scaling with {', '.join(wrong)}: llama.cpp cannot; the native directory can"
        )

    def paper(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = paper(rope["mscale"]) / paper(rope["mscale_all_dim"])
    if attention is None or attention == paper():
        return {}
    return {"rope.scaling.attn_factor": attention / paper()}


def _longrope_attention(rope: Rope, config: Mapping[str, Any]) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor, original = _factor(rope, config), rope["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _is_plain_factors(rope: Rope) -> bool:
    """Whether longrope has one list of factors and nothing else, like `rope_freqs.weight`."""
    return (
        rope["rope_type"] == "longrope"
        and rope["long_factor"] == rope["short_factor"]
        and rope.get("attention_factor") == 1.0
    )


def rope_factors(config: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Tensors of factors in GGUF: `freqs`, or `long` and `short`; none for most models."""
    rope, _ = rope_parameters(config)
    kind = _kind(rope, allowed)
    if kind == "llama3":
        return {"freqs": llama3_factors(rope, rotary_dim(config))}
    if kind != "longrope":
        return {}
    lists = {"long": tuple(rope["long_factor"]), "short": tuple(rope["short_factor"])}
    wrong = [f"{name}_factor has {len(values)}" for name, values in lists.items()]
    if any(len(values) != rotary_dim(config) // 2 for values in lists.values()):
        raise ModelError(f"longrope: {', '.join(wrong)} entries, {rotary_dim(config) // 2} are needed")
    return {"freqs": lists["long"]} if _is_plain_factors(rope) else lists


def llama3_factors(rope: Mapping[str, Any], dim: int) -> tuple[float, ...]:
    """Divisors of the `dim / 2` frequencies: 1 for short waves, `factor` for long, a ramp between."""
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    waves = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # turns in the old context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((waves - low) / (high - low)).clamp(0, 1)
    return tuple((1 / ((1 - smooth) / rope["factor"] + smooth)).tolist())


def rope_from_keys(
    keys: Mapping[str, Any], factors: Mapping[str, tuple[float, ...]], config: Mapping[str, Any]
) -> Rope:
    """GGUF keys (after `<arch>.`) and factor tensors -> transformers 5 `rope_parameters`.

    config: has head_dim and max_position_embeddings. Exact for the output of `rope_keys`; a
    `rope_freqs.weight` other than Llama 3's own becomes a longrope with the same factors.
    """
    rope: Rope = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0))
    turned = keys.get("rope.dimension_count", config["head_dim"])
    if turned != config["head_dim"]:
        rope["partial_rotary_factor"] = turned / config["head_dim"]
    if kind in ("linear", "yarn") and factor not in (0.0, 1.0):
        rope |= {"rope_type": kind, "factor": factor}
    original = keys.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    scale = keys.get("rope.scaling.attn_factor", 1.0)
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = original
        if scale != 1.0:
            rope["attention_factor"] = scale * (0.1 * math.log(factor) + 1.0)
    if "freqs" in factors:
        rope |= _from_freqs(factors["freqs"], rope, turned, original)
    elif "long" in factors:
        rope |= {
            "rope_type": "longrope",
            "long_factor": list(factors["long"]),
            "short_factor": list(factors["short"]),
            "original_max_position_embeddings": original,
            "attention_factor": scale,
        }
    if "rope.freq_base_swa" in keys:
        local = {"rope_type": "default", "rope_theta": keys["rope.freq_base_swa"]}
        return {"full_attention": rope, "sliding_attention": local}
    return rope


def _from_freqs(freqs: tuple[float, ...], rope: Rope, dim: int, original: int) -> Rope:
    """Llama 3.1, 3.2 and 3.3 all have low 1, high 4, original context 8192, and differ in `factor`."""
    guess: Rope = {
        "rope_type": "llama3",
        "factor": max(freqs),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    ours = torch.tensor(llama3_factors(rope | guess, dim))
    if ours.shape == (len(freqs),) and torch.allclose(ours, torch.tensor(freqs), rtol=1e-5, atol=0):
        return guess
    return {
        "rope_type": "longrope",
        "long_factor": list(freqs),
        "short_factor": list(freqs),
        "original_max_position_embeddings": original,
        "attention_factor": 1.0,
    }
