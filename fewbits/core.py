"""The C++ core, and what to do without it.

`fewbits._core` holds the same arithmetic as the torch twins, compiled once for each instruction set
and chosen at run time (csrc/dispatch.cc). Without it everything works, tens of times slower; the
first use says so. FEWBITS_CORE=0 switches it off, FEWBITS_ISA=portable|avx2|avx512 caps it.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@cache
def load() -> ModuleType | None:
    if os.environ.get("FEWBITS_CORE") == "0":
        return None
    try:
        from . import _core
    except ImportError as error:
        warnings.warn(
            f"the C++ core is not there ({error}): the torch twins work, tens of times slower; "
            "reinstall fewbits with a C++17 compiler to build it",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    return _core


def available() -> bool:
    return load() is not None


def isa() -> str:
    """The instruction set in use: avx512, avx2, portable, or torch without the core."""
    module = load()
    return "torch" if module is None else module.isa()


def threads() -> int:
    return torch.get_num_threads()


@dataclass(frozen=True)
class Cost:
    """What encoding lost: sum of squared errors, sum of squares of the weights, largest error."""

    squared: float
    energy: float
    largest: float
    refused: int = 0


def encode(
    name: str,
    w: torch.Tensor,
    importance: torch.Tensor | None,
    search: bool,
    out: torch.Tensor,
    measure: bool = False,
) -> Cost:
    """`(n, k)` f32/f16/bf16 -> the blocks of GGML type `name` in `out`.

    importance: `(k,)` or `(n, k)` f32. measure: also decode and take the error, in the same pass.
    `refused` > 0: that many weights of some block are NaN, infinite or beyond 2^56; `out` is void.
    """
    module = load()
    assert module is not None
    w = w.contiguous() if w.dtype in DTYPES else w.float().contiguous()
    weights = None if importance is None else importance.contiguous().float()
    if not out.is_contiguous():
        raise ValueError("the destination must be contiguous")
    cost = module.encode(
        name,
        w.data_ptr(),
        DTYPES[w.dtype],
        w.numel(),
        0 if weights is None else weights.data_ptr(),
        0 if weights is None else weights.numel(),
        search,
        measure,
        out.data_ptr(),
        out.nbytes,
        threads(),
    )
    return Cost(*cost)


def decode(name: str, blocks: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The blocks of GGML type `name` -> `(n, k)` f32."""
    module = load()
    assert module is not None
    out = torch.empty(shape, dtype=torch.float32)
    blocks = blocks.contiguous()
    module.decode(name, blocks.data_ptr(), blocks.numel(), out.data_ptr(), out.numel(), threads())
    return out
