"""AWQ's layout: int4 packed along the output in int32, for AutoAWQ's `gemm` kernels; GPTQModel,
transformers and vLLM read it.

    w (n, k) = (code - zero) * scale          one scale and zero for each row and group of columns

    <module>.qweight  i32 (k, n / 8)         codes of a row of w^T
    <module>.scales   f16 (groups, n)
    <module>.qzeros   i32 (groups, n / 8)    the zeros, packed like the codes

    bits of a word    0-3  4-7  8-11  12-15  16-19  20-23  24-27  28-31
    output            0    2    4     6      1      3      5      7         of the 8 that share it

A symmetric weight has the zero 8 everywhere. With `zero_point: false`, vLLM treats the codes as unsigned
numbers without a zero (0.33, auto_awq.py), so fewbits writes true, and `meta` records that the weight is
symmetric. The config has one group size and one kind of zero for all weights. `modules_to_not_convert` lists
names: a module whose name contains one of them stays in float, so none may be part of the name of a quantized
module.

Other versions (`gemv`, `gemv_fast`, `llm-awq`) pack along the input, or in int16. They are refused.
Source: GPTQModel 7.7, quantization/awq/utils/packing_utils.py and nn_modules/qlinear/torch_awq.py (the layout
is that of github.com/mit-han-lab/llm-awq); transformers 5.23, AwqConfig (the defaults).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.pack import pack, unpack
from ..errors import FormatError, PlanError, raise_all
from ..formats.affine import Affine
from ..formats.base import FORMATS, Format
from ..lazy import torch
from ..qtensor import QTensor
from ..version import VERSION
from .directory import (
    Array,
    Directory,
    FloatEntry,
    Place,
    QuantizedEntry,
    Shape,
    Stored,
    gathered,
    module_of,
)
from .filetype import ON_CPU
from .integers import from_integers, group_of, integer_name, integers, scale_dtype

BITS = 4
WORD = 8  # codes
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP_SIZE = 128  # default if a config has none
SYMMETRIC = "symmetric"


class AWQ(Directory):
    """int4 in groups, with and without zero points."""

    name = "awq"
    where = "an awq directory"
    method = "awq"
    engines = ("GPTQModel", "transformers+gptqmodel", "vLLM", "vLLM+cpu")
    run = Directory.run + ON_CPU

    def reason(self, format: Format) -> str | None:
        if not isinstance(format, Affine) or format.zero == "float":
            return "it holds int4 with whole zero points, columns in order"
        faults = []
        if format.bits != BITS:
            faults.append(f"{format.bits} bits")
        if format.scale_type != "f16":
            faults.append("scales that are not f16")
        if format.cells.rows != 1:
            faults.append("one scale for the whole tensor")
        return ", ".join(faults) or None

    def arrays(self, name: str, format: Format, shape: Shape) -> list[Array]:
        assert isinstance(format, Affine)
        (n, k), module = shape, module_of(name)
        group = group_of(format, k)
        if n % WORD or k % group:
            raise FormatError(
                f"{name}: AWQ's layout has whole groups of {group} columns and {WORD} rows to a word, "
                f"{n} x {k} is not whole; leave this tensor in float with a rule, or use another file type"
            )
        return [
            Array(f"{module}.qweight", "i32", (k, n // WORD)),
            Array(f"{module}.scales", format.scale_type, (k // group, n)),
            Array(f"{module}.qzeros", "i32", (k // group, n // WORD)),
        ]

    def pack(self, q: QTensor) -> tuple[torch.Tensor, ...]:
        codes, scale, zero = integers(q)
        return (
            pack(codes.T.contiguous(), BITS, torch.int32, ORDER),
            scale.T.contiguous(),
            pack(zero.T.contiguous(), BITS, torch.int32, ORDER),
        )

    def unpack(self, format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
        qweight, scales, qzeros = arrays
        codes, zero = (unpack(words, BITS, shape[0], ORDER).T.contiguous() for words in (qweight, qzeros))
        return from_integers(format, shape, codes, scales.T.contiguous(), zero)

    def settings(
        self, rows: Mapping[str, Stored], config: Mapping[str, Any], about: Mapping[str, Any]
    ) -> dict[str, Mapping[str, Any]]:
        kinds = {name: kind for name, (kind, _) in rows.items() if isinstance(kind, Format)}
        format = next(iter(kinds.values()), FORMATS.get("int4_g128_asym"))
        assert isinstance(format, Affine)
        left = [
            module_of(name)
            for name, (_, shape) in rows.items()
            if name not in kinds and len(shape) == 2 and module_of(name) != name
        ]
        raise_all(PlanError, self.name, [*_mixed(kinds), *_swallowed(left, [*map(module_of, kinds)])])
        settings = {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": format.cells.columns or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left or None,
            "meta": {"quantizer": [f"fewbits:{VERSION}"], SYMMETRIC: format.zero == "none"},
        }
        return {"config.json": {**config, "quantization_config": settings}}

    def find(
        self, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> dict[str, QuantizedEntry | FloatEntry]:
        settings = _normal(config)
        bits, group, version = settings["bits"], settings["group_size"], settings["version"]
        if bits != BITS or version != "gemm" or type(group) is not int or group == 0 or group < -1:
            faults.append(
                f"AWQ of {str(bits)[:20]} bits, group_size {str(group)[:20]}, version {str(version)[:20]!r}; "
                f"supported: {BITS} bits, group_size -1 or more, version gemm: save it as that with the tool "
                "that wrote it"
            )
            return {}
        entries: dict[str, QuantizedEntry | FloatEntry] = {}
        for key, place in places.items():
            module, shape = key.removesuffix(".qweight"), place.entry.shape
            if module == key:
                continue
            n, k = (shape[1] * WORD, shape[0]) if len(shape) == 2 else (0, 0)
            columns = None if group == -1 else group
            if 0 in (n, k) or k % (columns or k):
                faults.append(f"{module}: qweight {shape} has no whole groups of {columns} columns")
                continue
            dtype = scale_dtype(places, f"{module}.scales")
            name = integer_name(BITS, columns, settings["zero_point"], dtype)
            entries[f"{module}.weight"] = QuantizedEntry(FORMATS.get(name), (n, k))
        return entries


def _normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of AutoAWQ, transformers or GPTQModel under one set of names."""
    version = config.get("version", config.get("format", config.get("checkpoint_format", "gemm")))
    meta = config.get("meta")
    symmetric = config.get("zero_point") is False or (isinstance(meta, dict) and meta.get(SYMMETRIC) is True)
    return {
        "bits": config.get("bits", config.get("w_bit", BITS)),
        "group_size": config.get("group_size", config.get("q_group_size", GROUP_SIZE)),
        "zero_point": not symmetric,
        "version": version.lower() if isinstance(version, str) else version,
    }


def _mixed(kinds: Mapping[str, Format]) -> list[str]:
    """Each format except the most common one, with its weights."""
    given = [kind.name for kind in kinds.values()]
    common = max(given, key=given.count, default="")
    other: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        if kind.name != common:
            other.setdefault(
                f"is {kind.name}, others are {common}; an awq directory has one format for all: use gptq_v2 "
                "or native",
                [],
            ).append(name)
    return gathered(other)


def _swallowed(left: Sequence[str], quantized: Sequence[str]) -> list[str]:
    """Modules in float whose names are part of those of quantized ones."""
    names = "\n".join(quantized)
    return [
        f"{module} stays in float, but readers would also leave {longer} in float, whose name contains it; "
        "quantize it, or use gptq_v2 or native"
        for module in left
        if module in names
        for longer in [next(name for name in quantized if module in name)]
    ]


AWQ_DIRECTORY = AWQ()
