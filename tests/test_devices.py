"""GGML formats on another device than the CPU: the same codes as there, and never through the C++ core.

`Elsewhere` is a CPU tensor that claims to lie on another device; an operator that takes it together with a
CPU tensor raises, as CUDA does. So a machine without an accelerator finds what one with it would.
"""

import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fewbits import core
from fewbits.errors import FormatError, KernelError
from fewbits.formats import FORMATS
from fewbits.formats.base import Format
from fewbits.formats.ggml import TYPES as SCALAR_TYPES
from fewbits.formats.iq import IQ_TYPES
from fewbits.qtensor import QTensor

TYPES = (*SCALAR_TYPES, *IQ_TYPES)
DEVICE = "privateuseone:0"
needs_core = pytest.mark.skipif(not core.available(), reason="the C++ core is not built")
each_type = pytest.mark.parametrize("fmt", TYPES, ids=lambda fmt: fmt.name)


class Elsewhere(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Elsewhere":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator on the tensors inside; what it returns lies where they were, or where it was asked for."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    target = kwargs.get("device")
    moved = func is torch.ops.aten._to_copy.default and target is not None
    here = any(isinstance(x, Elsewhere) for x in tensors)
    if here and not moved and any(x.ndim and not isinstance(x, Elsewhere) for x in tensors):
        raise RuntimeError(f"{func}: tensors on two devices")
    out_here = str(target).startswith("privateuseone") if target is not None else here
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    given = {id(x.inner): x for x in tensors if isinstance(x, Elsewhere)}

    def wrap(x: object) -> object:
        return given[id(x)] if id(x) in given else Elsewhere(x) if isinstance(x, torch.Tensor) else x

    found = func(*args, **kwargs)
    return tree_map(wrap, found) if out_here else found


class OtherDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def check_type(fmt: Format) -> None:
    w = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)) * 0.1
    q = fmt.encode(w)
    decoded, lost = q.decode(), fmt.distortion(w, q)
    with OtherDevice(), pytest.MonkeyPatch.context() as patch:
        for name in ("encode", "decode", "measure"):
            patch.setattr(core, name, lambda *_: pytest.fail("the C++ core was reached"))
        found = fmt.encode(Elsewhere(w))
        values, distortion = found.decode(), fmt.distortion(Elsewhere(w), found)
    blocks = found.planes["blocks"]
    assert isinstance(blocks, Elsewhere) and isinstance(values, Elsewhere)
    assert torch.equal(blocks.inner, q.planes["blocks"]) and torch.equal(values.inner, decoded)
    # The core sums in f32 over tiles: see test_core.py.
    assert distortion.squared == pytest.approx(lost.squared, rel=256 * 2**-24)
    assert distortion.largest == lost.largest


def check_types() -> None:
    """In a process of its own: torch takes a new kind of device once for all."""
    backend_registration._setup_privateuseone_for_python_backend()
    for fmt in TYPES:
        try:
            check_type(fmt)
        except Exception:  # noqa: BLE001
            print(f"{fmt.name}: {traceback.format_exc(limit=-3)}")


@needs_core
def test_another_device_gives_the_same_without_the_core() -> None:
    script = "from tests.test_devices import check_types; check_types(); print('done')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stdout == "done\n", run.stdout + run.stderr


@needs_core
@each_type
def test_meta_tensors_are_refused_or_stay_meta(fmt: Format) -> None:
    w = torch.randn(2, 256)
    there = w.to("meta")
    with pytest.raises(FormatError, match="meta device has no values"):
        fmt.encode(there)
    q = QTensor(fmt, (2, 256), {"blocks": fmt.planes[0].empty(2, 256).to("meta")})
    with pytest.raises(FormatError, match="meta device has no values"):
        fmt.distortion(there, q)
    assert fmt.decode(q).is_meta


w = torch.ones(4, 256)
blocks = torch.zeros(4 * 144, dtype=torch.uint8)
CALLS: dict[str, Callable[[torch.Tensor], object]] = {
    "encode weights": lambda x: core.encode("q4_k", x, None, True, blocks),
    "encode importances": lambda x: core.encode("q4_k", w, x, True, blocks),
    "encode blocks": lambda x: core.encode("q4_k", w, None, True, x),
    "measure weights": lambda x: core.measure("q4_k", x, blocks),
    "measure blocks": lambda x: core.measure("q4_k", w, x),
    "decode blocks": lambda x: core.decode("q4_k", x, (4, 256)),
}
WRONG: dict[str, Callable[[], torch.Tensor]] = {
    "float64": lambda: torch.ones(4, 256, dtype=torch.float64),
    "int8": lambda: torch.ones(4, 256, dtype=torch.int8),
    "strides": lambda: torch.ones(256, 4).T,
    "on meta": lambda: torch.ones(4, 256, device="meta"),
    "on privateuseone:0": lambda: Elsewhere(torch.ones(4, 256)),
    "sparse": lambda: torch.ones(4, 256).to_sparse(),
}


@needs_core
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("call", CALLS)
def test_the_core_refuses_what_it_cannot_read(call: str, wrong: str) -> None:
    what = call.split()[1]
    with pytest.raises(KernelError, match=rf"takes {what} as a contiguous .* on the CPU, not .*{wrong}"):
        CALLS[call](WRONG[wrong]())


@needs_core
def test_a_cpu_tensor_without_memory_is_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(4, 256)
    with pytest.raises(KernelError, match="not FakeTensor"):
        core.measure("q4_k", fake, blocks)
    freed = torch.ones(4, 256)
    freed.untyped_storage().resize_(0)
    with pytest.raises(KernelError, match="weights: 1024 entries in a storage of 0"):
        core.measure("q4_k", freed, blocks)


def test_every_ggml_format_is_here() -> None:
    assert {fmt.name for fmt in TYPES} == {name for name in FORMATS if hasattr(FORMATS.get(name), "type_id")}
