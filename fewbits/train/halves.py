"""Halves: a causal language model split before its output layer.

    tokens (b, c) --blocks--> hidden (b, c, h) --head--> logits (b, c, vocab)

Logits are the largest arrays of a small model: 64 windows of 512 over 49,152 tokens are 6 GB, their hidden
states 75 MB. After the split, hidden states are kept and logits are computed for one window at a time. The
head is the model's own forward pass without its blocks, so that scaled or capped logits are unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import ModelError


class Halves:
    """`blocks` and `head` of a transformers model, which is modified."""

    def __init__(self, model: Any, tokens: torch.Tensor):
        """tokens `(c,)`: ModelError unless head(blocks(tokens)) equals the whole model's logits."""
        with torch.no_grad():
            whole = model(input_ids=tokens[None], use_cache=False).logits
        self._blocks = getattr(model, model.base_model_prefix)
        # A model without its blocks does not find it.
        self.output = model.get_output_embeddings()
        setattr(model, model.base_model_prefix, _Absent())
        self._model = model
        try:
            with torch.no_grad():
                halves = self.head(self.blocks(tokens[None]))
            same = halves.shape == whole.shape and torch.allclose(halves, whole, equal_nan=True)
        except (AttributeError, TypeError):  # it asks the blocks for what they no longer have
            same = False
        if not same:
            raise ModelError(
                f"{type(model).__name__}: its output layer reads more than the last hidden states; training "
                "does not support this architecture"
            )

    def blocks(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(b, c)` int64 -> `(b, c, h)`."""
        return self._blocks(input_ids=tokens, use_cache=False).last_hidden_state

    def named(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Every module inside the blocks' half, by its name in the whole model."""
        prefix = self._model.base_model_prefix
        for name, module in self._blocks.named_modules():
            yield f"{prefix}.{name}", module

    def modules(self) -> Iterator[torch.nn.Module]:
        return (module for _, module in self.named())

    def recompute(self) -> None:
        """Blocks run again in the backward pass instead of keeping what is inside (gradient checkpointing).
        ModelError for a class that cannot."""
        if not getattr(self._blocks, "supports_gradient_checkpointing", False):
            raise ModelError(f"{type(self._model).__name__} cannot recompute its blocks; leave recompute out")
        newer = getattr(self._blocks, "activation_checkpointing_enable", None)
        (newer or self._blocks.gradient_checkpointing_enable)({"use_reentrant": False})
        for module in self.modules():
            if getattr(module, "gradient_checkpointing", None) is True:
                module.training = True  # it alone: what is inside it drops nothing out

    @contextmanager
    def product_in(self, kind: torch.dtype) -> Iterator[None]:
        """Within, a frozen output layer has its weight in the type that autocast gives its product, instead
        of being converted at each call."""
        output = self.output
        frozen = type(output) is torch.nn.Linear and not output.weight.requires_grad
        if not frozen or output.weight.dtype == kind:
            yield
            return
        whole = output.weight
        output.weight = torch.nn.Parameter(whole.detach().to(kind), requires_grad=False)
        try:
            yield
        finally:
            output.weight = whole

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(b, c, h)` -> `(b, c, vocab)`."""
        return self._model(inputs_embeds=hidden, use_cache=False).logits


class _Absent(torch.nn.Module):
    """Replaces the blocks and returns the given hidden states."""

    @property
    def decoder(self) -> _Absent:
        """OPT's head asks the decoder inside it."""
        return self

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> _Output:
        return _Output(inputs_embeds)


class _Output:
    """A base model's output with last_hidden_state; all other attributes are None."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
