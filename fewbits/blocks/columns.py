"""What a model hands from block to block, as columns beside its hidden states.

    (b, t, c)    | hidden states | token ids | what earlier blocks handed on |

Most blocks read hidden states `(b, t, h)` alone. Others read token ids, copies of the embeddings, keys and
values of an earlier block, or have several streams of hidden states. All of that lies in one tensor with a
row for each token, so that whoever keeps, splits or compares hidden states need not know.

Integers are three digits of base 256, which bf16 holds exactly, times 2^-24, which no norm notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..errors import ModelError

PROBES = ((2, 5), (3, 7))  # (b, t) of two passes, whose shapes tell which sides of a tensor follow them
_DIGITS, _SCALE, _UNUSED = 3, 2.0**-24, -(2**23)


@dataclass(frozen=True)
class Extent:
    """The shape of a tensor for any b and t. sides: each as (factor, whether times b, whether times t)."""

    sides: tuple[tuple[int, bool, bool], ...]
    dtype: torch.dtype

    @staticmethod
    def of(first: torch.Tensor, second: torch.Tensor) -> Extent | None:
        """From the same tensor in the passes of PROBES; None where its sides are no products of b and t."""
        sides = []
        for sizes in zip(first.shape, second.shape, strict=True):
            for by_b, by_t in ((False, False), (True, False), (False, True), (True, True)):
                units = [(b if by_b else 1) * (t if by_t else 1) for b, t in PROBES]
                factors = {divmod(size, unit) for size, unit in zip(sizes, units, strict=True)}
                if len(factors) == 1 and min(factors)[1] == 0:
                    sides.append((min(factors)[0], by_b, by_t))
                    break
            else:
                return None
        return Extent(tuple(sides), first.dtype)

    def shape(self, b: int, t: int) -> tuple[int, ...]:
        return tuple(factor * (b if by_b else 1) * (t if by_t else 1) for factor, by_b, by_t in self.sides)

    def zeros(self, b: int, t: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(self.shape(b, t), dtype=self.dtype, device=device)

    def width(self, length: int) -> int:
        """Columns. length: t of the whole batch, for a second side that follows it."""
        again = max(sum(by_t for _, _, by_t in self.sides) - 1, 0)
        each = 1 if self.dtype.is_floating_point else _DIGITS
        return prod(factor for factor, _, _ in self.sides) * length**again * each

    @property
    def follows_length(self) -> bool:
        return self.width(2) != self.width(1)

    def _axes(self, b: int, t: int, length: int) -> tuple[list[int], list[int]]:
        """Sizes with b and t on sides of their own, and the order that puts them first."""
        sizes: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        rest: list[int] = []
        for factor, by_b, by_t in self.sides:
            for size, where in (
                (b, rows if by_b else None),
                (factor, rest),
                (t, positions if by_t else None),
            ):
                if where is None:
                    continue
                if where is positions and positions:
                    where, size = rest, length
                where.append(len(sizes))
                sizes.append(size)
        return sizes, [*rows, *positions, *rest]

    def to_columns(self, x: torch.Tensor, b: int, t: int, dtype: torch.dtype) -> torch.Tensor:
        """-> `(b, t, width)`. A second side along t may be shorter: the rest is marked as unused."""
        sizes, order = self._axes(b, t, t)
        if x.shape != (whole := self.shape(b, t)):
            if self.dtype.is_floating_point or any(n > size for n, size in zip(x.shape, whole, strict=True)):
                raise ModelError(f"a block handed on {tuple(x.shape)} where {whole} was expected")
            given, x = x, torch.full(whole, _UNUSED, dtype=x.dtype, device=x.device)
            x[tuple(slice(size) for size in given.shape)] = given
        x = x.reshape(sizes).permute(order)
        x = x if any(by_b for _, by_b, _ in self.sides) else x[None].expand(b, *x.shape)
        x = x if any(by_t for _, _, by_t in self.sides) else x[:, None].expand(b, t, *x.shape[1:])
        x = x.reshape(b, t, -1)
        if self.dtype.is_floating_point:
            return x.to(dtype)
        places = torch.arange(_DIGITS, device=x.device) * 8
        digits = (x.long()[..., None] >> places) & 255
        return (digits * _SCALE).to(dtype).reshape(b, t, -1)

    def from_columns(self, columns: torch.Tensor, length: int) -> torch.Tensor:
        """`(b, t, width)` -> the tensor. length: t of the whole batch."""
        b, t, _ = columns.shape
        sizes, order = self._axes(b, t, length)
        if not self.dtype.is_floating_point:
            places = 256 ** torch.arange(_DIGITS, device=columns.device)
            digits = (columns.float() / _SCALE).round().long().reshape(b, t, -1, _DIGITS)
            columns = (digits * places).sum(-1)
            columns = torch.where(columns >= 2**23, columns - 2**24, columns)
        columns = columns if any(by_t for _, _, by_t in self.sides) else columns[:, :1]
        columns = columns if any(by_b for _, by_b, _ in self.sides) else columns[:1]
        x = columns.reshape([sizes[axis] for axis in order])
        x = x.permute([order.index(axis) for axis in range(len(order))])
        shape = list(self.shape(b, t))
        if self.follows_length:
            last = max(i for i, (_, _, by_t) in enumerate(self.sides) if by_t)
            shape[last] = shape[last] // t * length
        x = x.reshape(shape)
        if self.follows_length and not self.dtype.is_floating_point:
            used = (x.reshape(-1, shape[-1])[0] != _UNUSED).sum()
            x = x[..., :used]
        return x if self.dtype.is_floating_point else x.to(self.dtype)


@dataclass(frozen=True)
class Columns:
    """Tensors side by side: what a row of hidden states holds."""

    parts: Sequence[Extent]

    def joined(self, tensors: Sequence[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
        """-> `(b, t, c)` with the dtype and device of `like`, of which b and t are too. None: zeros."""
        b, t = like.shape[:2]
        columns = [
            like.new_zeros(b, t, part.width(t)) if x is None else part.to_columns(x, b, t, like.dtype)
            for part, x in zip(self.parts, tensors, strict=True)
        ]
        return torch.cat(columns, -1)

    def length(self, width: int) -> int:
        """t of the whole batch, of which there are `width` columns."""
        fixed = sum(part.width(0) for part in self.parts)
        each = sum(part.width(1) for part in self.parts) - fixed
        return (width - fixed) // each if each else 1

    def widths(self, width: int) -> list[int]:
        return [part.width(self.length(width)) for part in self.parts]

    def part(self, packed: torch.Tensor, i: int) -> torch.Tensor:
        """Tensor i of `(b, t, c)`."""
        columns = packed.split(self.widths(packed.shape[-1]), -1)[i]
        return self.parts[i].from_columns(columns, self.length(packed.shape[-1]))
