"""Statistics of one activation, the input of a weight, for error-aware algorithms.

    x (t, k)  the inputs of a site, one row per token

    absmax        max |x|        (k,)       None if unknown: an importance matrix does not have it
    mean_square   mean x^2       (k,)       llama.cpp's importance matrix
    hessian       mean x x^T     (k, k)     of the squared output error |(q - w) x|^2, except for a factor 2
    mismatch         mean (x~ - x) x^T  (k, k) x~ the same input in the float model: the effect of quantizing
                                            the earlier part (GPTAQ, arXiv 2504.02692)

Sites that read the same activation share one Stats. `a + b` merges the statistics of two texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CalibrationError


@dataclass(frozen=True)
class Stats:
    """Of one group's input; f32. count: tokens. hessian and mismatch only if an algorithm needs them."""

    count: int
    absmax: torch.Tensor | None
    mean_square: torch.Tensor
    hessian: torch.Tensor | None = None
    mismatch: torch.Tensor | None = None
    # Results of algorithms that weights with the same input share: a factor of the Hessian.
    cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def columns(self) -> int:
        return self.mean_square.shape[0]

    @staticmethod
    def of(x: torch.Tensor, hessian: bool = True, floats: torch.Tensor | None = None) -> Stats:
        """`(..., k)` inputs -> their statistics. floats: the same inputs in the float model."""
        x = x.reshape(-1, x.shape[-1]).float()
        t = max(1, x.shape[0])
        mismatch = None
        if floats is not None:
            mismatch = (floats.reshape(x.shape).float() - x).T @ x / t
        return Stats(
            x.shape[0],
            x.abs().amax(0) if x.shape[0] else x.new_zeros(x.shape[1]),
            x.square().mean(0) if x.shape[0] else x.new_zeros(x.shape[1]),
            x.T @ x / t if hessian else None,
            mismatch,
        )

    def to(self, device: str | torch.device) -> Stats:
        """The same on a device; itself if it is already there, so that sites still share it."""
        device = torch.device(device)
        if self.mean_square.device == device:
            return self
        if device not in self.cache:
            parts = (self.absmax, self.mean_square, self.hessian, self.mismatch)
            self.cache[device] = Stats(self.count, *(p if p is None else p.to(device) for p in parts))  # type: ignore[arg-type]
        return self.cache[device]

    def __add__(self, other: Stats) -> Stats:
        if self.columns != other.columns:
            raise CalibrationError(
                f"statistics of {self.columns} and of {other.columns} columns cannot be merged; "
                "they are of different models"
            )
        total = max(1, self.count + other.count)

        def mean(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
            if a is None or b is None:
                return None
            return a * (self.count / total) + b * (other.count / total)

        square = mean(self.mean_square, other.mean_square)
        assert square is not None
        return Stats(
            self.count + other.count,
            None if self.absmax is None or other.absmax is None else torch.maximum(self.absmax, other.absmax),
            square,
            mean(self.hessian, other.hessian),
            mean(self.mismatch, other.mismatch),
        )
