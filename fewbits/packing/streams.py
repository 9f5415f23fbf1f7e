"""The bytes of a tensor as streams of like bytes, which are coded one by one.

bytes        one stream: codes of 8 bits, of 4 two to a byte, of 2 four to a byte
words2, 4    f16, bf16; f32: turned left by a bit, so that bf16's exponent is a byte; a stream for each byte
ggml:NAME    GGML blocks: the bytes of d and dmin apart, those of scales, those of codes; codes whose bits lie
             in two fields (Q3_K, Q5_K, Q6_K ...) put together, a byte each
block98 ...  blocks of so many bytes (IQ types): the two bytes of d apart, all others a stream
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..errors import FileError
from ..formats import FORMATS
from ..formats.ggml import Ggml
from ..formats.ggml_layout import Field, Half, Values

WORDS = {"f16": "words2", "bf16": "words2", "f32": "words4"}


def layout_of(kind: str) -> str:
    """The number type or GGML type of a tensor, by name -> how its bytes are split."""
    if kind in WORDS:
        return WORDS[kind]
    if _ggml(kind) is not None:
        return f"ggml:{kind}"
    format = FORMATS.get(kind) if kind in FORMATS else None
    return f"block{format.planes[0].entries}" if isinstance(format, Ggml) else "bytes"


def block_of(layout: str) -> int:
    """The bytes that belong together: a part of a tensor has whole ones."""
    return sum(part.width for part in _parts(layout))


def sizes(layout: str, nbytes: int) -> list[int]:
    """The length of each stream of so many bytes."""
    blocks, parts = nbytes // block_of(layout), _parts(layout)
    each = [size for part in parts for size in ([1] * part.width if part.apart else [part.width])
            if part.field is None]  # fmt: skip
    entries = next((part.entries for part in parts if part.field is not None), 0)
    return [blocks * size for size in [*each, *([entries] if entries else [])]]


def split(layout: str, data: torch.Tensor) -> list[torch.Tensor]:
    """`(n,)` u8, whole blocks -> streams, u8."""
    if layout.startswith("words"):
        data = _turned(data, block_of(layout), 1)
    blocks, streams = data.reshape(-1, block_of(layout)), []
    codes: Values = {}
    for part in _parts(layout):
        here = blocks[:, part.start : part.start + part.width].contiguous()
        if part.field is not None:
            part.field.unpack(here, codes)
        else:
            streams += [column.contiguous() for column in here.T] if part.apart else [here.reshape(-1)]
    return [*streams, codes["code"].to(torch.uint8).reshape(-1)] if codes else streams


def joined(layout: str, streams: list[torch.Tensor]) -> torch.Tensor:
    """The inverse of `split`."""
    parts, rest = _parts(layout), iter(streams)
    entries = next((part.entries for part in parts if part.field is not None), 0)
    codes: Values = {"code": streams[-1].view(-1, entries).to(torch.int32)} if entries else {}
    found = []
    for part in parts:
        if part.field is not None:
            found.append(part.field.pack(codes))
        elif part.apart:
            found.append(torch.stack([next(rest) for _ in range(part.width)], 1))
        else:
            found.append(next(rest).view(-1, part.width))
    data = torch.cat(found, 1).reshape(-1)
    return _turned(data, block_of(layout), 8 * block_of(layout) - 1) if layout.startswith("words") else data


@dataclass(frozen=True)
class _Part:
    """Bytes of a block. apart: a stream for each of them, else one for all. field: of codes whose bits lie in
    several fields, `entries` codes a block; these make the last stream."""

    start: int
    width: int
    apart: bool = False
    field: Field | None = None
    entries: int = 0


@cache
def _parts(layout: str) -> tuple[_Part, ...]:
    if layout == "bytes":
        return (_Part(0, 1),)
    if layout.startswith("words"):
        return (_Part(0, int(layout[5:]), apart=True),)
    if layout.startswith("block") and layout[5:].isdecimal() and int(layout[5:]) > 2:
        return (_Part(0, 2, apart=True), _Part(2, int(layout[5:]) - 2))
    format = _ggml(layout.removeprefix("ggml:"))
    if format is None:
        raise FileError(f"no layout {layout!r} is known; this file was packed by a later version")
    groups = format.block // format.group
    counts = {"code": format.block, "scale": groups, "minimum": groups, "exponent": 1}
    several = sum(field.name == "code" for field in format.fields) > 1
    found, start = [], 0
    for field in format.fields:
        width = field.nbytes(counts)
        together = field if several and field.name == "code" else None
        found.append(_Part(start, width, isinstance(field, Half), together, format.block if together else 0))
        start += width
    return tuple(found)


@cache
def _ggml(name: str) -> Ggml | None:
    """The GGML type whose struct is described field by field."""
    for each in (name, f"{name}_ggml"):
        format = FORMATS.get(each) if each in FORMATS else None
        if type(format) is Ggml and format.fields:
            return format
    return None


def _turned(data: torch.Tensor, size: int, by: int) -> torch.Tensor:
    """Words of `size` bytes, little endian, turned left by so many bits."""
    kind, bits = {2: (torch.int16, 16), 4: (torch.int32, 32)}[size]
    words = data.contiguous().view(kind).to(torch.int64) & (2**bits - 1)
    turned = (words << by | words >> (bits - by)) & (2**bits - 1)
    return torch.where(turned >= 2 ** (bits - 1), turned - 2**bits, turned).to(kind).view(torch.uint8)
