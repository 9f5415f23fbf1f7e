"""Weights of one shape for GPTQ in lockstep, and the kernel that it needs, on a device without Triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from fewbits import core, kernels
from fewbits.calibrate.stats import Stats
from fewbits.core import Rounding

from .pretend import There


def weights_and_stats(
    count: int, n: int, k: int, tokens: int = 300
) -> tuple[list[torch.Tensor], list[Stats]]:
    """Weights `(n, k)`, each with a Hessian and an order of its own; the second has a mismatch too."""
    generator = torch.Generator().manual_seed(0)
    ws, stats = [], []
    for i in range(count):
        ws.append(torch.randn(n, k, generator=generator) * 0.1)
        x = torch.randn(tokens * (i + 1), k, generator=generator)
        x = x @ torch.randn(k, k, generator=generator) / 20
        hessian = x.T @ x / len(x)
        mismatch = 0.1 * hessian if i == 1 else None
        stats.append(Stats(len(x), x.abs().amax(0), hessian.diagonal().clone(), hessian, mismatch))
    return ws, stats


@contextmanager
def pretended_kernel() -> Iterator[list[int]]:
    """Within, the pretended device has the kernel of columns, by the C++ core -> of each launch, for how many
    weights it was."""
    launches: list[int] = []

    def quantize_columns(*given: Any) -> Any:
        state, coupling, rounding, pivot, old = (_inside(each) for each in given)
        e = 1 if coupling.ndim == 2 else len(coupling)
        launches.append(e)
        if coupling.ndim == 2:
            found = [core.quantize_columns(state, coupling, rounding, pivot, old)]
        else:
            found = []
            for i in range(e):
                parts = (_rows(each, i, e) for each in (state, rounding, old))
                state_here, rounding_here, old_here = parts
                rounding_here = replace(rounding_here, group=rounding.group[i])
                pivot_here = None if pivot is None else pivot[i]
                found.append(
                    core.quantize_columns(state_here, coupling[i], rounding_here, pivot_here, old_here)
                )
        return tuple(There(torch.cat(each, 1)) for each in zip(*found, strict=True))

    def takes(*tensors: torch.Tensor | None) -> bool:
        return any(isinstance(each, There) for each in tensors)

    with (
        patch.object(kernels, "takes", takes),
        patch.object(kernels, "load", lambda name: SimpleNamespace(quantize_columns=quantize_columns)),
    ):
        yield launches


def _inside(x: Any) -> Any:
    if isinstance(x, Rounding):
        return Rounding(**{each.name: _inside(getattr(x, each.name)) for each in fields(Rounding)})
    if isinstance(x, tuple):
        return tuple(map(_inside, x))
    return x.inner.contiguous() if isinstance(x, There) else x


def _rows(x: Any, i: int, e: int) -> Any:
    """Part i of e of a `(m, rows)` array, or of those of a rounding."""
    if isinstance(x, Rounding):
        names = ("scale", "inverse", "offset", "zero")
        return replace(x, **{name: _rows(getattr(x, name), i, e) for name in names})
    return x.chunk(e, 1)[i].contiguous() if isinstance(x, torch.Tensor) else x
