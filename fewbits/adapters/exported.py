"""What a model's own class computes, as a program of torch.export and as an ONNX graph without weights.

    class -> empty_model -> torch.export -> torch.onnx's exporter -> ModelProto
             no weight has memory          initializers are named as parameters, so as the file's tensors

    input_ids, attention_mask[, token_type_ids]  (b, t) i64
    ->  the tensors of the class's own output: logits, or last_hidden_state[, pooler_output]

Nothing here knows an architecture. Weights have no values while the class is traced; buffers have theirs.
Source: pytorch.org/docs, torch.export and torch.onnx.export(dynamo=True).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch

from ..errors import FileError, ModelError, raise_all
from ..files.checkpoint import Checkpoint
from ..files.experts import WHOLE
from .forward import GENERATES, without_cache
from .transformers import empty_model, head_of, tensors_in

INSTALL = "the graph of an encoder is made by torch's ONNX exporter: pip install 'fewbits[onnx]'"
BATCH, LENGTH = 2, 16  # of the tokens that the class is traced with; neither size is kept


class _Outputs(torch.nn.Module):
    """A model whose output is a dictionary of its tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.no_cache = without_cache(model)

    def forward(
        self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None
    ) -> dict[str, torch.Tensor]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, **types, **self.no_cache)
        return {name: value for name, value in out.items() if isinstance(value, torch.Tensor)}


def inputs_of(model: Any) -> list[str]:
    """token_type_ids belong to a model with several types of them."""
    types = getattr(model.config, "type_vocab_size", None) or 0
    more = types > 1 and "token_type_ids" in signature(model.forward).parameters
    return ["input_ids", "attention_mask", *(["token_type_ids"] if more else [])]


def exported_program(model: Any) -> torch.export.ExportedProgram:
    """A transformers model -> its forward pass, traced; batch and length are free, parameters are called
    `model.NAME`. ModelError where torch.export cannot follow the class."""
    device = next(model.parameters()).device
    given = {name: torch.ones(BATCH, LENGTH, dtype=torch.int64, device=device) for name in inputs_of(model)}
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(
                _Outputs(model).eval(),
                (),
                given,
                dynamic_shapes=dict.fromkeys(given, free),
                strict=False,
            )
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        raise ModelError(
            f"{type(model).__name__}: torch.export cannot follow it ({type(error).__name__}: "
            f"{first[0][:200]}); a native directory holds it"
        ) from error


def graph_of(checkpoint: Checkpoint) -> Any:
    """The ONNX graph of a checkpoint: a ModelProto whose weights are named as the checkpoint's tensors and
    have no values. None for a model that generates text, whose graph needs a cache.

    FileError where the exporter is not installed, ModelError where it cannot follow the class.
    """
    if head_of(checkpoint) in GENERATES:
        return None
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise FileError(INSTALL) from error
    model = empty_model(checkpoint)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    program = exported_program(model.to("meta"))
    names = list(program.call_spec.out_spec.context)
    try:
        with _quiet():
            found = torch.onnx.export(
                program, dynamo=True, optimize=False, verbose=False,
                input_names=inputs_of(model), output_names=names,
            )  # fmt: skip
    except Exception as error:
        raise ModelError(
            f"{checkpoint.path}: torch's ONNX exporter cannot write {type(model).__name__} "
            f"({type(error).__name__}); a native directory holds it"
        ) from error
    assert found is not None
    graph = found.model.graph
    _name_weights(graph, _tensors(model, checkpoint), buffers, checkpoint)
    return _bare(found.model_proto)


def _tensors(model: Any, checkpoint: Checkpoint) -> Mapping[str, str]:
    """key of the model -> the one tensor of the checkpoint that it is."""
    made_of = tensors_in(model, checkpoint)
    whole = {
        key: next(iter(found))
        for key, found in made_of.items()
        if len(found) == 1 and next(iter(found.values())) == WHOLE and next(iter(found)) in checkpoint.tensors
    }
    tied = {key: whole[source] for key, source in model.all_tied_weights_keys.items() if source in whole}
    return tied | whole


def _name_weights(
    graph: Any, tensors: Mapping[str, str], buffers: Mapping[str, torch.Tensor], checkpoint: Checkpoint
) -> None:
    """Initializers that are weights get the checkpoint's names and leave the list; buffers get values."""
    import onnx_ir

    faults = []
    for name, value in list(graph.initializers.items()):
        key = name.removeprefix("model.")
        if key in buffers:
            value.const_value = onnx_ir.tensor(buffers[key].contiguous().numpy(), name=name)
        elif key in tensors:
            del graph.initializers[name]
            value.const_value = None
            value.name = tensors[key]
        elif value.const_value.raw.is_meta:  # constants of the class's code have values
            faults.append(f"{key} is no single tensor of the file")
    raise_all(ModelError, f"{checkpoint.path} as an onnx file; use a native directory", faults)


def _bare(model: Any) -> Any:
    """The same without records of the exporter: places in source files, shapes between nodes."""
    for each in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        for field in ("metadata_props", "value_info"):
            if hasattr(each, field):
                del getattr(each, field)[:]
        each.ClearField("doc_string")
    del model.graph.value_info[:]
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the exporter's log and advice for its own authors."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
