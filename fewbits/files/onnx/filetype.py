"""ONNX: a model's graph, and its weights in a separate file, for onnxruntime.

    model.onnx          the graph: ours of a decoder (graph.py), or an exporter's of any model that generates
                        no text (exported.py); metadata "fewbits": {"version": 1, "tensors": {name:
                        {"format": "int4_g32", "shape": [n, k]}, ...}, "activations": its record}
    model.onnx.data     arrays, each at a multiple of 4096 bytes, so that it can be mapped
    genai_config.json   of a decoder, for onnxruntime-genai: the graph's inputs, special tokens (decoder.py)

    int4, int8 in groups      <tensor>.codes  u8 (n, groups, group * bits / 8)   first code in the low bits
      of 16 to 256 columns    <tensor>.scale  (n * groups)                       f16, bf16 or f32
      (MatMulNBits)           <tensor>.zero   u8 (n * ceil(groups * bits / 8))   without it: 2^(bits-1)
    int8 by row or tensor     <tensor>.codes  (n, k)     i8, code - 128; u8, the code, if it has a zero
      (DequantizeLinear)      <tensor>.scale  (n) or ()
                              <tensor>.zero   u8, of the scales' shape
    float                     <tensor>        unchanged

onnxruntime replaces a DequantizeLinear with zeros by its own MatMulNBits and rounds the inputs to 8 bits
there, unless the session's qdq_matmulnbits_accuracy_level is 0. All other products are in f32, but those of
int8_channel and int8_tensor with int8_dynamic activations (nodes.py).

Only directories that fewbits wrote are read, because weights in other graphs have no known names. The arrays
and the metadata are used, not the nodes: a graph without a cache, from an older fewbits, opens as well.
MatMulNBits has 4 bits since onnxruntime 1.17 and 8 since 1.22 (pull requests 17890, 24491); both tried with
1.32. Source: onnxruntime, docs/ContribOperators.md; onnx, docs/ExternalData.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar

from ...errors import FileError, PlanError, raise_all
from ...formats.affine import Affine
from ...formats.base import Format
from ...lazy import torch
from ...qtensor import QTensor
from ...storage.json import parse_json_object, read_json_object, regular_size
from ...storage.mapped import absurd
from ...storage.safetensors import DTYPES, MAX_DIMS, Entry
from ..checkpoint import Checkpoint
from ..directory import (
    Array,
    Directory,
    FloatEntry,
    Place,
    QuantizedEntry,
    Row,
    Shape,
    Stored,
    arrays_of,
    open_tensors,
)
from ..filetype import Probe
from ..huggingface import BIN, INDEX, SINGLE
from ..native import NATIVE
from ..side_files import describe_files, find_side_files
from .decoder import genai_config
from .exported import rewritten
from .graph import decoder_graph
from .nodes import TYPES, onnx_helper

VERSION = 1
GRAPH = "model.onnx"
DATA = "model.onnx.data"
GENAI = "genai_config.json"
PAGE = 4096  # bytes
GROUPS = (16, 32, 64, 128, 256)
DYNAMIC = "int8_dynamic"
GRAPH_LIMIT = 64 * 2**20  # bytes; 126 blocks take less than 2 MiB


@dataclass(frozen=True)
class Onnx(Directory):
    """int4 and int8 with or without integer zeros, in llama, mistral, qwen2 and qwen3, and in what generates
    no text. graph: the exporter's, of the latter. activations: the scheme of inputs in the blocks."""

    graph: Any = None
    activations: str | None = None
    name = "onnx"
    where = "an onnx directory"
    engines = ("onnxruntime",)
    run = "onnxruntime_genai.Model({name!r})        # or onnxruntime, with the inputs of Optimum's exports"
    library = "onnx"
    weights: ClassVar[str] = DATA
    marks = (GRAPH, GENAI)

    def recognizes(self, probe: Probe) -> bool:
        weights = (SINGLE, INDEX, BIN, f"{BIN}.index.json")
        return probe.has("config.json") and probe.has(GRAPH) and not any(map(probe.has, weights))

    def open(self, path: Path) -> Checkpoint:
        return open_onnx(path)

    def of(self, checkpoint: Checkpoint) -> Onnx:
        return replace(self, graph=checkpoint.graph())

    def with_runtime(self, activations: str | None = None, kv_cache: str | None = None) -> Onnx:
        if activations not in (None, DYNAMIC):
            raise PlanError(f"an onnx directory holds activations in {DYNAMIC}, not in {activations}")
        super().with_runtime(kv_cache=kv_cache)
        return replace(self, activations=activations)

    def reason(self, format: Format) -> str | None:
        if not isinstance(format, Affine):
            return "it holds int4 and int8, columns in order"
        bits, columns, faults = format.bits, format.cells.columns, []
        if format.zero == "float":
            faults.append("float minima")
        if bits not in (4, 8):
            faults.append(f"{bits} bits")
        if columns is None and bits != 8:
            faults.append("less than 8 bits without groups")
        if columns is not None and columns not in GROUPS:
            faults.append(f"groups other than of {', '.join(map(str, GROUPS))} columns")
        return ", ".join(faults) or None

    def arrays(self, name: str, format: Format, shape: Shape) -> list[Array]:
        assert isinstance(format, Affine)
        n, k = shape
        if format.cells.columns is None:
            cells = (n,) if format.cells.rows == 1 else ()
            codes = "i8" if format.zero == "none" else "u8"
            sizes: list[tuple[int, ...]] = [(n, k), cells, cells]
        else:
            group, codes = format.cells.columns, "u8"
            groups = -(-k // group)
            zeros = n * -(-groups * format.bits // 8)
            sizes = [(n, groups, group * format.bits // 8), (n * groups,), (zeros,)]
        parts = [("codes", codes), ("scale", format.scale_type), ("zero", "u8")]
        parts = parts if format.zero == "int" else parts[:2]
        return [
            Array(f"{name}.{part}", dtype, size) for (part, dtype), size in zip(parts, sizes, strict=False)
        ]

    def pack(self, q: QTensor) -> tuple[torch.Tensor, ...]:
        arrays = self.arrays("", q.format, q.shape)
        codes, scale = q.planes["codes"], q.planes["scale"]
        if arrays[0].dtype == "i8":
            codes = (codes ^ 128).view(torch.int8)  # code - 128, in two's complement
        elif len(arrays[0].shape) == 3:
            _, groups, blob = arrays[0].shape
            codes = torch.nn.functional.pad(codes, (0, groups * blob - codes.shape[1]))
        parts = (codes, scale, q.planes["zero"]) if len(arrays) == 3 else (codes, scale)
        return tuple(part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True))

    def unpack(self, format: Format, shape: Shape, arrays: Sequence[torch.Tensor]) -> QTensor:
        planes = {}
        for plane, part in zip(format.planes, arrays, strict=True):
            rows, columns = plane.shape(*shape)
            if part.dtype == torch.int8:
                part = part.view(torch.uint8) ^ 128
            planes[plane.name] = part.reshape(rows, -1)[:, :columns].contiguous()
        return QTensor(format, shape, planes)

    def container(self, rows: Iterable[Row]) -> tuple[bytes, list[Entry]]:
        entries, end = [], 0
        for name, dtype, shape in rows:
            nbytes = prod(shape) * DTYPES[dtype.upper()].itemsize
            entries.append(Entry(name, dtype.upper(), shape, end, nbytes))
            end += nbytes + -nbytes % PAGE
        return b"", entries

    def settings(
        self, rows: Mapping[str, Stored], config: Mapping[str, Any], about: Mapping[str, Any]
    ) -> dict[str, Mapping[str, Any] | bytes]:
        arrays = [array for name, row in rows.items() for array in arrays_of(self, name, row)]
        quantized = {
            name: {"format": kind.name, "shape": list(shape)}
            for name, (kind, shape) in rows.items()
            if isinstance(kind, Format)
        }
        integer, known = self._integer(rows, about.get("activations") or {})
        metadata = json.dumps({"version": VERSION, "tensors": quantized, **known})
        written = self.container(arrays)[1], DATA, metadata, integer
        if self.graph is not None:
            return {"config.json": config, GRAPH: rewritten(self.graph, rows, *written)}
        graph = decoder_graph(config, rows, *written)
        return {"config.json": config, GENAI: genai_config(config, rows, GRAPH), GRAPH: graph}

    def _integer(
        self, rows: Mapping[str, Stored], record: Mapping[str, Any]
    ) -> tuple[set[str], dict[str, dict[str, Any]]]:
        """The weights in blocks whose input gets 8 bits, and the record of that: all others are left.
        PlanError for formats that have no product with such an input."""
        if self.activations is None:
            return set(), {}
        inside = {
            name: kind
            for name, (kind, shape) in rows.items()
            if len(shape) == 2 and any(map(str.isdigit, name.split(".")))
        }
        left = [*record.get("left", ())]
        left += [name for name, kind in inside.items() if not isinstance(kind, Format) and name not in left]
        faults = [
            f"{name} is {kind.name}; only int8_channel and int8_tensor are multiplied by 8 bits"
            for name, kind in inside.items()
            if name not in left and not (isinstance(kind, Affine) and kind.cells.columns is None)
        ]
        raise_all(PlanError, f"activations in {self.activations} in an onnx file", faults)
        return inside.keys() - left, {"activations": {"scheme": self.activations, "left": left}}

    def find(
        self, config: Mapping[str, Any], places: Mapping[str, Place], faults: list[str]
    ) -> dict[str, QuantizedEntry | FloatEntry]:
        """config: {"tensors": the rows of the metadata "fewbits"}."""
        entries: dict[str, QuantizedEntry | FloatEntry] = {}
        for name, entry in NATIVE.find(config, places, faults).items():
            fault = self.refusal(entry.format, entry.shape) if isinstance(entry, QuantizedEntry) else None
            if fault is None:
                entries[name] = entry
            else:
                faults.append(f"tensor {name!r}: {fault}")
        return entries


ONNX = Onnx()


def open_onnx(path: Path) -> Checkpoint:
    """A directory of ours with model.onnx -> Checkpoint; FileError with every disagreement."""
    path = Path(path)
    config = read_json_object(path / "config.json")
    model = _parsed(path / GRAPH)
    records = [prop.value for prop in model.metadata_props if prop.key == "fewbits"]
    if len(records) != 1:
        raise FileError(
            f"{path / GRAPH}: was not written by fewbits; fewbits opens only its own ONNX "
            "files; give the model directory that it was made from"
        )
    index = parse_json_object(records[0].encode(), f"{path / GRAPH}: metadata 'fewbits'")
    if index.get("version") != VERSION or not isinstance(index.get("tensors"), dict):
        raise FileError(
            f"{path / GRAPH}: version {str(index.get('version'))[:40]}, this program reads {VERSION}; use "
            "the fewbits that wrote it"
        )
    places = _places(model.graph.initializer, path)
    return Checkpoint(
        path,
        ONNX,
        open_tensors(ONNX, {"tensors": index["tensors"]}, places, path / GRAPH),
        config,
        side_files=find_side_files(path),
        metadata={"activations": index["activations"]} if "activations" in index else {},
        provenance=describe_files(path, "onnx", [path / name for name in ("config.json", GRAPH, DATA)]),
    )


def _parsed(path: Path) -> Any:
    """A ModelProto without external data."""
    onnx_helper()  # its error has the pip command
    from google.protobuf.message import DecodeError
    from onnx import ModelProto

    size = regular_size(path)
    if size > GRAPH_LIMIT:
        raise FileError(
            f"{path}: {size} bytes, the limit for a graph is {GRAPH_LIMIT}; fewbits keeps weights in {DATA}"
        )
    try:
        return ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise FileError(f"{path}: not an ONNX model ({error}); fetch it again") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


def _places(tensors: Iterable[Any], path: Path) -> dict[str, Place]:
    """The external initializers, each inside the data file and without overlap; constants are in the
    graph."""
    from onnx import TensorProto

    kinds = {getattr(TensorProto, name): dtype for dtype, name in TYPES.items()}
    outside = [tensor for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL]
    faults: list[str] = []
    entries = [entry for tensor in outside if (entry := _entry(tensor, kinds, faults)) is not None]
    size, end = regular_size(path / DATA), 0
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset < end:
            faults.append(f"tensor {entry.name!r}: begins at byte {entry.offset}, another ends at {end}")
        end = max(end, entry.offset + entry.nbytes)
        if end > size:
            faults.append(f"tensor {entry.name!r}: ends at byte {end}, {DATA} has {size}; fetch it again")
    names = [entry.name for entry in entries]
    faults += [f"tensor {name!r} appears twice" for name in sorted(set(names)) if names.count(name) > 1]
    raise_all(FileError, str(path / GRAPH), faults)
    return {entry.name: Place(path / DATA, entry) for entry in entries}


def _entry(tensor: Any, kinds: Mapping[int, str], faults: list[str]) -> Entry | None:
    """An initializer -> its place; or None, with the fault appended to `faults`."""
    fields, before = {entry.key: entry.value for entry in tensor.external_data}, len(faults)
    dtype, shape = kinds.get(tensor.data_type), tuple(tensor.dims)
    if dtype is None:
        faults.append(
            f"tensor {tensor.name!r}: type {tensor.data_type}; supported: {', '.join(TYPES.values())}"
        )
    if fields.get("location") != DATA:
        faults.append(f"tensor {tensor.name!r}: lies in {fields.get('location', '')[:80]!r}, not in {DATA!r}")
    if len(shape) > MAX_DIMS or any(size < 0 for size in shape):
        faults.append(f"tensor {tensor.name!r}: shape {str(shape)[:80]} is not a list of sizes")
    where = [fields.get(key, "") for key in ("offset", "length")]
    if not all(value.isascii() and value.isdecimal() and len(value) < 20 for value in where):
        faults.append(f"tensor {tensor.name!r}: offset and length {str(where)[:80]} are no bytes")
    if dtype is None or len(faults) > before:
        return None
    nbytes, length = prod(shape) * DTYPES[dtype].itemsize, int(where[1])
    if not nbytes and absurd(shape):
        faults.append(f"tensor {tensor.name!r} is empty, and {shape}, which no tensor can have; damaged file")
        return None
    if nbytes != length:
        faults.append(f"tensor {tensor.name!r}: {dtype} {shape} needs {nbytes} bytes, its length is {length}")
        return None
    return Entry(tensor.name, dtype, shape, int(where[0]), nbytes)
