"""Many rows, one token of each a step: what a step costs besides the weights is kept small.

    transformers' cache         joined anew at each step: every key and value is read and written again
    PagedLayer                  room for PAGE more tokens than there are; a step writes only its own
        keys  |t t t t t t . .|     the masked rest is contiguous with the tokens: a batched product of
                                    contiguous arrays takes a third of the time of one of cut ones

One query a row meets each head of keys: the query heads that share it are multiplied together. On a CPU
bf16 weights are reordered once for oneDNN instead of at each product.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from ..adapters.forward import next_logits

PAGE = 16  # tokens
GROUPED = "fewbits_grouped"  # the name under which transformers knows our attention
PAYS = 1.2  # times that bf16 must multiply faster than f32 to be taken


@cache
def faster_dtype(rows: int = 256, n: int = 1024, k: int = 1024) -> torch.dtype:
    """f32, or bf16 where this CPU multiplies it clearly faster: measured once."""
    seconds: dict[torch.dtype, float] = {}
    for _ in range(5):
        for dtype in (torch.float32, torch.bfloat16):
            x, w = torch.ones(rows, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
            start = time.perf_counter()
            F.linear(x, w)
            seconds[dtype] = min(seconds.get(dtype, 1e9), time.perf_counter() - start)
    return torch.bfloat16 if seconds[torch.float32] > PAYS * seconds[torch.bfloat16] else torch.float32


class Decoder:
    """A transformers model that goes on from row to row: tokens `(b, t)` -> logits `(b, vocabulary)`."""

    def __init__(self, model: Any, length: int) -> None:
        """length: tokens of a row, at most. The model is changed: attention and linear maps are made fast."""
        self.model, self.length, self.cache = model, length, None
        self.device = torch.device(getattr(model, "device", "cpu"))
        self.fast = getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa"
        if self.fast:
            _use_grouped_attention(model)
            if self.device.type == "cpu":
                _reorder_weights(model)

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        first = self.cache is None
        logits, self.cache = next_logits(self.model, ids, self.cache)
        if first and self.fast:
            _page(self.cache, self.length)
        return logits

    def restart(self) -> None:
        """New rows begin."""
        self.cache = None


def _page(cache: Any, length: int) -> None:
    """Give every layer of a cache room for more, if all are of the plain kind. A sliding window that is never
    left is plain. (Masks are the whole cache's, so one layer of another kind keeps all as they are.)"""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", [])
    plain = [
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > length)
        for layer in layers
    ]
    if layers and all(plain) and all(layer.is_initialized for layer in layers):
        cache.layers = [_paged_layer()(layer) for layer in layers]


@cache
def _paged_layer() -> Any:
    from transformers.cache_utils import DynamicLayer

    class PagedLayer(DynamicLayer):
        """A cache layer whose arrays are longer than what they hold; transformers masks the rest."""

        is_compileable = True  # so it says that masks are needed even for a single query

        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.lazy_initialization(layer.keys, layer.values)
            self.keys, self.values, self.count = layer.keys, layer.values, layer.keys.shape[-2]

        def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
            end = self.count + keys.shape[-2]
            if end > self.keys.shape[-2]:
                self.keys, self.values = _longer(self.keys, end), _longer(self.values, end)
            self.keys[:, :, self.count : end] = keys
            self.values[:, :, self.count : end] = values
            self.count = end
            return self.keys, self.values

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            end = self.count + query_length
            return max(self.keys.shape[-2], _paged(end) if end > self.keys.shape[-2] else 0), 0

        def get_seq_length(self) -> int:
            return self.count

    return PagedLayer


def _paged(end: int) -> int:
    return -(-end // PAGE) * PAGE


def _longer(cached: torch.Tensor, end: int) -> torch.Tensor:
    b, g, n, d = cached.shape
    longer = cached.new_empty(b, g, _paged(end), d)
    longer[:, :, :n] = cached
    longer[:, :, n:] = 0  # what is masked must be finite
    return longer


def _use_grouped_attention(model: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)
    model.set_attn_implementation(GROUPED)


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """query `(b, h, t, d)`, key and value `(b, g, n, d)` -> `(b, t, h, d)`, as transformers' "sdpa" does.

    More than one query, or what a plain product does not cover, goes to "sdpa" itself.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    b, h, t, d = query.shape
    boolean = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    if t > 1 or not boolean or settings.get("position_bias") is not None or settings.get("softcap"):
        return cast(
            tuple[torch.Tensor, None],
            sdpa_attention_forward(module, query, key, value, attention_mask, **settings),
        )
    g, n = key.shape[1], key.shape[2]
    scaling = settings.get("scaling")
    q = query.reshape(b * g, h // g, d) * (d**-0.5 if scaling is None else scaling)
    scores = torch.bmm(q, key.reshape(b * g, n, d).transpose(1, 2))
    if attention_mask is not None:
        scores = scores.view(b, g, h // g, n).masked_fill_(~attention_mask, float("-inf")).view(scores.shape)
    out = torch.bmm(scores.softmax(-1), value.reshape(b * g, n, -1))
    return out.reshape(b, 1, h, -1), None


def _reorder_weights(model: nn.Module) -> None:
    """Plain linear maps in bf16 on the CPU -> the same with weights as oneDNN wants them."""
    mkldnn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # No list of the linear maps themselves: each is freed when its copy is there.
    parents = [module for module in model.modules() if type(module) is not nn.Linear]
    for parent in parents if mkldnn else []:
        for name, child in list(parent.named_children()):
            weight = child._parameters.get("weight")
            if type(child) is nn.Linear and weight is not None and weight.dtype == torch.bfloat16:
                setattr(parent, name, Reordered(child))


class Reordered(nn.Module):
    """nn.Linear whose bf16 weight lies in oneDNN's own order."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data)
        self.bias = None if linear.bias is None else linear.bias.data
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(
            torch.Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        )
