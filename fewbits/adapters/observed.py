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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import ModelError
from ..model.sites import TOWER, Seen
from .forward import reads_text, reads_twice

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stack(NamedTuple):
    """root: path of the module that token ids go through. path: of its list of blocks."""

    root: str
    path: str
    blocks: torch.nn.ModuleList


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
