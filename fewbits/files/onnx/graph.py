"""The ONNX graph of a decoder of the llama family.

    input_ids        (b, t) i64         Gather -> blocks -> norm -> output -> logits (b, t, vocabulary) f32
    attention_mask   (b, past + t) i64  1 a token, 0 padding: no query reads its key
    position_ids     (b, t) i64         the position of a query and its key for the rotary embedding
    past_key_values.i.key, .value       (b, kv heads, past, head_dim) f32 of block i; past may be 0
    present.i.key, .value               the same with those of the t new tokens: the next call's past

    block     x + o(attention(q, k, v of norm(x)));   x + down(silu(gate) * up) of norm(x)
    weight    its product: nodes.py

Keys are stored after the rotary embedding, so a new token rotates only its own key. The distance of a key
from a query is counted in tokens of attention_mask, not in cache positions, so causality and windows do not
depend on padding. Names and axes are those of Optimum's exports, and the defaults of onnxruntime-genai.
Queries that share a key are rows of one product: no key is repeated. Spec: onnx.ai/onnx/operators, opset 18;
optimum, exporters/onnx/config.py; onnxruntime-genai, src/config.h.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...dtypes import F32
from ...storage.safetensors import Entry
from ...version import VERSION
from ..directory import Stored
from .decoder import INPUTS, TABLE, Decoder, check_rows, decoder_of, past, present
from .nodes import Nodes, outside

OPSET, IR = 18, 8  # the first with ReduceMean's axes as an input, and its IR version
LOWEST = -(2 - 2**-23) * 2.0**127  # -inf would give NaN for a row without keys
END = 2**31 - 1  # of a Slice: to the last


class Graph(Nodes):
    """The graph of a decoder."""

    def __init__(self, decoder: Decoder, rows: Mapping[str, Stored], integer: Collection[str] = ()):
        super().__init__(rows, integer)
        self.decoder = decoder

    def frequencies(self) -> str:
        """`(1, head_dim / 2)` f32."""
        values, name = self.decoder.frequencies, "constant/frequencies"
        self.constants[name] = self.helper.make_tensor(name, self.types.FLOAT, [1, len(values)], values)
        return name

    def linear(self, x: str, module: str) -> str:
        """x `(..., k)` -> `(..., n)`, with the module's bias if it has one."""
        y, bias = self.times(x, f"{module}.weight"), f"{module}.bias"
        return self.op("Add", y, self.tensor(bias)) if bias in self.rows else y

    def norm(self, x: str, name: str) -> str:
        """x / sqrt(mean of its squares + eps) * weight, along the last axis."""
        square = self.op("Pow", x, self.number(2.0))
        mean = self.op("ReduceMean", square, self.ints(-1), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.number(self.decoder.eps)))
        return self.op("Mul", self.op("Div", x, root), self.tensor(name))


@dataclass(frozen=True)
class Positions:
    """cos, sin: `(b, 1, t, head_dim / 2)`. masks, by window: `(b, 1, t, past + t)`, 0 if the query of a
    row reads the key of a column, else LOWEST."""

    cos: str
    sin: str
    masks: Mapping[int | None, str]


def _positions(g: Graph) -> Positions:
    place = g.op("Cast", g.op("Unsqueeze", "position_ids", g.ints(1, 3)), to=g.types.FLOAT)
    angle = g.op("Mul", place, g.frequencies())
    count = g.op("CumSum", "attention_mask", g.whole(1))
    length = g.op("Shape", "input_ids", start=1, end=2)
    query = g.op("Slice", count, g.op("Neg", length), g.ints(END), g.ints(1))
    behind = g.op("Sub", g.op("Unsqueeze", query, g.ints(1, 3)), g.op("Unsqueeze", count, g.ints(1, 2)))
    token = g.op("Unsqueeze", g.op("Cast", "attention_mask", to=g.types.BOOL), g.ints(1, 2))
    seen = g.op("And", g.op("GreaterOrEqual", behind, g.whole(0)), token)
    masks: dict[int | None, str] = {}
    for window in dict.fromkeys(g.decoder.windows):
        near = seen if window is None else g.op("And", seen, g.op("Less", behind, g.whole(window)))
        masks[window] = g.op("Where", near, g.number(0.0), g.number(LOWEST))
    return Positions(g.op("Cos", angle), g.op("Sin", angle), masks)


def _heads(g: Graph, x: str, heads: int, norm: str = "") -> str:
    """`(b, t, heads * head_dim)` -> `(b, heads, t, head_dim)`, each with its norm."""
    x = g.op("Reshape", x, g.ints(0, 0, heads, g.decoder.head_dim))
    x = g.norm(x, norm) if norm in g.rows else x
    return g.op("Transpose", x, perm=[0, 2, 1, 3])


def _turned(g: Graph, x: str, at: Positions) -> str:
    """Rotary embedding: the two halves of a head are the parts of its pairs."""
    half, end, axis = g.decoder.head_dim // 2, g.decoder.head_dim, g.ints(-1)
    a = g.op("Slice", x, g.ints(0), g.ints(half), axis)
    b = g.op("Slice", x, g.ints(half), g.ints(end), axis)
    first = g.op("Sub", g.op("Mul", a, at.cos), g.op("Mul", b, at.sin))
    second = g.op("Add", g.op("Mul", b, at.cos), g.op("Mul", a, at.sin))
    return g.op("Concat", first, second, axis=-1)


