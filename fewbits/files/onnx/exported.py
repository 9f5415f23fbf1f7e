"""The ONNX graph of an exporter, with packed weights in the place of floats.

    Transpose(w), MatMul(x, .)   ->   the product of nodes.py
    Gemm(x, w, b), transB        ->   the same, Add b
    any other use of w           ->   w in floats: a Cast, or DequantizeLinear (int8 of a row or the tensor)

The graph names its weights as the file's tensors and has no values for them; which node reads a weight says
how it is multiplied, so no architecture is known here. Weights in groups are read by products alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ...errors import PlanError, raise_all
from ...formats.base import Format
from ...storage.safetensors import Entry
from ...version import VERSION
from ..directory import Stored
from .nodes import Nodes, outside


def rewritten(
    model: Any,
    rows: Mapping[str, Stored],
    entries: Sequence[Entry],
    data: str,
    metadata: str,
    integer: Collection[str] = (),
) -> bytes:
    """The model.onnx of these tensors, whose arrays are in the file `data` at `entries`.

    model: the exporter's ModelProto, which is not changed. integer: the weights whose input gets 8 bits.
    metadata: JSON, stored as "fewbits". PlanError lists the weights that no product reads.
    """
    faults = [
        f"tensor {name!r} is {kind.name}; the graph has f32, f16 and bf16"
        for name, (kind, _) in rows.items()
        if not isinstance(kind, Format) and not kind.weight and _used(model, name)
    ]
    raise_all(PlanError, "this model as an onnx file", faults)
    nodes = Nodes(rows, integer)
    _rewrite(model.graph.node, nodes)
    made = type(model)()
    made.CopyFrom(model)
    graph = made.graph
    del graph.node[:]
    graph.node.extend(nodes.nodes)
    graph.initializer.extend([*nodes.constants.values(), *(outside(nodes.types, e, data) for e in entries)])
    made.opset_import.append(nodes.helper.make_opsetid("com.microsoft", 1))
    made.producer_name, made.producer_version = "fewbits", VERSION
    nodes.helper.set_model_props(made, {"fewbits": metadata})
    return bytes(made.SerializeToString(deterministic=True))


def _used(model: Any, name: str) -> bool:
    return any(name in node.input for node in model.graph.node)


def _rewrite(graph: Sequence[Any], nodes: Nodes) -> None:
    """The nodes of a graph -> `nodes`, with its weights packed."""
    turned = {}  # the output of a Transpose -> its weight
    for node in graph:
        if node.op_type == "Transpose" and node.input[0] in nodes.rows and _field(node, "perm") == [1, 0]:
            turned[node.output[0]] = node.input[0]
    faults = []
    for node in graph:
        weight = _weight(node, nodes, turned)
        if weight is not None:
            _product(node, weight, nodes)
        elif node.output[0] not in turned:
            copy = type(node)()
            copy.CopyFrom(node)
            for i, name in enumerate(node.input):
                read = turned.get(name, name)
                if read not in nodes.rows:
                    continue
                if nodes.grouped(read):
                    faults.append(f"{read} in groups is read by {node.op_type}, not by a product")
                    continue
                whole = nodes.tensor(read)
                copy.input[i] = whole if read == name else nodes.op("Transpose", whole, perm=[1, 0])
            nodes.nodes.append(copy)
    raise_all(PlanError, "this model as an onnx file; keep these weights in float, by a rule", faults)


def _weight(node: Any, nodes: Nodes, turned: Mapping[str, str]) -> str | None:
    """The weight `(n, k)` by whose transpose a node multiplies its input."""
    if node.op_type == "MatMul":
        return turned.get(node.input[1])
    plain = all(_field(node, name) in (None, 1.0) for name in ("alpha", "beta"))
    if node.op_type == "Gemm" and plain and _field(node, "transB") == 1 and not _field(node, "transA"):
        return node.input[1] if node.input[1] in nodes.rows else None
    return None


def _product(node: Any, weight: str, nodes: Nodes) -> None:
    x, bias, output = node.input[0], [name for name in node.input[2:] if name], node.output[0]
    if not bias:
        nodes.times(x, weight, output)
        return
    added = nodes.tensor(bias[0]) if bias[0] in nodes.rows else bias[0]
    nodes.op("Add", nodes.times(x, weight), added, output=output)


def _field(node: Any, name: str) -> Any:
    """An attribute's value; None if it is not set."""
    for each in node.attribute:
        if each.name == name:
            return list(each.ints) or (each.f if each.type == each.FLOAT else each.i)
    return None
