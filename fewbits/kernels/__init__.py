"""Kernels for GPUs, in Triton. Each does what a function of `core/` or plain torch does on the CPU."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def takes(*tensors: torch.Tensor | None) -> bool:
    """Do all of these lie where a Triton kernel can run: on a GPU, with Triton installed?"""
    return all(part is None or part.device.type in ("cuda", "xpu") for part in tensors) and _installed()


def load(name: str) -> Any:
    """A module of this package: they import Triton, so nothing imports them before it is needed."""
    return import_module(f".{name}", __name__)
