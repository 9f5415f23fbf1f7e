"""Quantization-aware training of a loaded model by anybody's loop: prepare_qat(), export().

model = AutoModelForCausalLM.from_pretrained(path)
fewbits.prepare_qat(model, "q4_0")       its linear weights become float weights that each pass rounds
Trainer(model, ...).train()
fewbits.export(model, "model.gguf")      the weights of the last pass, in any file type
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ModelError, raise_all
from ..files.checkpoint import MEMORY, Checkpoint, LazyTensor
from ..files.open import open_checkpoint
from ..formats.base import Format
from ..plan import Plan
from ..qtensor import QTensor
from ..release.receipt import Receipt
from ..runtime.load import model_checkpoint
from ..train.rounding import gap_of
from ..train.ste import LatentLinear
from .in_place import asked_for, decisions_of
from .quantize import clean
from .request import Request
from .run import run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTRIBUTE = "fewbits_training"


@dataclass(frozen=True)
class Prepared:
    """What a model was prepared for: a type, rules, and the format of each module's weight."""

    to: str | None
    plan: Plan
    formats: dict[str, Format]


@torch.no_grad()
def prepare_qat(model: PreTrainedModel, to: str | Plan, plan: Plan | None = None) -> PreTrainedModel:
    """Put fake quantization into the linear layers of a float model's blocks, in place; returns the model.

    to: a format, a llama.cpp file type, or a Plan. plan: rules that precede `to`. Each weight `(n, k)`
    becomes a parameter `latent` in f32, which every pass rounds to its format; gradients pass straight
    through. Scales and offsets are parameters too (LSQ, arXiv 1902.08153, without its factor, which Adam
    undoes). Tables and the output layer stay in float until `export`. Errors: PlanError, FormatError;
    ModelError for a model that is prepared already, or whose weights belong to modules that are no plain
    linear layers.

        >>> model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
        >>> model = fewbits.prepare_qat(model, "q4_0")
        >>> loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
        >>> loss.backward()
        >>> receipt = fewbits.export(model, out.with_suffix(".gguf"))
        >>> {row.format for row in receipt.tensors if "up_proj" in row.name}
        {'q4_0'}
    """
    if hasattr(model, ATTRIBUTE):
        raise ModelError(f"{type(model).__name__} is prepared already; export it, or load it again")
    names, checkpoint = model_checkpoint(model)
    asked, rules = asked_for(to, plan)
    formats: dict[str, Format] = {}
    faults = []
    for name, decision in decisions_of(checkpoint, asked, rules).items():
        path = names[name].removesuffix(".weight")
        module = model.get_submodule(path)
        if not isinstance(decision.kind, Format) or isinstance(module, nn.Embedding):
            continue
        if type(module) is not nn.Linear:
            faults.append(
                f"{path} is a {type(module).__name__}, no plain linear layer; leave it out by a rule"
            )
            continue
        if module.weight is model.get_input_embeddings().weight or module is model.get_output_embeddings():
            continue
        formats[path] = decision.kind
    raise_all(ModelError, type(model).__name__, faults)
    for path, format in formats.items():
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        w = module.weight.detach().float().clone()
        grid, _ = format.unpack(format.encode(w))
        model.set_submodule(path, LatentLinear(grid, w, gap_of(grid, w), module.bias))
    setattr(model, ATTRIBUTE, Prepared(asked, rules, formats))
    return model


@torch.no_grad()
def export(
    model: PreTrainedModel,
    out: str | Path,
    file: str | None = None,
    parent: str | Path | None = None,
    overwrite: bool = False,
) -> Receipt:
    """Write a model that `prepare_qat` prepared: what its linear layers multiply with, bit for bit, and the
    others as `quantize` would, rounded to nearest. The model can be trained on.

    out, file: as for `quantize`. parent: the directory whose tokenizer and side files the output gets
    (default: that which the model was loaded from). Errors: those of `convert`; ModelError for a model that
    is not prepared, or whose parent is not a directory.
    """
    prepared = getattr(model, ATTRIBUTE, None)
    if not isinstance(prepared, Prepared):
        raise ModelError(f"{type(model).__name__} is not prepared; call prepare_qat before it is trained")
    place = Path(str(parent or model.config.name_or_path))
    if not place.exists():
        raise ModelError(f"{place}: not a directory; name the parent's, which has its tokenizer (parent=...)")
    held = {path: packed(model.get_submodule(path), format) for path, format in prepared.formats.items()}
    with _plain(model, held) as (names, checkpoint):
        of_module = {names[name].removesuffix(".weight"): name for name in checkpoint.tensors}
        tensors = dict(checkpoint.tensors)
        for path, q in held.items():
            name = of_module[path]
            tensors[name] = LazyTensor(
                name, q.shape, q.format, q.nbytes, MEMORY, partial(held.__getitem__, path)
            )
        source = open_checkpoint(place)
        whole = replace(source, tensors=tensors, config=checkpoint.config, seen=checkpoint.seen)
        request = Request(to=prepared.to, plan=prepared.plan, file=file, overwrite=overwrite, requantize=True)
        receipt = run(whole, Path(out), request)
    clean(Path(out))
    return receipt


def packed(module: nn.Module, format: Format) -> QTensor:
    """The weight that a prepared module multiplies with, on the CPU."""
    assert isinstance(module, LatentLinear)
    with torch.no_grad():
        grid = module.grid_now()
        return format.pack(grid, grid.round(module.latent)).to("cpu")


@contextmanager
def _plain(model: Any, held: dict[str, QTensor]) -> Iterator[tuple[dict[str, str], Checkpoint]]:
    """Within, the model has its linear layers back, without values -> its names, and its checkpoint."""
    modules = {path: model.get_submodule(path) for path in held}
    try:
        for path, module in modules.items():
            n, k = held[path].shape
            linear = nn.Linear(k, n, bias=module.bias is not None, device="meta", dtype=torch.bfloat16)
            linear.bias = module.bias
            model.set_submodule(path, linear)
        yield model_checkpoint(model)
    finally:
        for path, module in modules.items():
            model.set_submodule(path, module)
