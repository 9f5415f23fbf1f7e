"""A linear layer in integer arithmetic: int8 in, int8 out, no floats.

    acc = sum_k (w - zero_w) (x - zero_x) + bias                   int32
        = sum w x - zero_x sum w - zero_w sum x + k zero_w zero_x + bias
    y   = clamp(zero_y + round(acc * M))          M = scale_w scale_x / scale_y, one for each row of w

M is a fixed-point number, M = M0 / 2^31 * 2^-n with M0 in [2^30, 2^31). acc * M is a *saturating rounding
doubling high multiply* by M0 (the high half of 2 acc M0), then a *rounding right shift* by n:

    high(a, b)  = trunc((a b + nudge) / 2^31)     nudge = 2^30 if a b >= 0, else 1 - 2^30: ties go up
                                                  a = b = -2^31 would give 2^31: it gives 2^31 - 1
    shift(a, n) = a / 2^n to nearest, ties away from zero

If M >= 1, n is negative: acc is shifted left first, saturating at int32.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference (arXiv 1712.05877), sections 2.2 to 2.4; the two roundings are those of its gemmlowp.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp
from typing import cast

import torch

from ..errors import KernelError, raise_all
from .quantizers import SCHEMES, Affine, Scheme, quantize

LOW, HIGH = -(2**31), 2**31 - 1  # int32
# Columns: each |w x| <= 2^14, and f32 adds integers exactly up to 2^24. An int8 is exact in bf16 and TF32
# too, so torch's faster modes of f32 products give the same result.
EXACT = 1024
ASYMMETRIC = SCHEMES.get("int8_asymmetric_static")


@dataclass(frozen=True)
class IntegerLinear:
    """weight `(n, k)` int8; bias `(n,)` int32 with scale scale_w * scale_x; multiplier `(n,)` int32 and shift
    `(n,)` int64: M of each row. Zero points lie in int8.

    Raises KernelError for a row whose accumulator could overflow int32, and for parts that do not match.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    multiplier: torch.Tensor
    shift: torch.Tensor
    zero_x: int = 0
    zero_y: int = 0
    zero_w: int = 0

    def __post_init__(self) -> None:
        n = self.weight.shape[0]
        faults = [
            f"{name} is {tuple(part.shape)} {part.dtype}, ({n},) {dtype} is needed"
            for name, part, dtype in (
                ("bias", self.bias, torch.int32),
                ("multiplier", self.multiplier, torch.int32),
                ("shift", self.shift, torch.int64),
            )
            if part.shape != (n,) or part.dtype != dtype
        ]
        if self.weight.ndim != 2 or self.weight.dtype != torch.int8:
            faults.append(f"weight is {tuple(self.weight.shape)} {self.weight.dtype}, (n, k) int8 is needed")
        zeros = {"zero_x": self.zero_x, "zero_y": self.zero_y, "zero_w": self.zero_w}
        faults += [
            f"{name} is {z}, -128 ... 127 is needed" for name, z in zeros.items() if not -128 <= z < 128
        ]
        raise_all(KernelError, "integer linear", faults)
        widest = max(128 + self.zero_x, 127 - self.zero_x)
        reach = widest * (self.weight.long() - self.zero_w).abs().sum(1) + self.bias.long().abs()
        worst = max(
            int(reach.max()) if n else 0, self.weight.shape[1] * 2**14
        )  # the second: of sum w x alone
        if worst > HIGH:
            raise KernelError(
                f"integer linear: a sum over {self.weight.shape[1]} columns can reach {worst}, int32 holds "
                f"{HIGH}; split the columns or use smaller weight codes"
            )

    @staticmethod
    def of(
        weight: torch.Tensor, scale_w: torch.Tensor, bias: torch.Tensor | None, x: Affine, y: Affine
    ) -> IntegerLinear:
        """Codes `(n, k)` int8 and scales `(n,)` of a symmetric weight, bias `(n,)` float, ranges of in- and
        output (scalars, as observers give them) -> the layer. The bias is rounded to scale_w scale_x."""
        scale = scale_w.double() * x.scale.double()
        whole = (torch.zeros_like(scale) if bias is None else bias.double() / scale).round()
        if not bool((whole.abs() <= HIGH).all()):
            raise KernelError(
                f"integer linear: the bias code {float(whole.abs().max()):g} does not fit int32 ({HIGH}); "
                "the scales of its weights and inputs are too small for it; keep this layer in float"
            )
        fixed = [fixed_point(float(real)) for real in scale / y.scale.double()]
        return IntegerLinear(
            weight,
            whole.to(torch.int32),
            torch.tensor([m for m, _ in fixed], dtype=torch.int32),
            torch.tensor([n for _, n in fixed], dtype=torch.int64),
            zero_x=int(x.zero),
            zero_y=int(y.zero),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`(t, k)` int8 -> `(t, n)` int8."""
        scaled = requantize(self.accumulate(x), self.multiplier, self.shift)
        return (scaled + self.zero_y).clamp(-128, 127).to(torch.int8)

    def accumulate(self, x: torch.Tensor) -> torch.Tensor:
        """`(t, k)` int8 -> `(t, n)` int32, zero points subtracted and bias added."""
        if x.ndim != 2 or x.shape[1] != self.weight.shape[1] or x.dtype != torch.int8:
            raise KernelError(
                f"integer linear: input is {tuple(x.shape)} {x.dtype}, "
                f"(t, {self.weight.shape[1]}) int8 is needed"
            )
        total = product(x, self.weight).long() + self.bias
        total -= self.zero_x * self.weight.long().sum(1)
        total -= self.zero_w * x.long().sum(1, keepdim=True)
        total += x.shape[1] * self.zero_w * self.zero_x
        return total.to(torch.int32)


class IntegerModule(torch.nn.Module):
    """An IntegerLinear between floats: x `(..., k)` -> codes, integers only, codes -> `(..., n)`.

    x, y: ranges of in- and output, in a static int8 scheme: codes of a symmetric one go down to -127 only.
    Its state is the layer's integers, both ranges and the smallest code."""

    def __init__(self, linear: IntegerLinear, x: Affine, y: Affine, scheme: Scheme = ASYMMETRIC) -> None:
        super().__init__()
        for name in ("weight", "bias", "multiplier", "shift"):
            self.register_buffer(name, getattr(linear, name))
        ranges = [float(part) for affine in (x, y) for part in (affine.scale, affine.zero)]
        self.register_buffer("ranges", torch.tensor([*ranges, scheme.smallest], dtype=torch.float32))

    @property
    def linear(self) -> IntegerLinear:
        names = ("weight", "bias", "multiplier", "shift")
        weight, bias, multiplier, shift = (cast(torch.Tensor, self._buffers[name]) for name in names)
        zeros = int(self.affine(0).zero), int(self.affine(1).zero)
        return IntegerLinear(weight, bias, multiplier, shift, *zeros)

    def affine(self, which: int) -> Affine:
        """0: of the input, 1: of the output."""
        ranges = cast(torch.Tensor, self._buffers["ranges"])
        return Affine(ranges[2 * which], ranges[2 * which + 1])

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """`(..., k)` float -> `(..., n)` int8."""
        smallest = int(cast(torch.Tensor, self._buffers["ranges"])[4])
        whole = quantize(x, ASYMMETRIC, self.affine(0)).clamp(min=smallest).to(torch.int8)
        return self.linear(whole.flatten(0, -2)).clamp(min=smallest).unflatten(0, x.shape[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.affine(1)
        return ((self.codes(x).float() - y.zero) * y.scale).to(x.dtype)


def fixed_point(real: float) -> tuple[int, int]:
    """A positive number -> M0 in [2^30, 2^31) and n, with M0 / 2^31 * 2^-n nearest to it.

    Below 2^-32, where every int32 becomes 0, -> (0, 0). Raises KernelError for numbers that are not
    positive, and from 2^31 on.
    """
    if not 0 < real < 2.0**31:
        raise KernelError(f"the multiplier {real:g} of a layer must lie above 0 and below 2^31")
    fraction, exponent = frexp(real)
    multiplier = round(fraction * 2**31)
    if multiplier == 2**31:  # the fraction rounded up to 1
        multiplier, exponent = 2**30, exponent + 1
    return (0, 0) if exponent < -31 else (multiplier, -exponent)


def requantize(acc: torch.Tensor, multiplier: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`(t, n)` int32, M0 and n `(n,)` -> acc * M, `(t, n)` int64 within int32."""
    left = acc.long() << (-shift).clamp(0, 31)
    return right_shift(high_product(left.clamp(LOW, HIGH), multiplier), shift.clamp(min=0))


def high_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Saturating rounding doubling high multiply of two int32 (any integer type) -> int64 within int32."""
    both = a.long() * b.long()
    nudge = torch.where(both >= 0, 2**30, 1 - 2**30)
    return torch.div(both + nudge, 2**31, rounding_mode="trunc").clamp(max=HIGH)


def right_shift(a: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """a / 2^n, 0 <= n <= 31, to nearest, ties away from zero; int64."""
    mask = (1 << n) - 1
    return (a >> n) + ((a & mask) > (mask >> 1) + (a < 0).long()).long()


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`(t, k)` int8, `(n, k)` int8 -> x weight^T `(t, n)` int32, exact.

    On CUDA torch's own int8 product if the shapes allow it (more than 16 rows, multiples of 8);
    else f32 products of 1024 columns, which f32 adds exactly in any order, summed as int32.
    """
    t, k = x.shape
    if x.is_cuda and t > 16 and k % 8 == 0 and weight.shape[0] % 8 == 0:
        return torch._int_mm(x, weight.T)
    total = torch.zeros(t, weight.shape[0], dtype=torch.int32, device=x.device)
    for a, b in zip(x.split(EXACT, 1), weight.split(EXACT, 1), strict=True):
        total += (a.float() @ b.float().T).to(torch.int32)
    return total