def _attention(g: Graph, x: str, i: int, at: Positions) -> str:
    """Of block i. In the shapes of a Reshape 0 is the size of the input's own axis, -1 the rest."""
    d, attention = g.decoder, f"model.layers.{i}.self_attn"
    q = _heads(g, g.linear(x, f"{attention}.q_proj"), d.heads, f"{attention}.q_norm.weight")
    k = _heads(g, g.linear(x, f"{attention}.k_proj"), d.kv_heads, f"{attention}.k_norm.weight")
    v = _heads(g, g.linear(x, f"{attention}.v_proj"), d.kv_heads)
    (key, value), (keys, values) = (past(i), present(i))
    keys = g.op("Concat", key, _turned(g, k, at), axis=2, output=keys)
    values = g.op("Concat", value, v, axis=2, output=values)
    sharing = g.ints(0, d.kv_heads, -1, 0)  # (b, kv heads, queries of a key, ...)
    apart = g.ints(0, d.heads, -1, 0)  # (b, heads, t, ...)
    q = g.op("Reshape", _turned(g, q, at), sharing)
    scores = g.op("MatMul", q, g.op("Transpose", keys, perm=[0, 1, 3, 2]))
    scores = g.op("Reshape", g.op("Mul", scores, g.number(d.head_dim**-0.5)), apart)
    shares = g.op("Softmax", g.op("Add", scores, at.masks[d.windows[i]]), axis=-1)
    mixed = g.op("Reshape", g.op("MatMul", g.op("Reshape", shares, sharing), values), apart)
    joined = g.op("Transpose", mixed, perm=[0, 2, 1, 3])
    return g.linear(g.op("Reshape", joined, g.ints(0, 0, d.heads * d.head_dim)), f"{attention}.o_proj")


def _mlp(g: Graph, x: str, block: str) -> str:
    gate = g.linear(x, f"{block}.mlp.gate_proj")
    act = g.op("Mul", gate, g.op("Sigmoid", gate))
    return g.linear(g.op("Mul", act, g.linear(x, f"{block}.mlp.up_proj")), f"{block}.mlp.down_proj")


def decoder_graph(
    config: Mapping[str, Any],
    rows: Mapping[str, Stored],
    entries: Sequence[Entry],
    data: str,
    metadata: str,
    integer: Collection[str] = (),
) -> bytes:
    """The model.onnx of these tensors, whose arrays are in the file `data` at `entries`.

    metadata: JSON, stored in the model's metadata as "fewbits". integer: weights whose input gets 8 bits.
    PlanError for what the graph cannot express.
    """
    decoder = decoder_of(config)
    check_rows(decoder, rows)
    g = Graph(decoder, rows, integer)
    x = g.op("Gather", TABLE, "input_ids")
    x = x if rows[TABLE][0] == F32 else g.op("Cast", x, to=g.types.FLOAT)
    at = _positions(g)
    for i in range(len(decoder.windows)):
        block = f"model.layers.{i}"
        x = g.op("Add", x, _attention(g, g.norm(x, f"{block}.input_layernorm.weight"), i, at))
        x = g.op("Add", x, _mlp(g, g.norm(x, f"{block}.post_attention_layernorm.weight"), block))
    last = g.norm(x, "model.norm.weight")
    g.op("Identity", g.times(last, TABLE if decoder.tied else "lm_head.weight"), output="logits")
    graph = g.helper.make_graph(
        g.nodes,
        "decoder",
        *_signature(g, rows[TABLE][1][0]),
        [*g.constants.values(), *(outside(g.types, entry, data) for entry in entries)],
        doc_string="The new tokens go through; keys and values of those before come in as past_key_values.",
    )
    opsets = [g.helper.make_opsetid("", OPSET), g.helper.make_opsetid("com.microsoft", 1)]
    model = g.helper.make_model(graph, opset_imports=opsets, ir_version=IR)
    model.producer_name, model.producer_version = "fewbits", VERSION
    g.helper.set_model_props(model, {"fewbits": metadata})
    return bytes(model.SerializeToString(deterministic=True))


def _signature(g: Graph, vocabulary: int) -> tuple[list[Any], list[Any]]:
    """The inputs and outputs of the graph, with their types and the names of their axes."""
    info, d, batch = g.helper.make_tensor_value_info, g.decoder, "batch_size"
    new, before, all_ = "sequence_length", "past_sequence_length", "total_sequence_length"
    lengths = zip(INPUTS, (new, all_, new), strict=True)
    inputs = [info(name, g.types.INT64, [batch, length]) for name, length in lengths]
    outputs = [info("logits", g.types.FLOAT, [batch, new, vocabulary])]
    for i in range(len(d.windows)):
        for names, length, infos in ((past(i), before, inputs), (present(i), all_, outputs)):
            shape = [batch, d.kv_heads, length, d.head_dim]
            infos += [info(name, g.types.FLOAT, shape) for name in names]
    return inputs, outputs
