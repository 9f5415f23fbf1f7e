"""Quantized activations: the schemes for the input of a linear layer.

    x (t, k)  the inputs of one weight (n, k), one row a token

    dynamic   each row has its own scale, computed from the row: no calibration, but a pass over x
    static    one scale for the whole tensor, fixed by calibration (observers.py)

    symmetric    code = round(x / scale)            -127 ... 127        scale = largest |x| / 127
    asymmetric   code = round(x / scale) + zero     -128 ... 127        scale = (high - low) / 255
    fp8          code = e4m3(x / scale)             largest 448         scale = largest |x| / 448

An asymmetric range always contains 0, so that 0 has a code. Rounding is to nearest, ties to even; values
outside a static range are clipped. int4: -7 ... 7 and -8 ... 7.

Sources: Nagel et al., A White Paper on Neural Network Quantization (arXiv 2106.08295), section 2; FP8
Formats for Deep Learning (arXiv 2209.05433). Codes are simulated: they are exact, but stored as
floats, so that an input that is not finite remains visible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import CalibrationError, PlanError
from ..registry import Registry

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Scheme:
    """How activations are quantized. bits: 8 or 4; floating: e4m3 instead of integers."""

    name: str
    bits: int = 8
    dynamic: bool = True
    symmetric: bool = True
    floating: bool = False

    @property
    def largest(self) -> float:
        """The largest code: 127, 7 or 448."""
        return torch.finfo(FP8).max if self.floating else 2.0 ** (self.bits - 1) - 1

    @property
    def smallest(self) -> float:
        return -self.largest if self.symmetric else -self.largest - 1

    def affine(self, low: torch.Tensor, high: torch.Tensor) -> Affine:
        """The scale and zero point that cover low ... high (any shape, f32); a range of 0 has scale 1."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            scale = torch.maximum(-low, high) / self.largest
            scale = torch.where(scale == 0, 1.0, scale)
            return Affine(scale, torch.zeros_like(scale))
        scale = (high / 2 - low / 2) / ((self.largest - self.smallest) / 2)  # halves: no overflow
        scale = torch.where(scale == 0, 1.0, scale)
        return Affine(scale, (self.smallest - low / scale).round().clamp(self.smallest, self.largest))


@dataclass(frozen=True)
class Affine:
    """value = (code - zero) * scale. Both f32, of one shape that broadcasts against the activation."""

    scale: torch.Tensor
    zero: torch.Tensor


@dataclass(frozen=True)
class Quantizer:
    """A scheme and, for a static one, its scale and zero point. A call quantizes and dequantizes."""

    scheme: Scheme
    affine: Affine | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return quantize_dequantize(x, self.scheme, self.affine)


def parse(name: str) -> Scheme:
    """`int8_dynamic` -> its Scheme; PlanError lists the known names."""
    return SCHEMES.get(name)


def fit(x: torch.Tensor, scheme: Scheme) -> Affine:
    """`(..., k)` -> scale and zero point `(..., 1)` of each row (a dynamic scheme)."""
    low, high = torch.aminmax(x.float(), dim=-1, keepdim=True)
    return scheme.affine(low, high)


def quantize(x: torch.Tensor, scheme: Scheme, affine: Affine) -> torch.Tensor:
    """`(..., k)` -> codes `(..., k)` as f32; integers for an integer scheme, e4m3 values for fp8."""
    scaled = x.float() / affine.scale
    if scheme.floating:
        return scaled.clamp(scheme.smallest, scheme.largest).to(FP8).float()
    return (scaled.round() + affine.zero).clamp(scheme.smallest, scheme.largest)


def quantize_dequantize(x: torch.Tensor, scheme: Scheme, affine: Affine | None = None) -> torch.Tensor:
    """`(..., k)` float -> quantized and dequantized, in the same shape and type.

    affine: the fixed scale of a static scheme. Raises CalibrationError if that is missing.
    """
    if affine is None:
        if not scheme.dynamic:
            raise CalibrationError(
                f"{scheme.name} needs a scale for each site, fixed by calibration; calibrate one, or use "
                "int8_dynamic or fp8_dynamic, which need none"
            )
        affine = fit(x, scheme)
    return ((quantize(x, scheme, affine) - affine.zero) * affine.scale).to(x.dtype)


SCHEMES: Registry[Scheme] = Registry("activation scheme", PlanError)
for _dynamic in (True, False):
    _when = "dynamic" if _dynamic else "static"
    SCHEMES.add(f"int8_{_when}", Scheme(f"int8_{_when}", dynamic=_dynamic))
    SCHEMES.add(f"fp8_{_when}", Scheme(f"fp8_{_when}", dynamic=_dynamic, floating=True))
    SCHEMES.add(
        f"int8_asymmetric_{_when}", Scheme(f"int8_asymmetric_{_when}", dynamic=_dynamic, symmetric=False)
    )
SCHEMES.add("int4_dynamic", Scheme("int4_dynamic", bits=4))
