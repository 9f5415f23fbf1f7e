"""A quantized KV cache, simulated exactly: every token reads the same values as in a decoder.

A cached key or value (b, heads, t, d) is cut into groups. Each group stores a scale and an offset (its
smallest value), both f16, and codes of few bits:

    value = code * scale + offset        code = round((x - offset) / scale),  0 ... 2^bits - 1

    per token       a group is up to `group` channels of one token:      | c c c c |
    per channel     a group is one channel of `group` tokens in a row:   | c |
                                                                         | c |
    name   keys                    values                  newest tokens in float   bits a number (d = 64)
    int8   per token, 128          per token, 128          0                        8.5
    int4   per token, 32           per token, 32           0                        5
    int2   per channel, 32 tokens  per token, 32           128                      3
    fp8    the whole tensor        the whole tensor        0                        8

int2 is KIVI (arXiv 2402.02750). A few channels of the keys are large in every token, so each channel has
its own scale. A group of keys is quantized once its last token is there. The newest tokens are read the most
and stay in float.

fp8 is the scheme of vLLM: e4m3 with one scale for all keys of a block and one for all values. Both are
fixed before the model runs (`ranges`): value = e4m3(x / scale) * scale, scale = largest |x| / 448.

With n tokens in the cache (including its own), a query reads tokens 0 ... n - residual - 1 quantized, keys
only in complete groups, and the rest in float. This depends on the query, so scores are computed from both
versions of the keys and each query selects its own. A whole window through `attention` therefore equals its
tokens one by one. (A real engine computes a prompt in float and then stores it; its prompt is better, its
continuation the same.) Tokens are counted from the first in a layer's cache: after a sliding window has
dropped some, groups of keys start at the oldest remaining one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from math import gcd
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..adapters.forward import text_logits
from ..blocks.simulate import changed_attention
from ..errors import CalibrationError, ModelError, PlanError
from ..registry import Registry

QUERIES_AT_ONCE = 256  # limits the scores in memory: heads x 256 x tokens
LARGEST = torch.finfo(torch.float8_e4m3fn).max
Steps = tuple[float, float]  # of keys, of values


@dataclass(frozen=True)
class Cache:
    """How keys and values are stored. group: numbers that share a scale. residual: newest tokens in float.
    fixed: e4m3 with a scale that is fixed before the model runs."""

    name: str
    bits: int
    group: int
    keys_per_channel: bool = False
    residual: int = 0
    fixed: bool = False

    def bits_per_number(self, d: int) -> float:
        """Bits per number of codes, scale and offset for head size `d`: the mean of keys and values."""
        if self.fixed:
            return self.bits
        per_token = self.bits + 32 / gcd(self.group, d)
        return (self.bits + 32 / self.group + per_token) / 2 if self.keys_per_channel else per_token

    def quantized(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens in the cache, int64 -> how many of their keys and values are read quantized."""
        old = (tokens - self.residual).clamp(min=0)
        return old - old % self.group if self.keys_per_channel else old, old


CACHES: Registry[Cache] = Registry("cache scheme", PlanError)
for _cache in (
    Cache("int8", 8, 128),
    Cache("int4", 4, 32),
    Cache("int2", 2, 32, keys_per_channel=True, residual=128),
    Cache("fp8", 8, 0, fixed=True),
):
    CACHES.add(_cache.name, _cache)


def quantize_dequantize(x: torch.Tensor, bits: int) -> torch.Tensor:
    """`(..., group)` float -> the same values rounded to what the codes of each group hold."""
    offset, high = torch.aminmax(x.float(), dim=-1, keepdim=True)
    offset = offset.half().float()
    scale = ((high - offset) / (2**bits - 1)).half().float()
    if not bool((offset.isfinite() & scale.isfinite()).all()):
        raise ModelError(
            "a key or value is not finite, or the offset or scale of its group exceeds 65504, the largest "
            "f16 number; evaluate this model with its cache in float"
        )
    scale = torch.where(scale == 0, 1.0, scale)
    codes = ((x.float() - offset) / scale).round().clamp(0, 2**bits - 1)
    return (codes * scale + offset).to(x.dtype)


