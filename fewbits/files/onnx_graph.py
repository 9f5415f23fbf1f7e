"""The ONNX graph of a decoder of the llama family, and how its weights meet their inputs there.

    input_ids (b, t) i64 -> Gather -> blocks -> norm -> output -> logits (b, t, vocabulary) f32

    block     x + o(attention(q, k, v of norm(x)));   x + down(silu(gate) * up) of norm(x)
    weight    groups: MatMulNBits(x, codes, scales[, zeros]) of com.microsoft; a row or the tensor: x times
              the transpose of DequantizeLinear(codes, scales[, zeros]); float: of the weight itself

The mask is causal, or a window's, and made inside; all tokens go through at each call: there is no input for
a mask or for a cache of keys and values. All arithmetic is f32: what is stored in f16 or bf16 passes a Cast,
which onnxruntime does once, when it loads. Grouped queries are an axis of their own: no key is repeated.
Constants of the graph lie in it; all arrays that are a tensor's lie outside, under the tensor's name.
Spec: onnx.ai/onnx/operators, opset 18; onnxruntime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import FileError, PlanError, raise_all
from ..formats.affine import Affine
from ..formats.base import FORMATS
from ..model.rope import llama3_factors, rope_parameters
from ..version import VERSION
from .layout import Kind, is_plain
from .safetensors import Entry

OPSET, IR = 18, 8  # the first with ReduceMean's axes as an input; what came with it
MODELS = ("llama", "mistral", "qwen2", "qwen3")
TYPES = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "U8": "UINT8", "I8": "INT8"}
"""dtypes of arrays, as safetensors and as ONNX name them"""
PER_BLOCK = ("q", "k", "v", "o", "gate", "up", "down")
LOWEST = float(torch.finfo(torch.float32).min)


@dataclass(frozen=True)
class Decoder:
    """What the graph needs of config.json. frequencies: of the head_dim / 2 pairs, radians a token. windows:
    of each block, tokens; None: all."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    frequencies: tuple[float, ...]
    windows: tuple[int | None, ...]
    tied: bool


def decoder_of(config: Mapping[str, Any]) -> Decoder:
    """config.json -> Decoder; PlanError lists all that this graph cannot say."""
    kind, faults = config.get("model_type"), []
    if kind not in MODELS:
        raise PlanError(
            f"an onnx file holds decoders of {', '.join(MODELS)}, not {str(kind)[:40]!r}; the nearest file "
            "types are gguf, gptq and native"
        )
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    sizes = {key: config.get(key) for key in needed}
    sizes["num_key_value_heads"] = config.get("num_key_value_heads") or sizes["num_attention_heads"]
    wrong = [f"{key} is {str(value)[:20]}" for key, value in sizes.items() if not _is_count(value)]
    raise_all(PlanError, "config.json for an onnx file", wrong)
    hidden, heads, blocks, kv_heads = (int(str(value)) for value in sizes.values())
    head_dim = config.get("head_dim") or hidden // heads
    if not _is_count(head_dim) or head_dim % 2 or heads % kv_heads:
        faults.append(
            f"{heads} heads of {str(head_dim)[:20]} with {kv_heads} keys and values are no attention"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        faults.append(f"hidden_act is {str(config['hidden_act'])[:20]!r}; the graph has silu")
    eps = config.get("rms_norm_eps", 1e-6)
    if type(eps) not in (int, float):
        faults.append(f"rms_norm_eps is {str(eps)[:20]!r}")
    rope, _ = rope_parameters(config)
    frequencies = () if faults else _frequencies(rope, int(head_dim), faults)
    windows = _windows(config, blocks, faults)
    raise_all(PlanError, "this model as an onnx file; use gguf or native", faults)
    tied = bool(config.get("tie_word_embeddings", False))
    return Decoder(hidden, heads, kv_heads, int(head_dim), float(eps), frequencies, windows, tied)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**20


def _frequencies(rope: Mapping[str, Any], dim: int, faults: list[str]) -> tuple[float, ...]:
    """Radians a token, as transformers computes them in f32."""
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        faults.append("rotary embedding of a part of each head; the graph turns all of it")
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if kind == "llama3":
        plain = plain / torch.tensor(llama3_factors(rope, dim))
    elif kind == "linear":
        plain = plain / float(rope["factor"])
    elif kind != "default":
        faults.append(f"rotary scaling {str(kind)[:20]!r}; the graph has default, linear and llama3")
    return tuple(plain.tolist())


def _windows(config: Mapping[str, Any], blocks: int, faults: list[str]) -> tuple[int | None, ...]:
    """mistral has its window in every block; qwen2 and qwen3 where layer_types say so."""
    window, types = config.get("sliding_window"), config.get("layer_types")
    if config["model_type"] == "llama" or window is None:
        return (None,) * blocks
    if not _is_count(window):
        faults.append(f"sliding_window is {str(window)[:20]!r}")
    if config["model_type"] == "mistral" and types is None:
        return (window,) * blocks
    if isinstance(types, list) and len(types) == blocks:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    if types is not None or config.get("use_sliding_window"):
        faults.append(f"sliding windows without layer_types for each of the {blocks} blocks")
    return (None,) * blocks


def check_rows(decoder: Decoder, rows: Mapping[str, Kind]) -> None:
    """PlanError with every tensor that the decoder lacks, has in another shape, or has no place for."""
    needed, optional = _shapes(decoder, rows)
    faults = [f"tensor {name!r} is missing" for name in needed if name not in rows]
    known = needed | optional
    for name, (kind, shape) in rows.items():
        if is_plain(kind) and kind.upper() not in ("F32", "F16", "BF16"):
            faults.append(f"tensor {name!r} is {kind}; the graph has f32, f16 and bf16")
        if name in known and shape != known[name]:
            faults.append(f"tensor {name!r} is {shape}, the config says {known[name]}")
        unused = name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and decoder.tied)
        if name not in known and not unused:
            faults.append(f"tensor {name!r} has no place in a decoder of the llama family")
    raise_all(PlanError, "this model as an onnx file", faults)


