"""The arrays of compressed-tensors: conversion of our formats to them and back.

    pack-quantized       weight_packed  i32 (n, k * bits / 32)    one bit stream a row, the first code lowest
                         weight_scale   (n, groups)               in f16, bf16 or f32; (1,) for the tensor
                         weight_zero_point  i32 (n * bits / 32, groups)   packed down the rows; asymmetric
                         weight_shape   i64 (2,)
                         weight_g_idx   i32 (k,)   the group of each column; in act order, and read only
    int-quantized        weight         i8  (n, k)                weight_scale, weight_zero_point i8
    float-quantized      weight         e4m3 (n, k)               weight_scale; (n / 128, k / 128) for blocks
    nvfp4-pack-quantized weight_packed  u8  (n, k / 2)            weight_scale e4m3 (n, k / 16)
                         weight_global_scale f32 (1,)             a DIVISOR: value = e2m1 * scale / global
    mxfp4-, mxfp6-pack-  weight_packed  u8                        weight_scale u8 (n, k / 32), E8M0
    mxfp8-quantized      weight         e4m3 (n, k)               weight_scale u8 (n, k / 32)

Integers are signed in the package and stored with 2^(bits-1) added, also zero points, which gives our codes
and zeros. pack-quantized truncates a row to ceil(k * bits / 32) words. Our NVFP4 multiplies by its global
scale, so the file stores the reciprocal. A global scale that differs from the reciprocal of its reciprocal is
an error. Source: compressed-tensors 0.20, compressors/.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from ...core.pack import cell, pack, unpack
from ...errors import FormatError
from ...formats.actorder import ActOrder
from ...formats.affine import Affine
from ...formats.base import Format
from ...formats.floats import Microscaling
from ...lazy import torch
from ...qtensor import QTensor
from ..directory import Shape
from ..integers import from_integers, integers
from .config import BYTES, FLOAT, METHOD, MICROSCALED, PACKED, TWO_LEVELS, scale_dtype

Part = tuple[str, str, tuple[int, ...]]


def _scales(format: Format, shape: Shape) -> tuple[int, ...]:
    """The shape of weight_scale: our plane's, or (1,) for the whole tensor."""
    size = next(plane.shape(*shape) for plane in format.planes if plane.name == "scale")
    return (1,) if format.cells.rows is None else size  # type: ignore[attr-defined]


def _whole_groups(format: Format, shape: Shape, name: str) -> None:
    columns = format.cells.columns  # type: ignore[attr-defined]
    if columns and shape[1] % columns and format.cells.rows == 1:  # type: ignore[attr-defined]
        raise FormatError(
            f"{name}: {shape[1]} columns are not whole groups of {columns}, which {METHOD} needs; leave this "
            "tensor in float with a rule, or use a format whose groups divide it"
        )


def _packed_arrays(format: Format, shape: Shape, name: str) -> list[Part]:
    if isinstance(format, ActOrder):
        return [*_packed_arrays(format.plain, shape, name), ("weight_g_idx", "i32", (shape[1],))]
    assert isinstance(format, Affine)
    _whole_groups(format, shape, name)
    scale, (n, k) = _scales(format, shape), shape
    parts: list[Part] = [
        ("weight_packed", "i32", (n, ceil(k * format.bits / 32))),
        ("weight_scale", format.scale_type, scale),
    ]
    if format.zero == "int" and format.cells.rows is None:
        parts.append(("weight_zero_point", "i8", scale))
    elif format.zero == "int":
        parts.append(("weight_zero_point", "i32", (ceil(n * format.bits / 32), scale[1])))
    return [*parts, ("weight_shape", "i64", (2,))]


def _pack_integers(q: QTensor) -> tuple[torch.Tensor, ...]:
    assert isinstance(q.format, Affine)
    codes, scale, zero = integers(q)
    bits = q.format.bits
    parts = [_words(codes, bits), scale.reshape(_scales(q.format, q.shape))]
    if q.format.zero == "int" and q.format.cells.rows is None:
        parts.append(_signed(zero, bits).reshape(1))
    elif q.format.zero == "int":
        parts.append(_words(zero.T.contiguous(), bits).T.contiguous())
    return (*parts, torch.tensor(q.shape, dtype=torch.int64))


def _unpack_integers(format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
    if isinstance(format, ActOrder):
        return format.with_index(_unpack_integers(format.plain, shape, arrays[:-1]), arrays[-1])
    assert isinstance(format, Affine)
    (n, k), bits = shape, format.bits
    codes, scale = _codes(arrays[0], bits, k), arrays[1].reshape(-1, arrays[1].shape[-1])
    zero = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8)
    if format.zero == "int" and format.cells.rows is None:
        zero = _unsigned(arrays[2], bits).reshape(1, 1)
    elif format.zero == "int":
        zero = _codes(arrays[2].T.contiguous(), bits, n).T.contiguous()
    return from_integers(format, shape, codes, scale, zero)


def _byte_arrays(format: Format, shape: Shape, name: str) -> list[Part]:
    assert isinstance(format, Affine)
    _whole_groups(format, shape, name)
    scale = _scales(format, shape)
    parts: list[Part] = [("weight", "i8", shape), ("weight_scale", format.scale_type, scale)]
    return [*parts, ("weight_zero_point", "i8", scale)] if format.zero == "int" else parts


