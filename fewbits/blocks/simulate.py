"""Runs a model with changed inputs of its weights, or with changed keys and values.

    linear(x, weight)                              ->  linear(change(site, x, weight), weight)
    scaled_dot_product_attention(q, k, v, ...)     ->  attend(q, k, v, ...)

A mode of torch intercepts every call of its functions (torch.overrides.TorchFunctionMode), so nothing is
patched and no module is replaced. A weight is recognized by its memory, which also works for one expert
inside a fused `(experts, n, k)` parameter.

A site is named as the module's parameter: `model.layers.0.mlp.down_proj.weight`, and
`model.layers.0.mlp.experts.down_proj` for all experts of a fused tensor.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..errors import ModelError

Change = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
Attend = Callable[..., torch.Tensor]


class _Sites:
    """The weights inside a model's blocks: address -> name."""

    def __init__(self, model: torch.nn.Module, prefix: str = "") -> None:
        # A name with a number belongs to a block: `layers.3.`, `h.3.`; embeddings and output have none.
        rows = sorted(
            (_address(weight), _address(weight) + weight.nbytes, name)
            for name, weight in ((prefix + name, weight) for name, weight in model.named_parameters())
            if weight.ndim >= 2 and any(part.isdigit() for part in name.split("."))
        )
        self.starts = [start for start, _, _ in rows]
        self.rows = rows

    def name(self, weight: torch.Tensor) -> str | None:
        at = _address(weight)
        i = bisect_right(self.starts, at) - 1
        return self.rows[i][2] if i >= 0 and at < self.rows[i][1] else None


def _address(weight: torch.Tensor) -> int:
    """Where it lies, by its storage: a tensor that stands for another one has no pointer of its own."""
    return int(weight.untyped_storage().data_ptr() + weight.storage_offset() * weight.itemsize)


class _Inputs(TorchFunctionMode):
    def __init__(self, sites: _Sites, change: Change) -> None:
        super().__init__()
        self.sites, self.change, self.reached = sites, change, set[str]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not functional.linear:
            return func(*args, **kwargs)
        x, weight = (args + tuple(kwargs[key] for key in ("input", "weight")[len(args) :]))[:2]
        name = self.sites.name(weight)
        if name is not None:
            self.reached.add(name)
            x = self.change(name, x, weight)
        rest = {key: value for key, value in kwargs.items() if key not in ("input", "weight")}
        return func(x, weight, *args[2:], **rest)


class _Attention(TorchFunctionMode):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.calls = attend, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.attend(*args, **(kwargs or {}))


@contextmanager
def changed_inputs(model: Any, change: Change, block: str = "") -> Iterator[set[str]]:
    """Within, `change(site, x (..., k), weight (n, k)) -> x` is applied to the input of every weight of the
    blocks.

    block: name of the module if `model` is a single block, "model.layers.3".

    Yields the set of sites reached so far. Raises ModelError at the end if there was none, because
    the model does not multiply by linear(). Fused experts run one after the other.
    """
    with _experts_one_by_one(model), _Inputs(_Sites(model, f"{block}." if block else ""), change) as mode:
        yield mode.reached
    if not mode.reached:
        raise ModelError(
            f"{type(model).__name__}: no weight of its blocks was used by torch's linear(), so no input of "
            "theirs could be changed; quantized activations cannot be simulated for it"
        )


@contextmanager
def changed_attention(model: Any, attend: Attend) -> Iterator[None]:
    """Within, `attend` replaces torch's scaled_dot_product_attention, with the same arguments.

    Raises ModelError at the end if it was never called, because the model has another attention.
    """
    with _Attention(attend) as mode:
        yield
    if not mode.calls:
        raise ModelError(
            f"{type(model).__name__}: its attention is not torch's scaled_dot_product_attention(), so its "
            "keys and values could not be reached; a quantized cache cannot be simulated for it"
        )


@contextmanager
def _experts_one_by_one(model: Any) -> Iterator[None]:
    """Uses the plain loop over experts, each a linear(), if a model also has a grouped product."""
    if not hasattr(model, "set_experts_implementation"):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