def _shapes(
    d: Decoder, rows: Mapping[str, Kind]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Tensors that must be there, and those that may, with their shapes."""
    vocabulary = rows.get("model.embed_tokens.weight", ("", (0,)))[1][0]
    needed: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, d.hidden)}
    needed["model.norm.weight"] = (d.hidden,)
    if not d.tied:
        needed["lm_head.weight"] = (vocabulary, d.hidden)
    optional: dict[str, tuple[int, ...]] = {}
    for i in range(len(d.windows)):
        block = f"model.layers.{i}"
        width, q, kv = d.hidden, d.heads * d.head_dim, d.kv_heads * d.head_dim
        inner = rows.get(f"{block}.mlp.up_proj.weight", ("", (0,)))[1][0]
        shapes = [(q, width), (kv, width), (kv, width), (width, q)]
        shapes += [(inner, width), (inner, width), (width, inner)]
        for part, shape in zip(PER_BLOCK, shapes, strict=True):
            module = f"{block}.{'self_attn' if len(part) == 1 else 'mlp'}.{part}_proj"
            needed[f"{module}.weight"], optional[f"{module}.bias"] = shape, shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            needed[f"{block}.{norm}.weight"] = (width,)
        optional |= {f"{block}.self_attn.{part}_norm.weight": (d.head_dim,) for part in "qk"}
    return needed, optional


class Graph:
    """Nodes in order, and the graph's own constants. An operation returns the name of its output."""

    def __init__(self, decoder: Decoder, rows: Mapping[str, Kind]):
        self.helper, self.types = onnx_helper()
        self.decoder, self.rows = decoder, rows
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._floats: dict[str, str] = {}

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        name = f"{kind}/{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(kind, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def ints(self, *values: int) -> str:
        """A list of i64."""
        return self._constant("INT64", [len(values)], values)

    def number(self, value: float) -> str:
        """A scalar f32."""
        return self._constant("FLOAT", [], [value])

    def _constant(self, kind: str, shape: Sequence[int], values: Sequence[float]) -> str:
        name = f"constant/{kind}/{len(shape)}/{'_'.join(map(str, values))[:80]}"
        self.constants[name] = self.helper.make_tensor(name, getattr(self.types, kind), shape, values)
        return name

    def frequencies(self) -> str:
        """`(1, head_dim / 2)` f32."""
        values, name = self.decoder.frequencies, "constant/frequencies"
        self.constants[name] = self.helper.make_tensor(name, self.types.FLOAT, [1, len(values)], values)
        return name

    def float(self, name: str, kind: str) -> str:
        """An array or tensor stored as `kind` (f16, say), in f32."""
        if kind.upper() == "F32":
            return name
        if name not in self._floats:
            self._floats[name] = self.op("Cast", name, to=self.types.FLOAT)
        return self._floats[name]

    def tensor(self, name: str) -> str:
        """A float tensor of the model, in f32."""
        return self.float(name, self.rows[name][0])

    def linear(self, x: str, module: str) -> str:
        """x `(..., k)` -> `(..., n)`, with the module's bias if it has one."""
        y, bias = self.times(x, f"{module}.weight"), f"{module}.bias"
        return self.op("Add", y, self.tensor(bias)) if bias in self.rows else y

    def times(self, x: str, name: str) -> str:
        """x `(..., k)` times the transpose of tensor `name` `(n, k)`."""
        kind, (n, k) = self.rows[name][0], self.rows[name][1]
        if is_plain(kind):
            return self.op("MatMul", x, self.op("Transpose", self.tensor(name), perm=[1, 0]))
        format = FORMATS.get(kind)
        assert isinstance(format, Affine)
        scale = self.float(f"{name}.scale", str(_SHORT[format.dtype]))
        parts = [f"{name}.codes", scale] + ([f"{name}.zero"] if format.zero == "int" else [])
        if format.cells.columns is None:
            w = self.op("DequantizeLinear", *parts, axis=0)
            return self.op("MatMul", x, self.op("Transpose", w, perm=[1, 0]))
        sizes = {"K": k, "N": n, "bits": format.bits, "block_size": format.cells.columns}
        return self.op("MatMulNBits", x, *parts, domain="com.microsoft", **sizes, accuracy_level=0)

    def norm(self, x: str, name: str) -> str:
        """x / sqrt(mean of its squares + eps) * weight, along the last axis."""
        square = self.op("Pow", x, self.number(2.0))
        mean = self.op("ReduceMean", square, self.ints(-1), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.number(self.decoder.eps)))
        return self.op("Mul", self.op("Div", x, root), self.tensor(name))