def _pack_bytes(q: QTensor) -> tuple[torch.Tensor, ...]:
    assert isinstance(q.format, Affine)
    (codes, scale, zero), size = integers(q), _scales(q.format, q.shape)
    parts = (_signed(codes, q.format.bits), scale.reshape(size))
    return (*parts, _signed(zero, q.format.bits).reshape(size)) if q.format.zero == "int" else parts


def _unpack_bytes(format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
    assert isinstance(format, Affine)
    scale = arrays[1].reshape(-1, arrays[1].shape[-1])
    zero = torch.full(scale.shape, 1 << (format.bits - 1), dtype=torch.uint8)
    if format.zero == "int":
        zero = _unsigned(arrays[2], format.bits).reshape(scale.shape)
    return from_integers(format, shape, _unsigned(arrays[0], format.bits), scale, zero)


def _float_arrays(format: Format, shape: Shape, name: str) -> list[Part]:
    _whole_groups(format, shape, name)
    return [
        ("weight", "f8_e4m3", shape),
        ("weight_scale", scale_dtype(format), _scales(format, shape)),
    ]


def _pack_floats(q: QTensor) -> tuple[torch.Tensor, ...]:
    return q.planes["codes"].view(torch.float8_e4m3fn), q.planes["scale"].reshape(_scales(q.format, q.shape))


def _unpack_floats(format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
    scale = arrays[1].reshape(-1, arrays[1].shape[-1])
    return QTensor(format, shape, {"codes": arrays[0].view(torch.uint8), "scale": scale})


def _two_level_arrays(format: Format, shape: Shape, name: str) -> list[Part]:
    format.check_shape(*shape, name)
    n, k = shape
    return [
        ("weight_packed", "u8", (n, k // 2)),
        ("weight_scale", "f8_e4m3", (n, k // format.block)),
        ("weight_global_scale", "f32", (1,)),
    ]


def _pack_two_levels(q: QTensor) -> tuple[torch.Tensor, ...]:
    scale = q.planes["global_scale"]
    divisor = 1 / scale
    if not torch.equal(1 / divisor, scale):
        raise FormatError(
            f"the global scale {float(scale):.9g} is not the reciprocal of an f32, and {METHOD} stores the "
            f"reciprocal; {float(1 / divisor):.9g} is the nearest: quantize the float model again"
        )
    return q.planes["codes"], q.planes["scale"].view(torch.float8_e4m3fn), divisor.reshape(1)


def _unpack_two_levels(format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
    packed, scale, divisor = arrays
    planes = {"codes": packed, "scale": scale.view(torch.uint8), "global_scale": 1 / divisor.reshape(1, 1)}
    return QTensor(format, shape, planes)


def _microscaled_arrays(format: Format, shape: Shape, name: str) -> list[Part]:
    assert isinstance(format, Microscaling)
    format.check_shape(*shape, name)
    n, k = shape
    bits = format.element.bits
    codes: Part = ("weight", "f8_e4m3", shape)
    if bits < 8:
        codes = ("weight_packed", "u8", (n, k * bits // 8))
    return [codes, ("weight_scale", "u8", (n, k // format.block))]


def _pack_microscaled(q: QTensor) -> tuple[torch.Tensor, ...]:
    codes = q.planes["codes"]
    return codes.view(torch.float8_e4m3fn) if codes.shape == q.shape else codes, q.planes["scale"]


def _unpack_microscaled(format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
    return QTensor(format, shape, {"codes": arrays[0].view(torch.uint8), "scale": arrays[1]})


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`(r, k)` u8 -> `(r, ceil(k * bits / 32))` i32: whole cells, without words that have no code."""
    return pack(codes, bits, torch.int32)[:, : ceil(codes.shape[1] * bits / 32)].contiguous()


def _codes(words: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """The inverse of `_words`."""
    count, of_cell = cell(bits, torch.int32)
    lacking = ceil(k / count) * of_cell - words.shape[1]
    return unpack(torch.nn.functional.pad(words, (0, lacking)), bits, k)


def _signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _unsigned(values: torch.Tensor, bits: int) -> torch.Tensor:
    codes = values.to(torch.int16) + (1 << (bits - 1))
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits:
        raise FormatError(f"values {int(values.min())} ... {int(values.max())} are no {bits}-bit integers")
    return codes.to(torch.uint8)


_MX = tuple(MICROSCALED.values())
ARRAYS = {PACKED: _packed_arrays, BYTES: _byte_arrays, FLOAT: _float_arrays, TWO_LEVELS: _two_level_arrays}
ARRAYS |= dict.fromkeys(_MX, _microscaled_arrays)
PACK = {PACKED: _pack_integers, BYTES: _pack_bytes, FLOAT: _pack_floats, TWO_LEVELS: _pack_two_levels}
PACK |= dict.fromkeys(_MX, _pack_microscaled)
UNPACK = {
    PACKED: _unpack_integers,
    BYTES: _unpack_bytes,
    FLOAT: _unpack_floats,
    TWO_LEVELS: _unpack_two_levels,
}
UNPACK |= dict.fromkeys(_MX, _unpack_microscaled)
