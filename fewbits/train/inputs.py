"""FakeInput: the input of a linear layer quantized in each pass, with gradients.

    dynamic   the scale is that of the values; the gradient passes the rounding
    static    y = s clamp(round(x / s) + zero) - s zero with a trained step s (LSQ, arXiv 1902.08153):
              dy/dx = 1 inside the range, else 0; dy/ds = y / s - x / s inside, the clipped code outside

The zero point of an asymmetric scheme stays that of calibration.
"""

from __future__ import annotations

from typing import Any

import torch

from ..activations.quantizers import Affine, Quantizer, quantize, quantize_dequantize


class FakeInput(torch.nn.Module):
    """`(..., k)` -> the same, quantized and dequantized. scale `(1,)`: the step of a static scheme."""

    def __init__(self, quantizer: Quantizer, device: torch.device) -> None:
        super().__init__()
        self.scheme = quantizer.scheme
        self.scale: torch.nn.Parameter | None = None
        if quantizer.affine is not None:
            self.scale = torch.nn.Parameter(quantizer.affine.scale.float().reshape(1).to(device))
            self.zero, self.unit = float(quantizer.affine.zero), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            return x + (quantize_dequantize(x, self.scheme) - x).detach()
        rounded: torch.Tensor = _Static.apply(x, self.scale * self.unit, self)
        return rounded

    def affine(self) -> Affine:
        assert self.scale is not None
        scale = self.scale.detach() * self.unit
        return Affine(scale, torch.full_like(scale, self.zero))

    def relative(self) -> None:
        """`scale` becomes a multiple of the step now."""
        if self.scale is not None:
            self.unit = float(self.scale.detach())
            self.scale.data.fill_(1.0)


class _Static(torch.autograd.Function):
    """Kept for the backward pass: x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, module: FakeInput) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        ctx.module = module
        return quantize_dequantize(x, module.scheme, Affine(scale, torch.full_like(scale, module.zero)))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        scheme, zero = ctx.module.scheme, ctx.module.zero
        code = quantize(x, scheme, Affine(scale, torch.full_like(scale, zero)))
        at = x.float() / scale
        inside = (at >= scheme.smallest - zero) & (at <= scheme.largest - zero)
        to_scale = (gradient.float() * (code - zero - torch.where(inside, at, 0.0))).sum().reshape(1)
        return torch.where(inside, gradient, 0.0), to_scale, None
