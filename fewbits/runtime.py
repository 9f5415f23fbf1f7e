"""A quantized model as a transformers model: its weights stay packed in memory.

    load("model.gguf")               -> any file type that fewbits opens
    quantize_model(model, "nf4")     -> a float model that is loaded already, in place

What the modules are, and what they cost, stands in adapters/packed.py.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .adapters.hf import load_packed, model_checkpoint, pack_weights
from .adapters.hub import resolve
from .adapters.register import register
from .algorithms import ALGORITHMS, NEEDS
from .errors import PlanError
from .files.base import Checkpoint
from .files.layout import is_plain
from .files.open import open_checkpoint
from .formats import FORMATS
from .jobs import chosen
from .model.archs import architecture
from .plan import Plan
from .plan.choices import Decision, check_feasible, decide, entries_of
from .plan.method import METHODS, Method
from .plan.mixtures import RECIPES
from .qtensor import QTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

register()  # so `import fewbits`, which imports this module, makes transformers read native directories


def load(
    model: str | Path | Checkpoint, dtype: torch.dtype = torch.float32, cache_dir: Path | None = None
) -> PreTrainedModel:
    """A model of any file type -> transformers model in evaluation mode, quantized weights packed.

    model: a path, a hub name, or what `fewbits.open` gives. dtype: of activations and of what is not
    quantized. Errors: FileError, ModelError.

        >>> receipt = fewbits.quantize(tiny, out, fewbits.Request(to="nf4"))
        >>> model = fewbits.load(out)
        >>> model.model.layers[0].mlp.up_proj.weight
        PackedWeight(nf4, (512, 256))
        >>> tuple(model(torch.tensor([[1, 2, 3]])).logits.shape)
        (1, 3, 600)
    """
    if not isinstance(model, Checkpoint):
        home = Path(os.environ.get("FEWBITS_CACHE", Path.home() / ".cache" / "fewbits"))
        model = open_checkpoint(resolve(str(model), cache_dir or home))
    return load_packed(model, dtype)


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel, to: str | Plan, plan: Plan | None = None, method: str = "rtn"
) -> PreTrainedModel:
    """Quantize the linear weights of a loaded model's blocks, in place; returns the model.

    to: a format, a llama.cpp file type, or a Plan (then only what its rules name). plan: rules that go before
    `to`. method: rtn or hqq, which need no text. Errors: PlanError, FormatError. Arrays that are not
    two-dimensional (fused experts) stay as they are, with a warning.

        >>> model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
        >>> model = fewbits.quantize_model(model, "int4_g128")
        >>> model.model.layers[0].mlp.up_proj.weight.nbytes * 8 / (512 * 256)
        4.125
    """
    names, checkpoint = model_checkpoint(model)
    plan = to if isinstance(to, Plan) else plan or Plan()
    decisions = _decisions(checkpoint, None if isinstance(to, Plan) else to, plan)
    found: dict[str, tuple[str, QTensor]] = {}
    for name, decision in decisions.items():
        if not is_plain(decision.format):
            weight = checkpoint.tensors[name].load()
            assert isinstance(weight, torch.Tensor)
            q = _encode(weight.cpu().float(), decision, METHODS[method])
            planes = {plane: value.to(weight.device) for plane, value in q.planes.items()}
            found[name] = (names[name], QTensor(q.format, q.shape, planes))
    fused = sorted(name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 3)
    if fused:
        warnings.warn(
            f"{len(fused)} arrays that are no matrices, such as {fused[0]}, stay in float: quantize the "
            "checkpoint instead (fewbits.quantize), which has the experts one by one",
            stacklevel=2,
        )
    return pack_weights(model, found)


def _decisions(checkpoint: Checkpoint, to: str | None, plan: Plan) -> dict[str, Decision]:
    """tensor -> what it gets; checked."""
    arch = architecture(checkpoint.config)
    arch = arch if to is not None and to.lower() in RECIPES else None
    entries = entries_of(checkpoint, arch)
    recipe = RECIPES.get((to or "").lower())
    asked = (recipe.name, None) if recipe else (None, None if to is None else FORMATS.get(to).name)
    decisions = decide(checkpoint, entries, arch, asked, plan, gguf=False)
    check_feasible(checkpoint, entries, decisions, requantize=False)
    return {source: decisions[entry.name] for entry in entries for source in entry.sources}


def _encode(w: torch.Tensor, decision: Decision, method: Method) -> QTensor:
    algorithm, options = chosen(decision.rule, method, {"search": True})
    if NEEDS[algorithm] != "nothing":
        raise PlanError(
            f"{algorithm} needs a text, which a model in memory is not given; use rtn or hqq, or "
            "fewbits.quantize on the model's directory"
        )
    return ALGORITHMS.get(algorithm)(w, FORMATS.get(decision.format), None, **options)
