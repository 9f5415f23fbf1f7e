"""A device that is none: CPU tensors that say they lie on `pretend:0`, so that a machine without an
accelerator finds what one with it would.

    with pretend():
        w = torch.randn(64, 1024, device="pretend")

An operator that takes such a tensor together with a CPU tensor raises, as CUDA does; a CPU tensor without
dimensions and CPU indices are allowed, as there. Compiled code gets no pointer to its memory. What is
computed is what the CPU computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_DEVICELESS = {"aten::copy_", "aten::_local_scalar_dense", "aten::item"}


def register() -> None:
    """Make the name known to torch; once in a process."""
    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME)
        # torch's recomputation of blocks asks every device that is there.
        module = getattr(torch, NAME)
        module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
        # And what keeps the state of random numbers.
        module.get_rng_state, module.set_rng_state = (lambda *_: torch.get_rng_state()), (lambda *_: None)


class There(torch.Tensor):
    """A tensor of the device. inner: the CPU tensor that it is."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=f"{NAME}:0", requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()  # weights are told apart by where they lie

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"There({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _ran(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _ran(func, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """Tensors of Python's numbers and back, which no operator makes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist:
            return _inner(args[0]).tolist()
        if func not in (torch.tensor, torch.as_tensor) or kwargs.get("device") is None:
            return func(*args, **kwargs)
        return func(*args, **kwargs | {"device": None}).to(kwargs["device"])


@contextmanager
def pretend() -> Iterator[torch.device]:
    """Within, tensors can be made on the device."""
    register()
    # A tensor that stands for another has a version, which those of inference mode have not.
    mode = torch.inference_mode
    with (
        patch.object(mode, "__enter__", _enter), patch.object(mode, "__exit__", _leave),
        _Operators(), _Numbers(),
    ):  # fmt: skip
        yield torch.device(NAME)


def _enter(self: Any) -> None:
    self.instead = torch.no_grad()
    self.instead.__enter__()


def _leave(self: Any, *raised: Any) -> None:
    self.instead.__exit__(*raised)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, There) else x


def _ran(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator on the tensors inside; what it returns lies where they were, or where it was asked for."""
    name = func._schema.name
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target).type
    here = any(isinstance(x, There) for x in tensors)
    moving = name == "aten::_to_copy" and target is not None
    if here and not moving and name not in _DEVICELESS:
        strangers = [x for x in tensors if not isinstance(x, There) and x.ndim]
        if name in _INDEXING and isinstance(args[0], There):
            strangers = [x for x in strangers if x.dtype not in (torch.int64, torch.bool, torch.int32)]
        if strangers:
            raise RuntimeError(f"{name}: tensors on two devices")
    if target is not None:
        kwargs = kwargs | {"device": torch.device("cpu" if target == NAME else target)}
    if name == "aten::_to_copy" and target in (None, NAME):
        kwargs = kwargs | {"device": None}
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not (target == NAME or (here and target is None)):
        return found
    known = {id(x.inner): x for x in tensors if isinstance(x, There)}

    def outside(x: Any) -> Any:
        return known[id(x)] if id(x) in known else There(x) if isinstance(x, torch.Tensor) else x

    return tree_map(outside, found)