_SHORT = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class Positions:
    """cos, sin: `(t, head_dim / 2)`. masks, by window: `(t, t)`, 0 where row i sees column j, else LOWEST."""

    cos: str
    sin: str
    masks: Mapping[int | None, str]


def _positions(g: Graph) -> Positions:
    length = g.op("Squeeze", g.op("Slice", g.op("Shape", "input_ids"), g.ints(1), g.ints(2)), g.ints(0))
    zero, one = (g.op("Squeeze", g.ints(i), g.ints(0)) for i in (0, 1))
    place = g.op("Range", zero, length, one)
    column = g.op("Unsqueeze", place, g.ints(1))
    angle = g.op("Mul", g.op("Cast", column, to=g.types.FLOAT), g.frequencies())
    behind = g.op("Sub", column, g.op("Unsqueeze", place, g.ints(0)))
    seen = g.op("GreaterOrEqual", behind, zero)
    masks: dict[int | None, str] = {}
    for window in dict.fromkeys(g.decoder.windows):
        near = seen if window is None else g.op("And", seen, g.op("Less", behind, g.ints(window)))
        masks[window] = g.op("Where", near, g.number(0.0), g.number(LOWEST))
    return Positions(g.op("Cos", angle), g.op("Sin", angle), masks)


def _heads(g: Graph, x: str, groups: int, norm: str) -> str:
    """`(b, t, kv_heads * groups * head_dim)` -> `(b, kv_heads, groups, t, head_dim)`, each with its norm."""
    d = g.decoder
    x = g.op("Reshape", x, g.ints(0, 0, d.kv_heads, groups, d.head_dim))
    x = g.norm(x, norm) if norm in g.rows else x
    return g.op("Transpose", x, perm=[0, 2, 3, 1, 4])


def _turned(g: Graph, x: str, at: Positions) -> str:
    """Rotary embedding: the two halves of a head are the parts of its pairs."""
    half, end, axis = g.decoder.head_dim // 2, g.decoder.head_dim, g.ints(-1)
    a = g.op("Slice", x, g.ints(0), g.ints(half), axis)
    b = g.op("Slice", x, g.ints(half), g.ints(end), axis)
    first = g.op("Sub", g.op("Mul", a, at.cos), g.op("Mul", b, at.sin))
    second = g.op("Add", g.op("Mul", b, at.cos), g.op("Mul", a, at.sin))
    return g.op("Concat", first, second, axis=-1)


