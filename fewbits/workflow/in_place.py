"""quantize_model(): the linear weights of a float model that is loaded already, in place."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from ..algorithms import ALGORITHMS, NEEDS
from ..errors import PlanError
from ..files.checkpoint import Checkpoint
from ..files.layout import is_plain
from ..formats import FORMATS
from ..model.archs import architecture
from ..plan import Plan
from ..plan.choices import Decision, check_feasible, decide, entries_of
from ..plan.method import METHODS, Method
from ..plan.mixtures import RECIPES
from ..qtensor import QTensor
from ..runtime.load import model_checkpoint, pack_weights
from .task import chosen

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
