"""The C++ core, and what to do without it.

`fewbits._core` holds the same arithmetic as the torch twins, compiled once for each instruction set
and chosen at run time (csrc/dispatch.cc). Without it everything works, tens of times slower; the
first use says so. FEWBITS_CORE=0 switches it off, FEWBITS_ISA=portable|avx2|avx512 caps it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from ..errors import KernelError
from ..lazy import torch

ISAS = ("portable", "avx2", "avx512")

# Types whose codes are points of a lattice: levels `(L,)` f32, points `(P, dim)` as indices of levels, and
# where the search for a step starts, `(s,)` f32. formats/iq.py names them; the core is taught when it loads.
LATTICES: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}


@cache
def dtypes() -> dict[torch.dtype, int]:
    """The types that the core reads weights in, and their numbers there."""
    return {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@cache
def load() -> ModuleType | None:
    if os.environ.get("FEWBITS_CORE") == "0":
        return None
    cap = os.environ.get("FEWBITS_ISA", "")
    if cap not in ("", *ISAS):
        raise KernelError(f"FEWBITS_ISA={cap} is no instruction set; it may be {', '.join(ISAS)}")
    try:
        from .. import _core
    except ImportError as error:
        warnings.warn(
            f"the C++ core is not there ({error}): the torch twins work, tens of times slower; "
            "reinstall fewbits with a C++17 compiler to build it",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    for name, table in LATTICES.items():
        _teach(_core, name, *table())
    return _core


def _teach(
    module: ModuleType, name: str, levels: torch.Tensor, points: torch.Tensor, starts: torch.Tensor
) -> None:
    digits = points.to(torch.uint8).contiguous()
    module.teach(
        name,
        (levels.data_ptr(), len(levels)),
        (digits.data_ptr(), *digits.shape),
        (starts.data_ptr(), len(starts)),
    )


def available() -> bool:
    return load() is not None


def isa() -> str:
    """The instruction set in use: avx512, avx2, portable, or torch without the core."""
    module = load()
    return "torch" if module is None else module.isa()


_threads: ContextVar[int | None] = ContextVar("threads", default=None)


def threads() -> int:
    """How many the core may use: torch's number, also where torch itself is held to one."""
    return _threads.get() or torch.get_num_threads()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Inside, torch itself works on one thread: waking others costs more than small operations take."""
    outside, given = torch.get_num_threads(), _threads.set(threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(outside)
        _threads.reset(given)


def encode(
    name: str, w: torch.Tensor, importance: torch.Tensor | None, search: bool, blocks: torch.Tensor
) -> int:
    """`(n, k)` f32/f16/bf16 -> the blocks of GGML type `name`, written to `blocks`.

    importance: `(k,)` or `(n, k)` f32. -> 0, or how many parts hold a weight that is NaN, infinite
    or beyond 2^56, and then `blocks` is void.
    """
    weights = None if importance is None else importance.contiguous().float()
    return _module().encode(
        name,
        w.data_ptr(),
        _dtype(w),
        w.numel(),
        0 if weights is None else weights.data_ptr(),
        0 if weights is None else weights.numel(),
        search,
        blocks.data_ptr(),
        blocks.nbytes,
        threads(),
    )


def measure(name: str, w: torch.Tensor, blocks: torch.Tensor) -> tuple[float, float, float]:
    """`(n, k)` and its blocks -> sum of squared errors, sum of squares, largest error."""
    return _module().measure(
        name,
        w.data_ptr(),
        _dtype(w),
        w.numel(),
        blocks.data_ptr(),
        blocks.nbytes,
        threads(),
    )


def _dtype(w: torch.Tensor) -> int:
    if w.dtype not in dtypes() or not w.is_contiguous():
        raise KernelError(f"the core takes contiguous f32, f16 or bf16 weights, not {w.dtype} {w.stride()}")
    return dtypes()[w.dtype]


def _module() -> ModuleType:
    module = load()
    if module is None:
        raise KernelError("the C++ core is not there; use the torch twins of the format")
    return module


def decode(name: str, blocks: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The blocks of GGML type `name` -> `(n, k)` f32."""
    out = torch.empty(shape, dtype=torch.float32)
    blocks = blocks.contiguous()
    _module().decode(name, blocks.data_ptr(), blocks.nbytes, out.data_ptr(), out.numel(), threads())
    return out


@dataclass(frozen=True)
class Rounding:
    """What a grid does to a number, laid out for the core: `(groups, n)` each, and `group (k,)` int64, the
    row of them that a column has. A table (levels, boundaries between them, codes; all f32) or, without
    one, integers in [0, top] about zero."""

    group: torch.Tensor
    step: torch.Tensor
    inverse: torch.Tensor
    base: torch.Tensor | None = None
    zero: torch.Tensor | int = 0
    top: int = 0
    table: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


def walk(
    state: torch.Tensor,
    coupling: torch.Tensor,
    rounding: Rounding,
    pivot: torch.Tensor | None,
    old: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """state `(k, n)`, coupling `(k, k)` -> codes u8, values and moves `(k, n)`: see csrc/walk.h.

    pivot `(k,)`: moves are (state - value) / pivot; else from old `(k, n)`, value - old.
    """
    k, n = state.shape
    state, old = state.contiguous(), None if old is None else old.contiguous()
    shared = [p.contiguous() if isinstance(p, torch.Tensor) else None
              for p in (rounding.step, rounding.inverse, rounding.base, rounding.zero)]  # fmt: skip
    groups = rounding.step.shape[0]
    fits = [part is None or part.shape == (groups, n) for part in shared]
    fits += [coupling.shape == (k, k), coupling.stride(1) == 1, rounding.group.shape == (k,)]
    fits += [old is None or old.shape == (k, n), pivot is None or pivot.shape == (k,)]
    fits += [
        (pivot is None) != (old is None),
        int(rounding.group.min()) >= 0,
        int(rounding.group.max()) < groups,
    ]
    floats = [state, coupling, pivot, old, *shared, *(rounding.table or ())]
    fits += [part is None or part.dtype == torch.float32 for part in floats]
    if not all(fits):
        raise KernelError(f"walk over {tuple(state.shape)}: the arrays do not fit one another")
    levels, boundaries, codes = rounding.table or (None, None, None)
    out = (torch.empty(k, n, dtype=torch.uint8), torch.empty(k, n), torch.empty(k, n))
    step, inverse, base, zeros = (_address(part) for part in shared)
    group = rounding.group.contiguous()
    zero = float(rounding.zero) if isinstance(rounding.zero, int) else 0.0
    _module().walk(
        (k, n, coupling.stride(0)),
        (_address(state), _address(coupling), _address(pivot), _address(old), _address(group)),
        (step, inverse, base, zeros, zero, rounding.top),
        (0 if levels is None else len(levels), _address(boundaries), _address(levels), _address(codes)),
        tuple(part.data_ptr() for part in out),
        threads(),
    )
    return out


def _address(part: torch.Tensor | None) -> int:
    return 0 if part is None else part.data_ptr()