def _attention(g: Graph, x: str, block: str, window: int | None, at: Positions) -> str:
    d, attention = g.decoder, f"{block}.self_attn"
    groups = d.heads // d.kv_heads
    q = _heads(g, g.linear(x, f"{attention}.q_proj"), groups, f"{attention}.q_norm.weight")
    k = _heads(g, g.linear(x, f"{attention}.k_proj"), 1, f"{attention}.k_norm.weight")
    v = _heads(g, g.linear(x, f"{attention}.v_proj"), 1, "")
    keys = g.op("Transpose", _turned(g, k, at), perm=[0, 1, 2, 4, 3])
    scores = g.op("Mul", g.op("MatMul", _turned(g, q, at), keys), g.number(d.head_dim**-0.5))
    shares = g.op("Softmax", g.op("Add", scores, at.masks[window]), axis=-1)
    mixed = g.op("Transpose", g.op("MatMul", shares, v), perm=[0, 3, 1, 2, 4])
    joined = g.op("Reshape", mixed, g.ints(0, 0, d.heads * d.head_dim))
    return g.linear(joined, f"{attention}.o_proj")


def _mlp(g: Graph, x: str, block: str) -> str:
    gate = g.linear(x, f"{block}.mlp.gate_proj")
    act = g.op("Mul", gate, g.op("Sigmoid", gate))
    return g.linear(g.op("Mul", act, g.linear(x, f"{block}.mlp.up_proj")), f"{block}.mlp.down_proj")


def decoder_graph(
    config: Mapping[str, Any], rows: Mapping[str, Kind], entries: Sequence[Entry], data: str, said: str
) -> bytes:
    """The model.onnx of these tensors, whose arrays lie in the file `data` as `entries` say.

    said: JSON, kept as metadata under "fewbits". PlanError for what the graph cannot say.
    """
    decoder = decoder_of(config)
    check_rows(decoder, rows)
    g = Graph(decoder, rows)
    table = "model.embed_tokens.weight"
    x = g.op("Gather", table, "input_ids")
    x = x if rows[table][0].upper() == "F32" else g.op("Cast", x, to=g.types.FLOAT)
    at = _positions(g)
    for i, window in enumerate(decoder.windows):
        block = f"model.layers.{i}"
        x = g.op("Add", x, _attention(g, g.norm(x, f"{block}.input_layernorm.weight"), block, window, at))
        x = g.op("Add", x, _mlp(g, g.norm(x, f"{block}.post_attention_layernorm.weight"), block))
    last = g.norm(x, "model.norm.weight")
    logits = g.times(last, table if decoder.tied else "lm_head.weight")
    g.nodes.append(g.helper.make_node("Identity", [logits], ["logits"], name="logits"))
    info, types = g.helper.make_tensor_value_info, g.types
    graph = g.helper.make_graph(
        g.nodes,
        "decoder",
        [info("input_ids", types.INT64, ["batch", "length"])],
        [info("logits", types.FLOAT, ["batch", "length", rows[table][1][0]])],
        [*g.constants.values(), *(_outside(types, entry, data) for entry in entries)],
        doc_string="All tokens go through at each call; causal mask inside; no cache of keys and values.",
    )
    opsets = [g.helper.make_opsetid("", OPSET), g.helper.make_opsetid("com.microsoft", 1)]
    model = g.helper.make_model(graph, opset_imports=opsets, ir_version=IR)
    model.producer_name, model.producer_version = "fewbits", VERSION
    g.helper.set_model_props(model, {"fewbits": said})
    return bytes(model.SerializeToString(deterministic=True))


def _outside(types: Any, entry: Entry, data: str) -> Any:
    """An initializer whose bytes lie in the file `data`."""
    kind = getattr(types, TYPES[entry.dtype])
    tensor = types(name=entry.name, data_type=kind, dims=entry.shape, data_location=types.EXTERNAL)
    for key, value in (("location", data), ("offset", entry.offset), ("length", entry.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def onnx_helper() -> tuple[Any, Any]:
    """onnx.helper and TensorProto; FileError where the package is not installed."""
    try:
        from onnx import TensorProto, helper
    except ImportError as error:
        raise FileError("ONNX files need the onnx package: pip install 'fewbits[onnx]'") from error
    return helper, TensorProto
