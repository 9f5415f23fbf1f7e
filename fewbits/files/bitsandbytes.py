"""bitsandbytes' layout: NF4 and FP4 of QLoRA, and the rows of LLM.int8(), as transformers saves them.

    <module>.weight                  u8 (n * k / 2, 1)    two codes in a byte, the first in the HIGH nibble
    <module>.weight.absmax           f32 (blocks,)        of n * k / 64 blocks, running over the rows
    <module>.weight.quant_map        f32 (16,)            the levels
    <module>.weight.quant_state.bitsandbytes__nf4         u8: JSON with quant_type, blocksize, dtype, shape

    double quantization: absmax is u8, with two more arrays
    <module>.weight.nested_absmax    f32 (blocks / 256,)
    <module>.weight.nested_quant_map f32 (256,)           and nested_offset in the JSON

    <module>.weight                  i8 (n, k)            w = weight * SCB / 127
    <module>.SCB                     f32 (n,)
    <module>.weight_format           u8 ()                0: by rows, the only one that is supported

The JSON may end in spaces, which reserve the digits of the offset, because it is known only with the weight.
dtype is the type that the package decodes to; fewbits uses the model's. Blocks that continue in the next row,
and levels that are not the package's own, open as floats.

Source: bitsandbytes 0.50.2, functional.py (QuantState) and nn/modules.py; transformers 5.23, quantizers/ and
integrations/bitsandbytes.py.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from ..core.pack import unpack
from ..errors import FileError, FormatError, PlanError, raise_all
from ..formats.base import FORMATS, Format
from ..formats.codebook import (
    DYNAMIC,
    FP4,
    INT8,
    NESTED_BLOCK,
    NF4,
    DoubleQuantized,
    ScaledLevels,
    normal_name,
    per_scale,
)
from ..lazy import torch
from ..model.sites import role_of
from ..qtensor import QTensor
from ..storage.json import parse_json_object
from ..storage.safetensors import DTYPES, read_floats, read_integers
from .checkpoint import Checkpoint
from .directory import (
    Array,
    Directory,
    FloatEntry,
    Place,
    QuantizedEntry,
    Shape,
    Stored,
    module_of,
    stands,
)

LEVELS = {"nf4": NF4, "fp4": FP4}
TABLES = {  # digests of the tables that the package writes, which our formats decode with
    "nf4": "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a",
    "fp4": "b830bcf8857895e5676b8e2ce608a60bb8af9b3ce6270073e9de34814196f09c",
    "dynamic": "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
}
LARGEST = (2 - 2**-23) * 2.0**127  # of f32
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
STATE = re.compile(r"(?P<module>.+)\.weight\.quant_state\.bitsandbytes__(?P<levels>nf4|fp4)")
STATE_LIMIT = 65536  # bytes of JSON
DIGITS = 24  # longest decimal number


@dataclass(frozen=True)
class BitsAndBytes(Directory):
    """dtype: the type in which the package decodes and computes."""

    dtype: str = "float32"
    name = "bitsandbytes"
    method = "bitsandbytes"
    engines = ("transformers+bitsandbytes",)
    run = "AutoModelForCausalLM.from_pretrained({name!r})      # with bitsandbytes installed"

    def of(self, checkpoint: Checkpoint) -> BitsAndBytes:
        dtype = str(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype")))
        return replace(self, dtype=dtype) if dtype in COMPUTE_DTYPES else self

    def reason(self, format: Format) -> str | None:
        carried = isinstance(format, ScaledLevels) and format.levels in (NF4, FP4, INT8)
        return None if carried else "it holds NF4, FP4 and rows of LLM.int8()"

    def arrays(self, name: str, format: Format, shape: Shape) -> list[Array]:
        assert isinstance(format, ScaledLevels)
        n, k = shape
        if format.levels is INT8:
            module = module_of(name)
            return [
                Array(name, "i8", shape),
                Array(f"{module}.SCB", "f32", (n,)),
                Array(f"{module}.weight_format", "u8", ()),
            ]
        nested = isinstance(format, DoubleQuantized)
        blocks = n * k // format.block
        arrays = [
            Array(name, "u8", (n * k // 2, 1)),
            Array(f"{name}.absmax", "u8" if nested else "f32", (blocks,)),
            Array(f"{name}.quant_map", "f32", (16,)),
        ]
        if nested:
            arrays.append(Array(f"{name}.nested_absmax", "f32", (-(-blocks // NESTED_BLOCK),)))
            arrays.append(Array(f"{name}.nested_quant_map", "f32", (256,)))
        key = f"{name}.quant_state.bitsandbytes__{_levels(format)}"
        return [*arrays, Array(key, "u8", (len(self._state(format, shape, None)),))]

    def pack(self, q: QTensor) -> tuple[torch.Tensor, ...]:
        codes, absmax = q.planes["codes"], q.planes["absmax"].flatten()
        assert isinstance(q.format, ScaledLevels)
        if q.format.levels is INT8:
            return codes.view(torch.int8), absmax, torch.tensor(0, dtype=torch.uint8)
        arrays = [codes.reshape(-1, 1), absmax, q.format.levels.values]
        offset = None
        if isinstance(q.format, DoubleQuantized):
            arrays += [q.planes["nested_absmax"], DYNAMIC.values]
            offset = float(q.planes["offset"])
        state = self._state(q.format, q.shape, offset)
        return *arrays, torch.frombuffer(bytearray(state), dtype=torch.uint8)

    def _state(self, format: Format, shape: Shape, offset: float | None) -> bytes:
        """quant_state as JSON, of the same length for any offset."""
        state: dict[str, Any] = {"quant_type": _levels(format), "blocksize": format.block}
        state |= {"dtype": self.dtype, "shape": list(shape)}
        if not isinstance(format, DoubleQuantized):
            return json.dumps(state).encode()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0}
        room = len(json.dumps(state)) - 1 + DIGITS
        return json.dumps(state | {"nested_offset": offset}).encode().ljust(room)

    def unpack(self, format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
        n, k = shape
        assert isinstance(format, ScaledLevels)
        if format.levels is INT8:
            codes = arrays[0].view(torch.uint8)
            if bool((codes == 128).any()):
                raise FormatError(
                    "the int8 weight has codes of -128, which LLM.int8() has no use for; damaged?"
                )
            return QTensor(format, shape, {"codes": codes, "absmax": arrays[1].reshape(n, 1)})
        planes = {
            "codes": _bytes(arrays[0]).reshape(n, -1),
            "absmax": arrays[1].reshape(n, k // format.block),
        }
        if isinstance(format, DoubleQuantized):
            offset = parse_json_object(bytes(arrays[5].tolist()), "quant_state")["nested_offset"]
            planes |= {"nested_absmax": arrays[3], "offset": torch.tensor([[float(offset)]])}
        return QTensor(format, shape, planes)

    def settings(
        self, rows: Mapping[str, Stored], config: Mapping[str, Any], about: Mapping[str, Any]
    ) -> dict[str, Mapping[str, Any]]:
        by_format: dict[Format, list[str]] = {}
        for name, (kind, _) in rows.items():
            if isinstance(kind, Format):
                by_format.setdefault(kind, []).append(name)
        raise_all(PlanError, self.name, _mixture(by_format))
        format = next(iter(by_format), FORMATS.get("nf4"))
        assert isinstance(format, ScaledLevels)
        four = format.levels is not INT8
        quantized = {name for names in by_format.values() for name in names}
        matrices = [name for name, (_, shape) in rows.items() if len(shape) == 2 and module_of(name) != name]
        left = [module_of(name) for name in matrices if name not in quantized]
        if not any(role_of(name) == "output" for name in matrices):
            left.append("lm_head")  # tied to the embeddings, so not a separate tensor
        settings = {
            "quant_method": self.method,
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "bnb_4bit_quant_type": _levels(format) if four else "nf4",
            "bnb_4bit_use_double_quant": isinstance(format, DoubleQuantized),
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": left,
            "llm_int8_threshold": 6.0,
        }
        return {"config.json": {**config, "quantization_config": settings}}

    def find(
        self, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> dict[str, QuantizedEntry | FloatEntry]:
        entries: dict[str, QuantizedEntry | FloatEntry] = {}
        for key in places:
            match, module = STATE.fullmatch(key), key.removesuffix(".SCB")
            entry: QuantizedEntry | FloatEntry | None = None
            if match is not None:
                module = match["module"]
                entry = self._four_bits(module, match["levels"], config, places, faults)
            elif module != key:
                entry = self._rows(module, config, places, faults)
            if entry is not None:
                entries[f"{module}.weight"] = entry
        lost = [key for key, place in places.items() if _coded(key, place) and key not in entries]
        named = {fault.split(":")[0] for fault in faults}
        faults += [
            f"{module_of(key)}: weight is {places[key].entry.dtype}, but has no quant_state or SCB beside "
            "it; fetch the directory again"
            for key in lost
            if module_of(key) not in named
        ]
        return entries

    def _rows(
        self, module: str, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> QuantizedEntry | None:
        name, mark = f"{module}.weight", f"{module}.weight_format"
        if name not in places or len(places[name].entry.shape) != 2:
            faults.append(f"{module}: has SCB but no weight of rows; fetch the directory again")
            return None
        if config.get("load_in_4bit") or config.get("load_in_8bit") is False:
            faults.append(f"{module}: is int8, the config does not say load_in_8bit; one of them is wrong")
        n, k = places[name].entry.shape
        format = FORMATS.get("int8_absmax")
        place = places.get(mark)
        if place and (place.entry.dtype, place.entry.nbytes) == ("U8", 1) and any(read_integers(*place)):
            faults.append(
                f"{module}: weight_format is not 0, the rows; bitsandbytes itself stopped reading the "
                "others: load it with a version before 0.43 and save it again"
            )
            return None
        return QuantizedEntry(format, (n, k))

    def _four_bits(
        self,
        module: str,
        levels: str,
        config: Mapping[str, Any],
        places: Mapping[str, Place],
        faults: list[str],
    ) -> QuantizedEntry | FloatEntry | None:
        """One NF4 or FP4 weight, described by its quant_state."""
        name, before = f"{module}.weight", len(faults)
        key = f"{name}.quant_state.bitsandbytes__{levels}"
        nested = f"{name}.nested_absmax" in places
        state = _checked_state(module, levels, nested, places[key], faults)
        if not config.get("load_in_4bit", True) or config.get("load_in_8bit"):
            faults.append(
                f"{module}: is {levels}, the config does not say load_in_4bit; one of them is wrong"
            )
        if config.get("bnb_4bit_quant_type", levels) != levels:
            faults.append(
                f"{module}: is {levels}, the config says bnb_4bit_quant_type "
                f"{str(config['bnb_4bit_quant_type'])[:20]!r}; one of them is wrong"
            )
        if len(faults) > before:
            return None
        n, k = state["shape"]
        block = state["blocksize"]
        format = FORMATS.get(normal_name(levels, block, nested))
        size, blocks = n * k // 2, -(-n * k // block)
        arrays = self.arrays(name, format, (n, k))
        stored = places[name].entry if name in places else None
        if stored is not None and stored.nbytes == size and stored.dtype in DTYPES:
            # bnb_4bit_quant_storage: the same bytes under another dtype
            arrays[0] = Array(name, stored.dtype.lower(), stored.shape)
        arrays[1] = arrays[1]._replace(shape=(blocks,))
        if nested:
            arrays[3] = arrays[3]._replace(shape=(-(-blocks // NESTED_BLOCK),))
        arrays[-1] = arrays[-1]._replace(shape=places[key].entry.shape)
        entry = QuantizedEntry(format, (n, k), arrays=tuple(arrays))
        whole = all(stands(array, places) for array in arrays)
        if not whole or (k % block == 0 and _own_levels(levels, nested, arrays, places)):
            return entry  # incomplete arrays are reported when it is opened
        keys = tuple(array.key for array in arrays)
        return FloatEntry((n, k), keys, lambda parts: _decode((n, k), block, state, parts))


def _decode(
    shape: Shape, block: int, state: Mapping[str, Any], parts: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Decodes any levels, with blocks across rows, as the package does."""
    count = shape[0] * shape[1]
    codes, absmax = unpack(_bytes(parts[0]), 4, count, (1, 0)), parts[1]
    if len(parts) == 6:
        nested = parts[4][absmax.long()] * per_scale(parts[3], absmax.numel())
        absmax = nested + torch.tensor(float(state["nested_offset"]))
    return (parts[2][codes.long()] * absmax.repeat_interleave(block)[:count]).reshape(shape)


