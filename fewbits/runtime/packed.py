"""Modules whose weight stays packed: the planes of a QTensor in the place of a float parameter.

    nn.Linear                     QLinear
      weight  Parameter (n, k)      weight  PackedWeight     format, shape, dtype
      bias    Parameter               codes, scale, ...      buffers, as the format's planes are
                                    bias    Parameter

So the keys of a state dict are those of a native directory: `<module>.weight.<plane>`. A module is changed in
place and keeps its class's own forward (embeddings that scale do it themselves).

There is no fast kernel here yet: every forward pass decodes a weight, uses it and forgets it. It takes the
memory of the packed model and of AT_ONCE weights decoded, and more time than a float model. A backward pass
decodes once more rather than keep floats. Under torch.compile the graph breaks at each of these modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional as F

from ..formats.base import AT_ONCE
from ..memory import return_freed_memory
from ..qtensor import QTensor
from .decode import faster_dtype

FREED = 2**25  # bytes of weights decoded in training after which freed memory is given back


class PackedWeight(nn.Module):
    """A weight `(n, k)` as its planes. dtype: of the floats that it is decoded to, and pretends to have."""

    def __init__(self, q: QTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.format, self.shape, self.dtype = q.format, torch.Size(q.shape), dtype
        self.factor = 1.0  # of what is decoded: a model may divide its weights when it runs
        for name, plane in q.planes.items():
            self.register_buffer(name, plane)

    @property
    def q(self) -> QTensor:
        planes = {plane.name: cast(torch.Tensor, self._buffers[plane.name]) for plane in self.format.planes}
        return QTensor(self.format, (self.shape[0], self.shape[1]), planes)

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def nbytes(self) -> int:
        return self.q.nbytes

    @torch.no_grad()
    def decode(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """-> `(n, k)` floats."""
        return self._scaled(self.q.decode()).to(dtype or self.dtype)

    @torch.no_grad()
    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """`(...)` int -> `(..., k)`: those rows, decoded alone where the format has no parameter of many."""
        rows, where = ids.unique(return_inverse=True)
        return self._scaled(self.q.decode_rows(rows)).to(self.dtype)[where]

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.factor == 1 else x * self.factor

    def div_(self, by: float) -> PackedWeight:
        self.factor /= by
        return self

    def __getitem__(self, at: Any) -> torch.Tensor:
        return self.decode()[at]

    def __getattr__(self, name: str) -> Any:
        if name == "data":  # PEFT's merge_and_unload adds to it
            raise AttributeError(
                f"a {self.format.name} weight has no float data to change; merge adapters into packed "
                "weights with `fewbits merge MODEL ADAPTER`"
            )
        return super().__getattr__(name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A model that multiplies by a weight itself, and not through its module, gets the floats."""
        floats = [each.decode() if isinstance(each, PackedWeight) else each for each in args]
        named = {key: v.decode() if isinstance(v, PackedWeight) else v for key, v in (kwargs or {}).items()}
        return function(*floats, **named)

    def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
        return self.decode() @ other

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedWeight:
        """`.to(...)`, `.half()`, `.cuda()`: planes move and are never cast; only what they decode to is."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        for name, plane in self._buffers.items():
            moved = fn(cast(torch.Tensor, plane))
            self._buffers[name] = moved if moved.dtype == cast(torch.Tensor, plane).dtype else (
                cast(torch.Tensor, plane).to(moved.device)
            )  # fmt: skip
        return self

    def extra_repr(self) -> str:
        return f"{self.format.name}, {tuple(self.shape)}"


class _Multiply(torch.autograd.Function):
    """x `(..., k)` times a packed weight `(n, k)` -> `(..., n)`. The weight has no gradient."""

    decoded: ClassVar[int] = 0  # bytes since freed memory was given back

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        ctx.weight = weight
        if ctx.needs_input_grad[0]:
            _Multiply.tidy(weight)
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        if x.device.type == "cpu" and x.dtype.itemsize == 2 and faster_dtype() == torch.float32:
            x = x.float()
        for rows, part in weight.format.decoded_rows(weight.q, AT_ONCE):
            out[..., rows] = F.linear(x, part.to(x.dtype))
        return out if weight.factor == 1 else out * weight.factor

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        _Multiply.tidy(ctx.weight)
        return grads[0] @ ctx.weight.decode(grads[0].dtype), None

    @classmethod
    def tidy(cls, weight: PackedWeight) -> None:
        """What waits for the backward pass lands in the memory of decoded weights once they are freed, and
        the next needs new memory: after some steps as much as a float model."""
        cls.decoded += 4 * weight.shape.numel()
        if cls.decoded >= FREED and weight.device.type == "cpu":
            cls.decoded = 0
            return_freed_memory()


@torch.compiler.disable
def multiply(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x `(..., k)` -> x W^T `(..., n)` in the dtype of x."""
    return cast(torch.Tensor, _Multiply.apply(x, weight))


