"""The bytes of a GGML block: fields in order, each with codes or block parameters.

Source: the block structs of ggml-common.h (llama.cpp). Tests compare every type bit for bit with the
dequantization of the `gguf` package. Codes are unsigned here; a grid subtracts its `zero`.

Nearly every field is a *run layout*: elements are cut into chunks of `run * 8/bits`; byte j of a
chunk holds the elements j, run + j, 2*run + j, ... of that chunk, the first in its lowest bits:

    bits=4 run=16 (Q4_0)     byte 0 = e0 | e16 << 4     byte 1 = e1 | e17 << 4   ...
    bits=2 run=32 (Q2_K)     byte 0 = e0 | e32 << 2 | e64 << 4 | e96 << 6        ...
    bits=1 run=1  (Q5_0 qh)  byte 0 = e0 | e1 << 1 | ... | e7 << 7               ...

Every field packs `(N, entries)` int32 values of N blocks into `(N, bytes)` u8 and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

from ..lazy import torch

Values: TypeAlias = "dict[str, torch.Tensor]"


class Field(Protocol):
    """One field of a block struct: bytes with some bits of one named value (or of a pair)."""

    @property
    def name(self) -> str: ...
    def pack(self, values: Values) -> torch.Tensor: ...
    def unpack(self, data: torch.Tensor, values: Values) -> None: ...
    def nbytes(self, counts: dict[str, int]) -> int: ...


def pack_runs(values: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """`(N, e)` int32 below 2^bits -> `(N, e * bits / 8)` u8."""
    per = 8 // bits
    parts = values.reshape(values.shape[0], -1, per, run)
    shifts = torch.arange(per, dtype=torch.int32, device=values.device).view(1, 1, per, 1) * bits
    return (parts << shifts).sum(2).to(torch.uint8).reshape(values.shape[0], -1)


def unpack_runs(data: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """The inverse of `pack_runs`."""
    per = 8 // bits
    parts = data.to(torch.int32).reshape(data.shape[0], -1, 1, run)
    shifts = torch.arange(per, dtype=torch.int32, device=data.device).view(1, 1, per, 1) * bits
    return ((parts >> shifts) & (2**bits - 1)).reshape(data.shape[0], -1)


@dataclass(frozen=True)
class Runs:
    """`bits` bits of `name`, from bit `shift` on, in the run layout; `flip` inverts chosen bits."""

    name: str
    bits: int
    run: int
    shift: int = 0
    flip: int = 0

    def pack(self, values: Values) -> torch.Tensor:
        part = ((values[self.name] >> self.shift) ^ self.flip) & (2**self.bits - 1)
        return pack_runs(part, self.bits, self.run)

    def unpack(self, data: torch.Tensor, values: Values) -> None:
        part = (unpack_runs(data, self.bits, self.run) ^ self.flip) << self.shift
        values[self.name] = values[self.name] | part if self.name in values else part

    def nbytes(self, counts: dict[str, int]) -> int:
        return counts[self.name] * self.bits // 8


@dataclass(frozen=True)
class Half:
    """One float16 a block, kept as f32 in `values`."""

    name: str

    def pack(self, values: Values) -> torch.Tensor:
        largest = torch.finfo(torch.float16).max
        return values[self.name].clamp(-largest, largest).to(torch.float16).view(torch.uint8).reshape(-1, 2)

    def unpack(self, data: torch.Tensor, values: Values) -> None:
        values[self.name] = data.contiguous().view(torch.float16).float()

    def nbytes(self, counts: dict[str, int]) -> int:
        return 2


@dataclass(frozen=True)
class ScaleMin6:
    """Eight 6-bit scales and eight 6-bit minimums in 12 bytes (Q4_K, Q5_K):

    bytes 0-3   scale[j]     | (scale[j+4] >> 4) << 6
    bytes 4-7   minimum[j]   | (minimum[j+4] >> 4) << 6
    bytes 8-11  scale[j+4] & 15 | (minimum[j+4] & 15) << 4
    """

    name: ClassVar[str] = "scale"

    def pack(self, values: Values) -> torch.Tensor:
        s, m = values["scale"], values["minimum"]
        first = s[:, :4] | (s[:, 4:] >> 4) << 6
        second = m[:, :4] | (m[:, 4:] >> 4) << 6
        third = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
        return torch.cat([first, second, third], 1).to(torch.uint8)

    def unpack(self, data: torch.Tensor, values: Values) -> None:
        first, second, third = data.to(torch.int32).split(4, 1)
        values["scale"] = torch.cat([first & 63, (third & 15) | (first >> 6) << 4], 1)
        values["minimum"] = torch.cat([second & 63, (third >> 4) | (second >> 6) << 4], 1)

    def nbytes(self, counts: dict[str, int]) -> int:
        return 12


@dataclass(frozen=True)
class ScaleMin4:
    """One byte a group: scale in the low nibble, minimum in the high one (Q2_K)."""

    name: ClassVar[str] = "scale"

    def pack(self, values: Values) -> torch.Tensor:
        return (values["scale"] | values["minimum"] << 4).to(torch.uint8)

    def unpack(self, data: torch.Tensor, values: Values) -> None:
        values["scale"], values["minimum"] = (data & 15).to(torch.int32), (data >> 4).to(torch.int32)

    def nbytes(self, counts: dict[str, int]) -> int:
        return counts["scale"]


@dataclass(frozen=True)
class Ternary:
    """TQ1_0: five base-3 digits a byte, stored as ceil(n * 256 / 243) so that multiplying by 3 yields
    the first digit in bits 8 and 9. Elements 0-159 are in 32 bytes, 160-239 in 16 (five digits, runs
    of 32 and 16), 240-255 in the last 4 bytes (four digits, runs of 4)."""

    name: ClassVar[str] = "code"
    parts = ((0, 160, 5, 32), (160, 240, 5, 16), (240, 256, 4, 4))

    def pack(self, values: Values) -> torch.Tensor:
        out = []
        for start, stop, digits, run in self.parts:
            part = values["code"][:, start:stop].reshape(-1, digits, run)
            powers = 3 ** torch.arange(4, 4 - digits, -1, dtype=torch.int32, device=part.device).view(
                1, digits, 1
            )
            out.append(((part * powers).sum(1) * 256 + 242) // 243)
        return torch.cat(out, 1).to(torch.uint8)

    def unpack(self, data: torch.Tensor, values: Values) -> None:
        out, at = [], 0
        for _, _, digits, run in self.parts:
            part = data[:, at : at + run].to(torch.int32).reshape(-1, 1, run)
            powers = 3 ** torch.arange(digits, dtype=torch.int32, device=data.device).view(1, digits, 1)
            out.append(((((part * powers) & 255) * 3) >> 8).reshape(data.shape[0], -1))
            at += run
        values["code"] = torch.cat(out, 1)

    def nbytes(self, counts: dict[str, int]) -> int:
        return 52