def _checked_state(module: str, levels: str, nested: bool, place: Place, faults: list[str]) -> dict[str, Any]:
    """The JSON of quant_state; faults in `faults`."""
    if place.entry.dtype != "U8" or place.entry.nbytes > STATE_LIMIT:
        faults.append(f"{module}: quant_state is no short u8 array; fetch the directory again")
        return {}
    try:
        state = parse_json_object(bytes(read_integers(*place)), f"{module}: quant_state")
    except FileError as error:
        faults.append(str(error))
        return {}
    shape, block, offset = state.get("shape"), state.get("blocksize"), state.get("nested_offset")
    problems = []
    if state.get("quant_type") != levels:
        problems.append(f"quant_type is {str(state.get('quant_type'))[:20]!r}, the key says {levels}")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and 0 < size < 2**31 for size in shape)
        or shape[0] * shape[1] % 2
    ):
        problems.append(f"shape {str(shape)[:40]} is not that of a weight [n, k]")
    if type(block) is not int or block not in BLOCKS:
        problems.append(f"blocksize {str(block)[:20]} is none of {', '.join(map(str, BLOCKS))}")
    number = isinstance(offset, int | float) and abs(offset) <= LARGEST
    if nested and (state.get("nested_blocksize") != NESTED_BLOCK or not number):
        problems.append(
            f"nested_blocksize {str(state.get('nested_blocksize'))[:20]} and nested_offset "
            f"{str(offset)[:30]} are not {NESTED_BLOCK} and a number"
        )
    if not nested and "nested_blocksize" in state:
        problems.append("it describes double quantization, but nested_absmax is missing")
    faults += [f"{module}: quant_state: {fault}; the file is damaged" for fault in problems]
    return state


