"""Text through a transformers model: what its forward pass is given, and what comes out.

causal     input_ids                                            -> logits
seq2seq    input_ids for the encoder, decoder_input_ids         -> the decoder's logits
           noise for the output of an encoder that reads no text
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch

GENERATES = ("causal", "seq2seq")  # text, token by token; the second from tokens of an encoder besides


def reads_twice(model: Any, config: Any = None) -> bool:
    """Whether a model, or a class with its config, is an encoder and a decoder with inputs of their own."""
    known, config = signature(model.forward).parameters, config or model.config
    return bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in known


def reads_text(encoder: Any) -> bool:
    return "input_ids" in signature(encoder.forward).parameters


def with_head(head: str, cls: Any, config: Any) -> tuple[str, Any]:
    """What a class gives, by what it reads, and the class."""
    return ("seq2seq" if reads_twice(cls, config) else "causal") if head in GENERATES else head, cls


def without_cache(model: Any) -> dict[str, Any]:
    """The argument of a forward pass that keeps no keys and values, where the class has it."""
    return {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}


def stands_on(model: torch.nn.Module, device: torch.device) -> None:
    """Let a model without weights say that it is on a device: a forward pass may move tensors there."""
    for module in model.modules():
        if "device" in dir(type(module)):
            cls = type(module)
            module.__class__ = type(cls.__name__, (cls,), {"device": device, "__module__": cls.__module__})


def text_inputs(model: Any, ids: torch.Tensor, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Token ids `(b, t)` as the arguments of a model's forward pass; the encoder of an encoder-decoder gets
    them too. Noise (of `dtype`) stands for the output of one that reads no text."""
    if not reads_twice(model):
        return {"input_ids": ids}
    encoder: Any = model.get_encoder()
    if reads_text(encoder):
        return {"input_ids": ids, "decoder_input_ids": ids}
    shape = (*ids.shape, encoder.config.hidden_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(ids.device, dtype or model.dtype)
    return {"decoder_input_ids": ids, "encoder_outputs": (noise,)}


def moved(ids: torch.Tensor, model: Any) -> torch.Tensor:
    """Tokens on the device of a model."""
    return ids.to(getattr(model, "device", ids.device))


def text_logits(model: Any, ids: torch.Tensor, last: int) -> torch.Tensor:
    """Tokens `(b, t)` -> logits `(b, last, vocabulary)` of the last positions, on the model's device; of a
    model without a language model's head, its first output."""
    known = signature(model.forward).parameters
    open_ended = any(each.kind is each.VAR_KEYWORD for each in known.values())
    asked = {"use_cache": False, "logits_to_keep": last}
    more = {name: value for name, value in asked.items() if open_ended or name in known}
    out = model(**text_inputs(model, moved(ids, model)), **more)
    logits: torch.Tensor = out.logits if "logits" in out else out[0]
    return logits[:, -last:]


def next_logits(model: Any, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
    """Tokens `(b, t)` after those of a cache -> logits `(b, vocabulary)` after the last, and the cache.

    The cache is called `cache` from transformers 5.24 on, `past_key_values` before.
    """
    name = "cache" if "cache" in signature(getattr(model, "forward", model)).parameters else "past_key_values"
    out = model(input_ids=moved(ids, model), use_cache=True, logits_to_keep=1, **{name: cache})
    return out.logits[:, -1], getattr(out, name)