@torch.compiler.disable
def look_up(ids: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """ids `(...)` -> rows of a packed table `(..., k)`."""
    return weight.rows(ids)


class QLinear(nn.Linear):
    """nn.Linear with a packed weight, which is frozen; gradients go through it."""

    weight: PackedWeight  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = multiply(input, self.weight)
        return out if self.bias is None else out + self.bias


class QEmbedding(nn.Embedding):
    """nn.Embedding with a packed table."""

    weight: PackedWeight  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return look_up(input, self.weight)


def packable(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Can this module's weight, `(n, k)` in a file, be packed? Not that of a class with a forward of its own,
    unless it leaves the product to super().forward."""
    if not isinstance(module, (nn.Linear, nn.Embedding)) or tuple(module.weight.shape) != shape:
        return False
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return False
    base = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
    forward = type(module).forward
    return forward is base.forward or {"super", "forward"} <= {*forward.__code__.co_names}


def pack_module(module: nn.Module, weight: PackedWeight, own: bool = True) -> None:
    """Turn a linear map or an embedding into its packed kind, in place. own=False: the weight belongs to
    another module, with which this one is tied; then it is no part of this one's state."""
    kind: type[nn.Module] = QLinear if isinstance(module, nn.Linear) else QEmbedding
    plain = (nn.Linear, nn.Embedding)
    if not isinstance(module, kind):
        given = type(module)
        # A subclass that scales says super().forward(...): next in its order of resolution is ours.
        module.__class__ = kind if given in plain else type(f"Q{given.__name__}", (given, kind), {})
    module._parameters.pop("weight", None)
    if own:
        module.weight = weight
    else:
        module.__dict__["weight"] = weight
    # transformers fills at random what no file had, and skips what says this (a tied head may come first).
    weight._is_hf_initialized = True  # type: ignore[assignment]


def unpack_module(module: nn.Module, weight: nn.Parameter) -> None:
    """The inverse of `pack_module`, with a float weight."""
    given = type(module)
    module.__class__ = given.__bases__[0]
    module._modules.pop("weight", None)
    module.__dict__.pop("weight", None)
    module.weight = weight


def packed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, PackedWeight]]:
    """(name, module, its packed weight) of each, tied ones too."""
    for name, module in model.named_modules():
        if isinstance(module, (QLinear, QEmbedding)):
            yield name, module, module.weight


def pack(model: nn.Module, weights: Mapping[str, PackedWeight]) -> None:
    """Put packed weights into a transformers model, by module name; what is tied to one shares it."""
    for name, weight in weights.items():
        pack_module(model.get_submodule(name), weight)
    ties = dict(getattr(model, "all_tied_weights_keys", {}))
    for target, source in list(ties.items()):
        here, there = (key.removesuffix(".weight") for key in (target, source))
        if here in weights or there in weights:
            del ties[target]
        if there in weights and here not in weights:
            pack_module(model.get_submodule(here), weights[there], own=False)
    if hasattr(model, "all_tied_weights_keys"):
        # Both say so: the first of loading, the second of `tie_weights` and saving later.
        model.all_tied_weights_keys = ties  # type: ignore[assignment]
        model._tied_weights_keys = ties or None  # type: ignore[assignment]