def _mixture(by_format: Mapping[Format, Sequence[str]]) -> list[str]:
    """Faults that the config cannot express or transformers cannot load."""
    faults = []
    if len(by_format) > 1:
        counts = (f"{kind.name} ({names[0]} and {len(names) - 1} more)" for kind, names in by_format.items())
        faults.append(f"one model has one format, these are {', '.join(counts)}; leave the others in float")
    names = [name for names in by_format.values() for name in names]
    for what, hit in (
        ("experts", [name for name in names if ".experts." in name]),
        ("embeddings", [name for name in names if role_of(name) in ("embed", "position")]),
        (
            "tensors that are no weight of a linear module",
            [name for name in names if module_of(name) == name],
        ),
    ):
        if hit:
            faults.append(
                f"{hit[0]} and {len(hit) - 1} more: bitsandbytes quantizes linear modules, not {what}; leave "
                "them in float with a rule"
            )
    return faults


def _levels(format: Format) -> str:
    return "nf4" if getattr(format, "levels", None) is NF4 else "fp4"


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    return codes.flatten().view(torch.uint8)


def _coded(key: str, place: Place) -> bool:
    """Whether a weight has the layout of bitsandbytes."""
    dtype, shape = place.entry.dtype, place.entry.shape
    return key.endswith(".weight") and (dtype == "I8" or (dtype == "U8" and shape[1:] == (1,)))


def _own_levels(levels: str, nested: bool, arrays: Sequence[Array], places: Mapping[str, Place]) -> bool:
    """Whether the tables in the file equal those of our formats."""
    tables = [(levels, arrays[2])] + ([("dynamic", arrays[4])] if nested else [])
    return all(digest(read_floats(*places[array.key])) == TABLES[name] for name, array in tables)


def digest(values: Sequence[float]) -> str:
    """Of a table of f32. A table is known by it without torch, which takes a second or two to import."""
    return sha256(struct.pack(f"<{len(values)}f", *(value + 0.0 for value in values))).hexdigest()  # -0 is 0


BITSANDBYTES = BitsAndBytes()
