"""What the modules of a transformers model say of its weights: their stack and block, tables, heads, towers.

    LlavaForConditionalGeneration
      model.vision_tower.*, model.multi_modal_projector.*    tower: no text goes through it
      model.language_model.embed_tokens                      embed: nn.Embedding that reads the token ids
      model.language_model.layers.3.self_attn.q_proj         block 3; the name says which part of it
      lm_head                                                output

An encoder-decoder has two stacks; the blocks of the second are numbered after those of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from ..errors import ModelError
from ..model.sites import TOWER, Seen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATES = ("causal", "seq2seq")  # text, token by token; the second from tokens of an encoder besides


class Stack(NamedTuple):
    """root: path of the module that token ids go through. path: of its list of blocks."""

    root: str
    path: str
    blocks: torch.nn.ModuleList


class Views(TorchFunctionMode):
    """Keeps views: nothing is copied only to lie in one piece."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if function is torch.Tensor.contiguous else function(*args, **(kwargs or {}))


def reads_twice(model: Any, config: Any = None) -> bool:
    """Whether a model, or a class with its config, is an encoder and a decoder with inputs of their own."""
    known, config = signature(model.forward).parameters, config or model.config
    return bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in known


def with_head(head: str, cls: Any, config: Any) -> tuple[str, Any]:
    """What a class gives, by what it reads, and the class."""
    return ("seq2seq" if reads_twice(cls, config) else "causal") if head in GENERATES else head, cls


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


def text_logits(model: Any, ids: torch.Tensor, last: int) -> torch.Tensor:
    """Tokens `(b, t)` -> logits `(b, last, vocabulary)` of the last positions; of a model without a language
    model's head, its first output."""
    known = signature(model.forward).parameters
    open_ended = any(each.kind is each.VAR_KEYWORD for each in known.values())
    asked = {"use_cache": False, "logits_to_keep": last}
    more = {name: value for name, value in asked.items() if open_ended or name in known}
    out = model(**text_inputs(model, ids), **more)
    logits: torch.Tensor = out.logits if "logits" in out else out[0]
    return logits[:, -last:]


def next_logits(model: Any, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
    """Tokens `(b, t)` after those of a cache -> logits `(b, vocabulary)` after the last, and the cache.

    The cache is called `cache` from transformers 5.24 on, `past_key_values` before.
    """
    name = "cache" if "cache" in signature(getattr(model, "forward", model)).parameters else "past_key_values"
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
    return out.logits[:, -1], getattr(out, name)


def reads_text(encoder: Any) -> bool:
    return "input_ids" in signature(encoder.forward).parameters


def stacks_of(model: PreTrainedModel) -> list[Stack]:
    """The lists of blocks that token ids go through: the decoder's, and before it an encoder's if it reads
    any. ModelError where they cannot be told."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not reads_twice(model):
        return [_blocks_in(model, found if hasattr(found, "config") else model.base_model)]
    while found is not None and (inner := _inner_decoder(found)) is not None:
        found = inner
    encoder: Any = model.get_encoder()
    stacks = [_blocks_in(model, encoder)] if reads_text(encoder) else []
    return [*stacks, _blocks_in(model, found or model.base_model)]


def _inner_decoder(module: Any) -> Any:
    """The decoder of a module that is an encoder-decoder itself."""
    inner = getattr(module, "decoder", None)
    return inner if hasattr(module, "encoder") and hasattr(inner, "forward") else None


def _blocks_in(model: PreTrainedModel, stack: Any) -> Stack:
    """The outermost list of modules with matrices: one entry for each layer of its config."""
    prefix = next(name for name, module in model.named_modules() if module is stack)
    lists: dict[str, torch.nn.ModuleList] = {}
    for name, module in stack.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, torch.nn.ModuleList) and not nested and _has_matrices(module):
            lists[name] = module
    config = getattr(stack, "config", model.config)
    depth = getattr(config, "num_hidden_layers", None)
    if depth is None and hasattr(config, "get_text_config"):
        depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    candidates = [name for name in lists if len(lists) == 1 or len(lists[name]) == depth]
    top = min((name.count(".") for name in candidates), default=0)
    candidates = [name for name in candidates if name.count(".") == top]
    if len(candidates) == 1:
        name = candidates[0]
        return Stack(prefix, f"{prefix}.{name}" if prefix else name, lists[name])
    shown = ", ".join(f"{name} ({len(modules)})" for name, modules in list(lists.items())[:5]) or "none"
    raise ModelError(
        f"block order cannot be found: looked in {type(stack).__name__} for one list of {depth} blocks; it "
        f"has the lists {shown}"
    )


def _has_matrices(modules: torch.nn.ModuleList) -> bool:
    return any(parameter.ndim > 1 for module in modules for parameter in module.parameters())


def seen_in(model: PreTrainedModel, made_of: Mapping[str, Mapping[str, Any]]) -> dict[str, Seen]:
    """What each tensor is. made_of: key of the model -> the tensors in it, as `tensors_in` has them."""
    modules, stacks = dict(model.named_modules()), stacks_of(model)
    paths = [f"{stack.path}.{i}" for stack in stacks for i in range(len(stack.blocks))]
    numbers = {path: number for number, path in enumerate(paths)}
    around = {up for path in paths for up in _upward(path)}  # of what has the blocks in it
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    base = model.base_model_prefix if hasattr(model, model.base_model_prefix) else ""
    found: dict[str, Seen] = {}
    for key, tensors in made_of.items():
        above = _upward(key.rpartition(".")[0])
        module = modules.get(above[0])
        block = next((numbers[path] for path in above if path in numbers), None)
        part = next((path for path in above if hasattr(modules.get(path), "base_model_prefix")), "")
        text = part in around and any(stack.root in above for stack in stacks)
        role = None
        if module is head and head is not None:
            role = "output"
        elif isinstance(module, torch.nn.Embedding) and (text or module is table):
            same = module is table or module.num_embeddings == getattr(table, "num_embeddings", None)
            role = "embed" if same else "position"
        elif block is None and not text:
            role = TOWER if not base or base in above else "output"
        found |= {name: Seen(role, block, above[0]) for name in tensors}
    return found


def _upward(path: str) -> list[str]:
    """`a.b.c` -> a.b.c, a.b, a and the model itself."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
