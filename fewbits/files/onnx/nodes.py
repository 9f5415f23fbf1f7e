"""The nodes of an ONNX graph around stored weights: constants, floats in f32, products with packed weights.

    groups               MatMulNBits(x, codes, scales[, zeros]) of com.microsoft
    a row or the tensor  x times the transpose of DequantizeLinear(codes, scales[, zeros])
    float                x times its transpose

    a row or the tensor, with its input in 8 bits (int8_dynamic: each token of x has its own step)
        step = largest |x| / 127                 ReduceMax, Div; 1 where all of x is 0
        q = round(x / step) + 128, u8            Div, Round, Add, Cast
        y = (q - 128)(codes - zero) step scale   MatMulInteger, Cast, Mul, Mul

All other arithmetic is f32: arrays in f16 or bf16 pass a Cast, which onnxruntime evaluates once, at load, as
it does the change of codes to u8 and their transpose. Both sides of MatMulInteger are u8: with i8 on one,
processors without VNNI add pairs of products in 16 bits and saturate (12 % of the result on a random weight,
onnxruntime 1.32, AVX2); with i8 on both, it takes four times as long. Constants are stored in the graph, all
tensors in the data file under their names. Source: onnx.ai/onnx/operators; onnxruntime,
docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ...errors import FileError
from ...formats.affine import Affine
from ...formats.base import Format
from ...storage.safetensors import Entry
from ..directory import Stored

TYPES = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "U8": "UINT8", "I8": "INT8"}
TYPES |= {"I64": "INT64", "I32": "INT32", "BOOL": "BOOL"}  # of buffers that older files hold: position_ids
"""dtypes of arrays, as safetensors and as ONNX name them"""


class Nodes:
    """Nodes in order, and the graph's own constants. An operation returns the name of its output.

    rows: the stored tensors. integer: those whose input gets 8 bits."""

    def __init__(self, rows: Mapping[str, Stored], integer: Collection[str] = ()):
        self.helper, self.types = onnx_helper()
        self.rows, self.integer = rows, integer
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._made: dict[str, tuple[str, ...]] = {}

    def op(self, kind: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        name = f"{kind}/{len(self.nodes)}"
        made = self.helper.make_node(kind, inputs, [output or name], name=name, domain=domain, **attributes)
        self.nodes.append(made)
        return output or name

    def ints(self, *values: int) -> str:
        """A list of i64."""
        return self.constant("INT64", [len(values)], values)

    def whole(self, value: int, kind: str = "INT64") -> str:
        return self.constant(kind, [], [value])

    def number(self, value: float) -> str:
        """A scalar f32."""
        return self.constant("FLOAT", [], [value])

    def constant(self, kind: str, shape: Sequence[int], values: Sequence[float]) -> str:
        name = f"constant/{kind}/{len(shape)}/{'_'.join(map(str, values))[:80]}"
        self.constants[name] = self.helper.make_tensor(name, getattr(self.types, kind), shape, values)
        return name

    def float(self, name: str, kind: str) -> str:
        """An array or tensor stored as `kind` (f16, say), in f32."""
        if kind.upper() == "F32":
            return name
        if name not in self._made:
            self._made[name] = (self.op("Cast", name, to=self.types.FLOAT),)
        return self._made[name][0]

    def tensor(self, name: str) -> str:
        """A tensor of the model, in f32."""
        kind = self.rows[name][0]
        if not isinstance(kind, Format):
            return self.float(name, kind.name)
        if name not in self._made:
            self._made[name] = (self.op("DequantizeLinear", *self.arrays(name), axis=0),)
        return self._made[name][0]

    def arrays(self, name: str) -> list[str]:
        """codes, scale in f32[, zero] of a quantized weight."""
        format = self.rows[name][0]
        assert isinstance(format, Affine)
        scale = self.float(f"{name}.scale", format.scale_type.upper())
        return [f"{name}.codes", scale] + ([f"{name}.zero"] if format.zero == "int" else [])

    def grouped(self, name: str) -> bool:
        """Whether scales belong to groups of columns."""
        format = self.rows[name][0]
        return isinstance(format, Affine) and format.cells.columns is not None

    def times(self, x: str, name: str, output: str = "") -> str:
        """x `(..., k)` times the transpose of tensor `name` `(n, k)`."""
        format, (n, k) = self.rows[name][0], self.rows[name][1]
        if self.grouped(name):
            assert isinstance(format, Affine)
            sizes: dict[str, Any] = {"K": k, "N": n, "bits": format.bits, "block_size": format.cells.columns}
            return self.op(
                "MatMulNBits", x, *self.arrays(name), domain="com.microsoft", output=output,
                **sizes, accuracy_level=0,
            )  # fmt: skip
        if name in self.integer:
            return self._integers(x, name, output)
        return self.op("MatMul", x, self.op("Transpose", self.tensor(name), perm=[1, 0]), output=output)

    def _integers(self, x: str, name: str, output: str) -> str:
        codes, scale, *zeros = self.arrays(name)
        if not zeros:  # code - 128 -> code
            wide = self.op("Add", self.op("Cast", codes, to=self.types.INT32), self.whole(128, "INT32"))
            codes = self.op("Cast", wide, to=self.types.UINT8)
        middle = self.whole(128, "UINT8")
        q, step = self._quantized(x)
        w = self.op("Transpose", codes, perm=[1, 0])
        sums = self.op("MatMulInteger", q, w, middle, *(zeros or [middle]))
        y = self.op("Mul", self.op("Cast", sums, to=self.types.FLOAT), step)
        return self.op("Mul", y, scale, output=output)

    def _quantized(self, x: str) -> tuple[str, str]:
        """x `(..., k)` -> codes `(..., k)` u8 and steps `(..., 1)`; made once for all that read x."""
        if (key := f"{x} in 8 bits") not in self._made:
            largest = self.op("ReduceMax", self.op("Abs", x), self.ints(-1), keepdims=1)
            empty = self.op("Equal", largest, self.number(0.0))
            step = self.op("Where", empty, self.number(1.0), self.op("Div", largest, self.number(127.0)))
            code = self.op("Add", self.op("Round", self.op("Div", x, step)), self.number(128.0))
            self._made[key] = (self.op("Cast", code, to=self.types.UINT8), step)
        code, step = self._made[key]
        return code, step


def outside(types: Any, entry: Entry, data: str) -> Any:
    """An initializer whose bytes are in the file `data`."""
    kind = getattr(types, TYPES[entry.dtype])
    tensor = types(name=entry.name, data_type=kind, dims=entry.shape, data_location=types.EXTERNAL)
    for key, value in (("location", data), ("offset", entry.offset), ("length", entry.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def onnx_helper() -> tuple[Any, Any]:
    """onnx.helper and TensorProto; FileError if the package is not installed."""
    try:
        from onnx import TensorProto, helper
    except ImportError as error:
        raise FileError("ONNX files need the onnx package: pip install 'fewbits[onnx]'") from error
    return helper, TensorProto
