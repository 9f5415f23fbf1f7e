"""From what the user asked to what each tensor of the output gets, checked before any work is done.

    --to q4_k_m   a recipe: llama.cpp's mixture; user rules override it tensor by tensor
    --to nf4      a format: every linear weight of the blocks; embedding, output and router stay
    plan only     what no rule names stays as it is

Recipes speak GGUF names. For an architecture without a GGUF map (or a native directory of one) each
weight is given the name its role would have there, so that the mixture still makes sense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..errors import FewbitsError, ModelError, PlanError, raise_all
from ..files.checkpoint import Checkpoint
from ..files.target import entry_shape, ggml_type
from ..formats import FLOATS, FORMATS
from ..formats.ggml import format_of
from ..model.archs import Architecture, GGUFEntry, complete, expert_count, gguf_entries
from ..model.sites import GGUF_PARTS, Site, sites
from .recipes import Choice, Hyper, choose_types
from .rules import Plan, Rule

STAY = {"router", "embed", "output", "position"}
_OUTSIDE = {"embed": "token_embd.weight", "output": "output.weight", "position": "position_embd.weight"}


@dataclass(frozen=True)
class Decision:
    """What one tensor of the output gets: asked, given, why they differ, and by which rule. exact: the
    source is quantized otherwise, and format has the very same values."""

    asked: str
    format: str
    reason: str | None = None
    rule: Rule | None = None
    exact: bool = False


def entries_of(checkpoint: Checkpoint, arch: Architecture | None) -> list[GGUFEntry]:
    """The tensors of a GGUF file made of this checkpoint, or what stands for them (see above)."""
    if arch is not None:
        return gguf_entries(arch, checkpoint.config, checkpoint.tensors)
    if checkpoint.kind == "gguf":
        return [GGUFEntry(name, (name,)) for name in checkpoint.tensors]
    stacks: dict[str, list[str]] = {}
    by_name = {site.name: site for site in sites(checkpoint)}
    for name in checkpoint.tensors:
        site = by_name.get(name)
        target = name if site is None else _name_by_role(site)
        if target in stacks and (site is None or site.expert is None):
            target = name
        stacks.setdefault(target, []).append(name)
    return [GGUFEntry(target, tuple(sources)) for target, sources in stacks.items()]


def _name_by_role(site: Site) -> str:
    if site.role in _OUTSIDE:
        return _OUTSIDE[site.role]
    if site.block is None or site.role not in GGUF_PARTS:
        return site.name
    return f"blk.{site.block}.{GGUF_PARTS[site.role]}{'' if site.expert is None else '_exps'}.weight"


def hyper_of(checkpoint: Checkpoint, arch: Architecture | None) -> Hyper:
    """What recipes ask about a model; ModelError where its config does not say."""
    config: Mapping[str, Any] = checkpoint.config
    if checkpoint.kind == "gguf" and not config:
        keys = {name: value.value for name, value in checkpoint.metadata.items()}
        name = str(keys.get("general.architecture"))
        pairs = ("block_count", "attention.head_count", "attention.head_count_kv", "expert_count")
        found = (keys.get(f"{name}.{pair}", 0) for pair in pairs)
        # Where layers differ the value is a list of one for each; llama.cpp's mixtures ask the first.
        n_layer, head, n_kv, experts = (v[0] if isinstance(v, list) and v else v for v in found)
        return Hyper(name, n_layer, head, n_kv or head, experts)
    text = config.get("text_config", config)
    fields = complete(text) if arch else text
    layers, heads = fields.get("num_hidden_layers"), fields.get("num_attention_heads")
    if layers is None or heads is None:
        raise ModelError(
            f"{checkpoint.path}: config.json does not say num_hidden_layers and num_attention_heads, which "
            "the llama.cpp mixtures depend on; use --to with a format such as int4_g128, or a plan"
        )
    experts = expert_count(arch, fields) if arch else int(text.get("num_experts") or 0)
    return Hyper(
        arch.gguf if arch else "unknown",
        int(layers),
        int(heads),
        int(fields.get("num_key_value_heads") or heads),
        experts,
    )


def stored_dtype(checkpoint: Checkpoint, entry: GGUFEntry, gguf: bool) -> str:
    """The type that a tensor has when it is not quantized.

    llama.cpp keeps vectors, norms and routers in f32; a native directory keeps what the source has.
    """
    if not entry.sources:
        return "f32"
    source = checkpoint.tensors[entry.sources[0]]
    if not gguf or source.quantized or checkpoint.kind == "gguf":
        return source.dtype
    small = len(source.shape) == 1 or "_norm.weight" in entry.name or "ffn_gate_inp" in entry.name
    return "f32" if small or source.dtype not in FLOATS else source.dtype


def decide(
    checkpoint: Checkpoint,
    entries: Sequence[GGUFEntry],
    arch: Architecture | None,
    to: tuple[str | None, str | None],
    plan: Plan,
    gguf: bool,
    calibrated: bool = False,
) -> dict[str, Decision]:
    """-> entry name -> Decision. to: (recipe, None), (None, format) or (None, None). calibrated: statistics
    of activations are there, for which llama.cpp's mixtures make exceptions.

    Raises PlanError listing every rule that names nothing.
    """
    stored = {entry.name: stored_dtype(checkpoint, entry, gguf) for entry in entries}
    rules = {entry.name: plan.choose([entry.name, *entry.sources]) for entry in entries}
    recipe, format = to
    if recipe is not None:
        shapes = [(e.name, entry_shape(checkpoint, e), stored[e.name]) for e in entries]
        choices = choose_types(
            recipe,
            shapes,
            hyper_of(checkpoint, arch),
            calibrated,
            overrides=lambda name: (
                ggml_type(rule.format) if (rule := rules[name]) and _is_ggml(rule.format) else None
            ),
        )
        decisions = {name: _from_recipe(choices[name], rules[name]) for name in choices}
    else:
        quantizable = {site.name: site for site in sites(checkpoint)}
        decisions = {
            e.name: _from_rules(e, quantizable, rules[e.name], format, stored[e.name]) for e in entries
        }
    _check_rules(plan, entries, decisions)
    return decisions


def _is_ggml(format: str) -> bool:
    return format in FLOATS or hasattr(FORMATS.get(format), "type_id")


def _from_recipe(choice: Choice, rule: Rule | None) -> Decision:
    if rule is not None and choice.kept:
        return Decision(choice.type, choice.type, choice.reason)
    if rule is not None and not _is_ggml(rule.format):
        return Decision(rule.format, rule.format, None, rule)
    return Decision(format_of(choice.wanted), format_of(choice.type), choice.reason, rule)


def _from_rules(
    entry: GGUFEntry, quantizable: Mapping[str, Site], rule: Rule | None, format: str | None, stored: str
) -> Decision:
    site = quantizable.get(entry.sources[0]) if entry.sources else None
    if site is None:
        return Decision(stored, stored, "kept: not a weight matrix")
    if rule is not None:
        return Decision(rule.format, rule.format, None, rule)
    if format is None:
        return Decision(stored, stored, "kept: no rule names it")
    if site.role in STAY:
        return Decision(stored, stored, f"kept: {site.role} stays as it is unless a rule names it")
    return Decision(format, format)


def _nearest(pattern: str, entries: Sequence[GGUFEntry]) -> str:
    names = [source.removesuffix(".weight") for entry in entries for source in entry.sources]
    return (get_close_matches(pattern, names, n=1, cutoff=0.0) or ["?"])[0]


def _check_rules(plan: Plan, entries: Sequence[GGUFEntry], decisions: Mapping[str, Decision]) -> None:
    """Every rule must decide something: a pattern with a typing error must not pass unnoticed."""
    used = {id(decision.rule) for decision in decisions.values()}
    faults = []
    for rule in plan.rules:
        if id(rule) in used:
            continue
        hit = next((e.name for e in entries if rule.matches([e.name, *e.sources])), None)
        why = (
            f"names only tensors that are kept or taken by an earlier rule, such as {hit}"
            if hit
            else f"matches no tensor; the nearest name is {_nearest(rule.match, entries)}"
        )
        faults.append(f"rule {rule.match!r} = {rule.format} {why}")
    raise_all(PlanError, "plan", faults)


def check_feasible(
    checkpoint: Checkpoint,
    entries: Sequence[GGUFEntry],
    decisions: Mapping[str, Decision],
    requantize: bool,
) -> None:
    """All that would fail later, found from headers alone: PlanError lists every fault."""
    faults, again = [], []
    for entry in entries:
        kind = decisions[entry.name].format
        if kind in FLOATS or not entry.sources:
            continue
        source = checkpoint.tensors[entry.sources[0]]
        if kind == source.dtype:
            continue
        try:
            FORMATS.get(kind).check_shape(source.shape[-2], source.shape[-1], entry.name)
        except FewbitsError as error:
            faults.append(str(error))
            continue
        if source.quantized and not requantize and not decisions[entry.name].exact:
            again.append(f"{entry.name} is {source.dtype}")
    if again:
        faults.append(
            f"{len(again)} tensors are already quantized, such as {again[0]}; quantize the original float "
            "model, or pass --requantize"
        )
    raise_all(PlanError, str(checkpoint.path), faults)
