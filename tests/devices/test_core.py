"""The C++ core takes contiguous CPU tensors of the types that it knows, and nothing else."""

from collections.abc import Callable

import pytest
import torch

from fewbits import core
from fewbits.errors import FormatError, KernelError
from fewbits.formats import FORMATS
from fewbits.formats.base import Format
from fewbits.formats.ggml import TYPES as SCALAR_TYPES
from fewbits.formats.iq import IQ_TYPES
from fewbits.qtensor import QTensor

from .pretend import NAME, There, register

register()
TYPES = (*SCALAR_TYPES, *IQ_TYPES)
needs_core = pytest.mark.skipif(not core.available(), reason="the C++ core is not built")
each_type = pytest.mark.parametrize("fmt", TYPES, ids=lambda fmt: fmt.name)


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
    f"on {NAME}:0": lambda: There(torch.ones(4, 256)),
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