def per_token(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """`(..., t, d)`: groups of gcd(group, d) channels of one token."""
    return quantize_dequantize(x.unflatten(-1, (-1, gcd(group, x.shape[-1]))), bits).flatten(-2)


def per_channel(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """`(..., t, d)`: groups of `group` tokens of one channel; the incomplete last group stays in float."""
    t = x.shape[-2] - x.shape[-2] % group
    if not t:
        return x
    groups = x[..., :t, :].unflatten(-2, (-1, group)).transpose(-1, -2)
    stored = quantize_dequantize(groups, bits).transpose(-1, -2).flatten(-3, -2)
    return torch.cat([stored, x[..., t:, :]], -2)


def attention(cache: Cache, scales: Sequence[Steps] = ()) -> Callable[..., torch.Tensor]:
    """-> a function with the arguments of torch's scaled_dot_product_attention that uses such a cache.

    scales: one pair for each attention, in the order in which they run; for a `fixed` cache only.
    """
    if not cache.fixed:
        return partial(_attend, cache)
    if not scales:
        raise CalibrationError(
            f"{cache.name} needs a fixed scale for each block, measured on a text; give calibration "
            "text, or use int8, which needs none"
        )
    turn = cycle(scales)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **given: Any) -> Any:
        of_keys, of_values = next(turn)
        key, value = to_e4m3(key, of_keys), to_e4m3(value, of_values)
        return scaled_dot_product_attention(query, key, value, *rest, **given)

    return attend


def to_e4m3(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Any float tensor -> the same values rounded to e4m3 * scale, clipped at 448 * scale."""
    codes = (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


def ranges(model: Any, windows: torch.Tensor) -> dict[str, Steps]:
    """Windows `(w, t)` int64 -> attention module -> the scales of its keys and values, in running order.

    Raises ModelError if the model does not use torch's attention, or its attention modules are not found.
    """
    largest: list[list[float]] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **given: Any) -> Any:
        largest.append([float(x.abs().max()) for x in (key, value)])
        return scaled_dot_product_attention(query, key, value, *rest, **given)

    with changed_attention(model, attend), torch.inference_mode():
        for window in windows:
            text_logits(model, window[None], 1)
    names = [name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(".k_proj")]
    if not names or len(largest) != len(names) * len(windows):
        raise ModelError(
            f"{type(model).__name__}: {len(largest)} attentions ran over {len(windows)} windows in "
            f"{len(names)} modules with a k_proj, so they cannot be matched; leave the cache in float"
        )
    peaks = torch.tensor(largest, dtype=torch.float64).reshape(len(windows), len(names), 2).amax(0)
    if not bool(peaks.isfinite().all()):
        raise ModelError("a key or value is not finite; the weights are damaged")
    scales = (peaks / LARGEST).float()
    pairs = torch.where(scales > 0, scales, 1.0).tolist()
    return {name: (k, v) for name, (k, v) in zip(names, pairs, strict=True)}


def _attend(
    cache: Cache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    **options: Any,
) -> torch.Tensor:
    stored_values = per_token(value, cache.bits, cache.group)
    keys = per_channel if cache.keys_per_channel else per_token
    stored_keys = keys(key, cache.bits, cache.group)
    if not cache.residual and not cache.keys_per_channel:  # every query reads the same
        return scaled_dot_product_attention(
            query, stored_keys, stored_values, attn_mask, dropout_p, **options
        )
    repeats = query.shape[-3] // key.shape[-3]
    both = [x.repeat_interleave(repeats, -3) for x in (key, stored_keys, value, stored_values)]
    rows = torch.arange(query.shape[-2], device=query.device)
    mask = _bias(attn_mask, options.get("is_causal", False), rows, key.shape[-2], query)
    scale = options.get("scale")
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    present = rows + 1 + key.shape[-2] - query.shape[-2]  # tokens in the cache of each query
    parts = [
        _read(cache, query[..., part, :], both, mask[..., part, :], present[part])
        for part in (slice(i, i + QUERIES_AT_ONCE) for i in range(0, len(rows), QUERIES_AT_ONCE))
    ]
    return torch.cat(parts, -2)


def _read(
    cache: Cache,
    query: torch.Tensor,
    both: list[torch.Tensor],
    bias: torch.Tensor,
    present: torch.Tensor,
) -> torch.Tensor:
    """Some queries, scaled, against keys and values in float and quantized."""
    key, stored_key, value, stored_value = both
    index = torch.arange(key.shape[-2], device=key.device)
    old_keys, old_values = (index < edge[:, None] for edge in cache.quantized(present))
    scores = torch.where(old_keys, query @ stored_key.mT, query @ key.mT) + bias
    weights = scores.float().softmax(-1).to(value.dtype)
    return (weights * old_values) @ stored_value + (weights * ~old_values) @ value


def _bias(
    mask: torch.Tensor | None, causal: bool, rows: torch.Tensor, tokens: int, query: torch.Tensor
) -> torch.Tensor:
    """The mask as a term of the scores: `(..., queries, tokens)` in the query's type."""
    if causal:
        mask = torch.arange(tokens, device=rows.device) <= rows[:, None]
    if mask is None:
        return query.new_zeros(len(rows), tokens)
    if mask.dtype == torch.bool:
        return query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)
    return mask
