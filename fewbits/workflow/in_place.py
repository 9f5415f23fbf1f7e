"""quantize_model(): quantizes the linear weights of a loaded float model in place."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from ..algorithms import NEEDS
from ..errors import PlanError
from ..files.checkpoint import Checkpoint
from ..files.native import NATIVE
from ..formats.base import Format
from ..model.archs import architecture
from ..model.sites import TOWER
from ..plan import Plan, Rule
from ..plan.choices import Decision, check_feasible, decide, entries_of
from ..plan.method import METHODS
from ..plan.mixtures import Recipe
from ..qtensor import QTensor
from ..runtime.load import model_checkpoint, pack_weights
from .resolve import target_of
from .task import Spec, chosen, spec_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel, to: str | Plan, plan: Plan | None = None, method: str = "rtn"
) -> PreTrainedModel:
    """Quantize the linear weights of a loaded model's blocks, in place; returns the model.

    to: a format, a llama.cpp file type, or a Plan (then only weights that match its rules). plan: rules that
    precede `to`. method: rtn or hqq, which need no text. Errors: PlanError, FormatError. Arrays that are not
    two-dimensional (fused experts) are unchanged, with a warning; so are towers that no text goes through,
    unless a rule names them.

        >>> model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
        >>> model = fewbits.quantize_model(model, "int4_g128")
        >>> model.model.layers[0].mlp.up_proj.weight.nbytes * 8 / (512 * 256)
        4.125
    """
    names, checkpoint = model_checkpoint(model)
    decisions = decisions_of(checkpoint, *asked_for(to, plan))
    weights: dict[str, tuple[str, QTensor]] = {}
    for name, decision in decisions.items():
        if isinstance(decision.kind, Format):
            weight = checkpoint.tensors[name].load()
            assert isinstance(weight, torch.Tensor)
            q, _ = chosen(name, weight.float(), _spec(decision.kind, decision.rule, method))
            weights[name] = (names[name], q)
    towers = {name for name, seen in checkpoint.seen.items() if seen.role == TOWER}
    fused = sorted(n for n, each in checkpoint.tensors.items() if len(each.shape) == 3 and n not in towers)
    if fused:
        warnings.warn(
            f"{len(fused)} arrays that are no matrices, such as {fused[0]}, stay in float: quantize the "
            "checkpoint instead (fewbits.quantize), which has the experts one by one",
            stacklevel=2,
        )
    return pack_weights(model, weights)


def asked_for(to: str | Plan, plan: Plan | None) -> tuple[str | None, Plan]:
    """The type, if one is given, and the rules."""
    return (None, to) if isinstance(to, Plan) else (to, plan or Plan())


def decisions_of(checkpoint: Checkpoint, to: str | None, plan: Plan) -> dict[str, Decision]:
    """tensor -> its Decision, checked."""
    target = target_of(to)
    entries = entries_of(checkpoint, architecture(checkpoint.config) if isinstance(target, Recipe) else None)
    decisions = decide(checkpoint, entries, target, plan, NATIVE)
    check_feasible(checkpoint, entries, decisions, requantize=False)
    return {source: decisions[entry.name] for entry in entries for source in entry.sources}


def _spec(format: Format, rule: Rule | None, method: str) -> Spec:
    spec = spec_of(format, rule, METHODS[method])
    if NEEDS[spec.algorithm] != "nothing":
        raise PlanError(
            f"{spec.algorithm} needs calibration text, which quantize_model does not use; take rtn, hqq or "
            "fewbits.quantize on the model's directory"
        )
    return spec
