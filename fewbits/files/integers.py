"""Integer weights as codes, scales and zeros, shared by the layouts of int2 to int8.

    w (n, k) = (code - zero) * scale        codes (n, k) u8, scales and zeros (n, groups)

A symmetric format stores no zero: its codes are offset by 2^(bits-1), which is the zero of every group.
A format in act order also has the group of each column; codes stay at the position of their column.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from ..core.pack import pack, unpack
from ..errors import FormatError
from ..formats.actorder import INDEX, SUFFIX, ActOrder
from ..formats.affine import Affine
from ..formats.base import SCALE_TYPES, Format
from ..lazy import torch
from ..qtensor import QTensor
from .directory import Place


def plain_of(format: Format) -> Format:
    """The format of the same groups with columns in order: itself, except for one in act order."""
    return format.ordered or format


def integers(q: QTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight of int{2..8}, with or without integer zeros -> codes `(n, k)` u8, scales `(n, g)` as
    stored, zeros `(n, g)` u8."""
    format = plain_of(q.format)
    assert isinstance(format, Affine)
    codes, scale = unpack(q.planes["codes"], format.bits, q.shape[1]), q.planes["scale"]
    if format.zero == "int":
        return codes, scale, unpack(q.planes["zero"], format.zero_bits, scale.shape[1])
    return codes, scale, torch.full(scale.shape, 1 << (format.bits - 1), dtype=torch.uint8)


def index_of(q: QTensor) -> torch.Tensor:
    """The group of each column of a weight, `(k,)` i32."""
    if INDEX in q.planes:
        return q.planes[INDEX][0]
    return (torch.arange(q.shape[1]) // group_of(q.format, q.shape[1])).to(torch.int32)


def from_integers(
    format: Format,
    shape: tuple[int, int],
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    index: torch.Tensor | None = None,
) -> QTensor:
    """The inverse of `integers` and `index_of`; FormatError if a symmetric format gets a zero
    other than its own."""
    if isinstance(format, ActOrder):
        assert index is not None
        return format.with_index(from_integers(format.plain, shape, codes, scale, zero), index)
    assert isinstance(format, Affine)
    planes = {"codes": pack(codes, format.bits), "scale": scale}
    if format.zero == "int":
        planes["zero"] = pack(zero, format.zero_bits)
        return QTensor(format, shape, planes)
    half = 1 << (format.bits - 1)
    wrong = zero[zero != half]
    if len(wrong):
        raise FormatError(
            f"{len(wrong)} of {zero.numel()} zero points are not {half}, such as {int(wrong[0])}, where the "
            "settings say symmetric; they are wrong, or of another version of the layout (one off: gptq and "
            "gptq_v2 are taken for each other)"
        )
    return QTensor(format, shape, planes)


@cache
def in_order(k: int, columns: int) -> tuple[int, ...]:
    """The group of each of k columns in order: 0, 0 ... 1, 1 ..."""
    return tuple(column // columns for column in range(k))


def group_of(format: Format, k: int) -> int:
    """Number of columns that share a scale."""
    plain = plain_of(format)
    assert isinstance(plain, Affine)
    return plain.cells.columns or k


def integer_name(
    bits: int, columns: int | None, zero: bool, dtype: str = "f16", ordered: bool = False
) -> str:
    """The format's name: `int4_g128_asym`; columns None: a row. ordered: in act order."""
    group = "channel" if columns is None else f"g{columns}"
    kind = f"{'_asym' if zero else ''}{SUFFIX if ordered else ''}"
    return f"int{bits}_{group}{kind}{'' if dtype == 'f16' else '_' + dtype}"


def scale_dtype(places: Mapping[str, Place], key: str) -> str:
    """`f16`, `bf16` or `f32`: of a file's scales; f16 if they have another type."""
    dtype = places[key].entry.dtype.lower() if key in places else ""
    return dtype if dtype in SCALE_TYPES else "f16"
