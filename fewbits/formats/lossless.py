"""Lossless conversion: the same values in another format. Nothing is rounded.

    value = scale * (code - zero)         int4_g32   int8_channel   q4_0   q5_0   q8_0
    value = scale * code + offset         int4_g32_asym_float   q4_1   q5_1
    mxfp4 and mxfp4_ggml                  the same blocks, their bytes in another order
    int4_g128_actorder                    int4_g128 and its equivalents, if its columns are in order

A group may be cut into smaller groups that repeat its parameters. A symmetric code may get a zero point
that is the same everywhere. An integer zero may become an offset, if -zero * scale can be stored exactly.
`convert_lossless` tries a conversion: it decodes the result and compares it with the source bit for bit.

`lossless_equivalents` lists by name the formats to try, the nearest first. Some pairs always work
(q4_0 and int4_g32); for others it depends on the values (q4_1 becomes int4_g32_asym only if every offset is a
multiple of its scale).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import FormatError
from ..lazy import torch
from ..qtensor import QTensor
from .actorder import ActOrder
from .affine import Affine
from .base import FORMATS, Format, spread
from .ggml import Ggml
from .grids import AffineGrid

_BLOCKS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")  # of 32 columns, scale and offset in f16
_MXFP4 = ("mxfp4", "mxfp4_ggml")


def lossless_equivalents(name: str) -> Iterator[str]:
    """Other formats that may represent every value of a weight in format `name`, the nearest first."""
    if name in _MXFP4:
        yield from (other for other in _MXFP4 if other != name)
        return
    inner = FORMATS.get(name).ordered
    if inner is not None:
        yield inner.name
        yield from lossless_equivalents(inner.name)
        return
    bits, columns, has_offset = _shape_of(FORMATS.get(name))
    if not bits:
        return
    source = FORMATS.get(name)
    zeros = isinstance(source, Affine) and source.zero == "int"
    blocks = [b for b in _BLOCKS if _shape_of(FORMATS.get(b))[0] == bits]
    blocks = blocks[::-1] if zeros else blocks
    groups: list[int | None] = [columns]
    groups += [g for g in (256, 128, 64, 32, 16) if not columns or (g < columns and columns % g == 0)]
    for group in groups:
        same = "channel" if group is None else f"g{group}"
        kinds = ("", "_asym", "_asym_float")
        kinds = kinds[::-1] if has_offset else ("_asym", "_asym_float", "") if zeros else kinds
        names = [f"int{bits}_{same}{kind}{dtype}" for dtype in ("", "_f32", "_bf16") for kind in kinds]
        names += blocks if group == 32 else []
        yield from (FORMATS.get(other).name for other in names if FORMATS.get(other).name != name)


def holders(name: str) -> str:
    """For people: a format, and the GGUF types that may hold all of its values."""
    return " or ".join([name, *(other for other in lossless_equivalents(name) if other in _BLOCKS)])


def convert_lossless(q: QTensor, to: Format) -> QTensor | None:
    """The weight in format `to`, if that decodes to the same f32 numbers bit for bit; otherwise None."""
    if q.format == to:
        return q
    if isinstance(q.format, ActOrder):
        plain, index = q.format.without_index(q)
        return convert_lossless(plain, to) if q.format.in_order(index) else None
    if isinstance(to, ActOrder):
        inner = convert_lossless(q, to.plain)
        return None if inner is None else to.arranged(inner, torch.arange(q.shape[1]))
    try:
        to.check_shape(q.shape[0], q.shape[1], "weight")
    except FormatError:
        return None
    converted = _mxfp4(q, to) if {q.format.name, to.name} == set(_MXFP4) else _affine(q, to)
    if converted is None or not torch.equal(converted.decode(), q.decode()):
        return None
    return converted


def _shape_of(format: Format) -> tuple[int, int | None, bool]:
    """-> bits, columns of a group (None: a row), and whether the format has an offset. bits is 0 for
    formats of another kind."""
    if isinstance(format, Affine) and format.cells.rows == 1:
        return format.bits, format.cells.columns, format.zero == "float"
    if isinstance(format, Ggml) and format.name in _BLOCKS:
        return format.top.bit_length(), format.group, format.kind == "affine"
    return 0, None, False


def _affine(q: QTensor, to: Format) -> QTensor | None:
    if not _shape_of(q.format)[0] or not _shape_of(to)[0]:
        return None
    k = q.shape[1]
    grid, codes = q.format.unpack(q)
    source = grid if isinstance(grid, AffineGrid) else grid.meaning
    width = _shape_of(to)[1] or k
    here = torch.arange(-(-k // width)) * width // source.group  # the source's group of each new one
    scale = source.scale[:, here].contiguous()
    offset = None if source.offset is None else source.offset[:, here]
    zero = torch.full_like(scale, source.zero) if isinstance(source.zero, int) else source.zero[:, here]
    if offset is not None:
        zero = torch.where(scale == 0, 0.0, -offset / torch.where(scale == 0, 1.0, scale)).round()
    if _shape_of(to)[2]:
        return _packed(to, scale, -zero * scale if offset is None else offset, codes, k)
    top = (1 << _shape_of(to)[0]) - 1
    wanted = zero.clamp(0, top) if isinstance(to, Affine) and to.zero == "int" else (top + 1) // 2
    level = codes.float() - spread(zero, width, slice(None), k)
    level = torch.where(spread(scale, width, slice(None), k) == 0, 0.0, level)
    code = level + (spread(wanted, width, slice(None), k) if isinstance(wanted, torch.Tensor) else wanted)
    if bool(((code < 0) | (code > top)).any()):
        return None
    return _packed(to, scale, wanted, code.to(torch.uint8), k)


def _packed(
    to: Format, scale: torch.Tensor, other: torch.Tensor | int, codes: torch.Tensor, k: int
) -> QTensor:
    """other: the offset or the zero, whichever the format `to` has."""
    if isinstance(to, Ggml):
        values = {"d": scale.reshape(-1, 1)}
        if to.kind == "affine":
            assert isinstance(other, torch.Tensor)
            values["m"] = other.reshape(-1, 1)
        return to.pack(to.grid(values, codes.shape[0], k), codes)
    assert isinstance(to, Affine)
    parameters = (scale,) if to.zero == "none" else (scale, other)
    return to.pack(to.grid(parameters, k), codes)  # type: ignore[arg-type]


def _mxfp4(q: QTensor, to: Format) -> QTensor:
    grid, codes = q.format.unpack(q)
    if isinstance(to, Ggml):
        values = {"exponent": q.planes["scale"].reshape(-1, 1).to(torch.int32)}
        return to.pack(to.grid(values, *q.shape), codes)
    scale = grid.values["exponent"].reshape(q.shape[0], -1).to(torch.uint8)
    other = to.unpack(QTensor(to, q.shape, {"codes": to.planes[0].empty(*q.shape), "scale": scale}))[0]
    return to.pack(other, codes)
