"""One block of a decoder: its weights by their checkpoint names, its call, the inputs of its sites.

    block = model.block(i, weights)        blocks/model.py
    block(hidden)                          (b, t, h) -> (b, t, h)
    block.watched(hidden, watch)           the same, and calls watch(site, x (rows, k)) for each site's input
    block.set({name: weight})              replace some weights

A site's input is observed: every linear layer of the forward pass is intercepted, and its weight is
recognized by its memory, whole or as a slice of a fused array. The architecture has to multiply by
`torch.nn.functional.linear` or a product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ModelError, raise_all
from ..files.experts import WHOLE, Place
from .flow import PLAIN
from .stand_in import Call, Products

Watch = Callable[[str, torch.Tensor], None]


class Block:
    """One block of a decoder, with its weights. `module` is transformers' own; no parameter requires grad."""

    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    number, flow = 0, PLAIN  # which block it is, and what it reads and hands on
    in_place = False  # whether `set` writes into tensors that a running pass may use

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        made_of: Mapping[str, Mapping[str, Place]],
        call: Callable[[torch.Tensor], Call],
    ) -> None:
        self.name, self.module = name, module
        self._made_of, self._call = made_of, call

    @property
    def names(self) -> list[str]:
        """The checkpoint names of its tensors."""
        return [name for made_of in self._made_of.values() for name in made_of]

    def __call__(
        self,
        hidden: torch.Tensor,
        weights: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """`(b, t, h)` -> `(b, t, h)`. weights: replace the block's own in this call, by checkpoint name;
        the result is differentiable with respect to them. dtype: of this call's arithmetic, where all the
        weights are given (default: the block's)."""
        dtype = dtype or self.dtype
        packed = hidden.to(self.device, dtype)
        hidden, call = self.flow.enter(packed, self._call(packed))
        call = call.changed(lambda x: x.to(dtype) if x.is_floating_point() else x)
        before = [dict(table) for table in call.tables]
        stand_ins = self._substitutes(weights or {}, dtype)
        result = call.run(
            lambda args, kwargs: functional_call(self.module, stand_ins, args, kwargs), hidden.to(dtype)
        )
        output = result[0] if isinstance(result, tuple | list) else result
        if output.shape != hidden.shape:
            raise ModelError(f"{self.name}: {tuple(hidden.shape)} came out as {tuple(output.shape)}")
        return self.flow.leave(self.number, packed, output, Products.of(result, before, call.tables))

    def short(self, hidden: torch.Tensor) -> torch.Tensor:
        """A few of the rows of `(b, t, h)` that can be run by themselves."""
        return hidden[:1] if self.flow.whole_rows else hidden[:1, :8]

    def watched(self, hidden: torch.Tensor, watch: Watch) -> torch.Tensor:
        """`(b, t, h)` -> `(b, t, h)`, calling `watch(site name, x (rows, k))` for the input of each site.

        Sites that read the same tensor get the same x. An expert gets the rows that are routed to it; an
        expert without rows is not called.
        """
        with _LinearWatch(self._ranges(), watch):
            return self(hidden)

    def set(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace some of the weights, by their checkpoint names; all faults in one ModelError."""
        places = self._places(weights)
        for name, weight in weights.items():
            key, place = places[name]
            if place != WHOLE:
                place.of(self._whole(key)).copy_(weight)
            elif self.in_place:
                get_tensor(self.module, key).detach().copy_(weight)
            else:
                put_tensor(self.module, key, weight.detach().to(self.device, self.dtype).contiguous())

    def weight(self, name: str) -> torch.Tensor:
        """The current weight of the block: a view, in the dtype of the computation."""
        for key, made_of in self._made_of.items():
            if name in made_of:
                return made_of[name].of(get_tensor(self.module, key).detach())
        raise ModelError(f"{self.name}: tensor {name!r} is not one of this block")

    def _places(self, weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, Place]]:
        """The place of each weight: a parameter of the module, and the place in it."""
        places = {name: (key, made_of[name]) for key, made_of in self._made_of.items() for name in made_of}
        faults = [f"tensor {name!r} is not one of this block" for name in weights if name not in places]
        for name in weights.keys() & places.keys():
            key, place = places[name]
            shape = tuple(place.of(get_tensor(self.module, key)).shape)
            if tuple(weights[name].shape) != shape:
                faults.append(f"tensor {name!r} is {tuple(weights[name].shape)}, the block takes {shape}")
        raise_all(ModelError, self.name, sorted(faults))
        return {name: places[name] for name in weights}

    def _substitutes(
        self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """The module's parameters made of the weights; fused ones are completed with the block's own."""
        made: dict[str, torch.Tensor] = {}
        for name, (key, place) in self._places(weights).items():
            weight = weights[name].to(self.device, dtype)
            if place != WHOLE and key not in made:
                made[key] = get_tensor(self.module, key).detach().to(dtype, copy=True)
            if place != WHOLE:
                place.of(made[key]).copy_(weight)
            else:
                made[key] = weight
        return made

    def _whole(self, key: str) -> torch.Tensor:
        """A fused array, allocated with the first weight in it."""
        if get_tensor(self.module, key).is_meta:
            shape = get_tensor(self.module, key).shape
            put_tensor(self.module, key, torch.empty(shape, dtype=self.dtype, device=self.device))
        return get_tensor(self.module, key).detach()

    def _ranges(self) -> dict[int, list[tuple[int, int, str, int]]]:
        """storage -> first and last element of each site in it, its name and its columns."""
        ranges: dict[int, list[tuple[int, int, str, int]]] = {}
        for key, made_of in self._made_of.items():
            whole = get_tensor(self.module, key)
            if whole.ndim < 2:
                continue
            spans = ranges.setdefault(whole.untyped_storage().data_ptr(), [])
            for name, place in made_of.items():
                start = int(place.of(whole).storage_offset())
                spans.append((start, start + place.of(whole).numel(), name, place.of(whole).shape[-1]))
        return ranges


class _LinearWatch(TorchFunctionMode):
    """Intercepts every product with a weight, and recognizes its sites by the memory of the weight.

    A slice of a fused array is the site of one expert; a fused gate and up are two sites at once. A batched
    product has an expert in each matrix; rows of zeros were routed elsewhere and do not count.
    """

    def __init__(self, ranges: Mapping[int, Sequence[tuple[int, int, str, int]]], watch: Watch) -> None:
        super().__init__()
        self._ranges, self._watch = ranges, watch
        self._rows: Any = WeakTensorKeyDictionary()  # input -> its rows, while the input lives

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is linear:
            given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            self._observe(given["input"], given["weight"])
        elif function in _PRODUCTS and len(args) > _PRODUCTS[function] + 1:
            x, weight = args[_PRODUCTS[function] : _PRODUCTS[function] + 2]
            if weight.ndim == 2 and x.ndim:
                self._observe(x, weight.mT)
            if x.ndim == 2 and x.untyped_storage().data_ptr() in self._ranges:  # weight @ columns of inputs
                self._observe(weight.mT, x)
            elif weight.ndim == 3 and x.ndim == 3 and len(x) == len(weight) > 1:
                self._each(x, weight.mT)
        return function(*args, **kwargs)

    def _each(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        """One matrix of inputs for each matrix of weights."""
        if weights.untyped_storage().data_ptr() in self._ranges:
            for rows, weight in zip(x, weights, strict=True):
                self._observe(rows[rows.any(-1)], weight)

    def _observe(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        start = weight.storage_offset()
        stop = start + weight.numel()
        near = self._ranges.get(weight.untyped_storage().data_ptr(), ())
        names = [
            name for first, last, name, k in near if start <= first and last <= stop and k == x.shape[-1]
        ]
        if not names or x.numel() == 0:
            return
        if x not in self._rows:
            # A new tensor, so that the dictionary does not keep its own key alive.
            self._rows[x] = x.detach().reshape(-1, x.shape[-1])
        for name in names:
            self._watch(name, self._rows[x])


_PRODUCTS = {
    torch.matmul: 0, torch.Tensor.matmul: 0, torch.Tensor.__matmul__: 0, torch.mm: 0, torch.Tensor.mm: 0,
    torch.bmm: 0, torch.Tensor.bmm: 0, torch.addmm: 1, torch.baddbmm: 1,
}  # fmt: skip
"""function -> where its two factors begin"""


def get_tensor(module: torch.nn.Module, key: str) -> torch.Tensor:
    owner, _, leaf = key.rpartition(".")
    value = getattr(module.get_submodule(owner), leaf)
    assert isinstance(value, torch.Tensor)
    return value


def put_tensor(module: torch.nn.Module, key: str, value: torch.Tensor) -> None:
    """Replace a parameter or buffer by name."""
    owner, _, leaf = key.rpartition(".")
    place = module.get_submodule(owner)
    if leaf in dict(place.named_buffers(recurse=False)):
        setattr(place, leaf, value)
    else:
        setattr(place, leaf, torch.nn.Parameter(value, requires_grad=False))
