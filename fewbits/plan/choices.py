"""From the user's request to the format of each tensor of the output, checked before the run.

    --to q4_k_m   a recipe: llama.cpp's mixture; user rules override it tensor by tensor
    --to nf4      a format: every linear weight of the blocks; embeddings, output (the head) and router stay
    plan only     tensors without a matching rule are unchanged

Recipes use GGUF names. For an architecture without a GGUF map, each weight gets the name of its role there,
so that the mixture still applies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod

from ..dtypes import DType
from ..errors import FewbitsError, ModelError, PlanError, raise_all
from ..files.checkpoint import Checkpoint
from ..files.filetype import FileType
from ..files.output import entry_shape
from ..formats.base import Format, Kind, kind_of
from ..formats.ggml import Ggml, format_of
from ..model.archs import (
    Architecture,
    GGUFEntry,
    architecture,
    complete,
    expert_count,
    gguf_entries,
    own_entries,
)
from ..model.sites import GGUF_PARTS, TOWER, Site, sites
from .mixtures import Recipe
from .recipes import Choice, Hyper, choose_types
from .rules import Plan, Rule

FEW = 0.05
STAY = {"router", "embed", "output", "position", "segment", TOWER}
_OUTSIDE = {"embed": "token_embd.weight", "output": "output.weight", "position": "position_embd.weight"}


@dataclass(frozen=True)
class Decision:
    """The format of one output tensor: requested, actual, why they differ, and the rule. lossless: other
    formats that may have the same values as the quantized source, to be tried in this order."""

    requested: Kind
    kind: Kind
    reason: str | None = None
    rule: Rule | None = None
    lossless: tuple[Format, ...] = ()


def entries_of(checkpoint: Checkpoint, arch: Architecture | None, needs_gguf: bool = True) -> list[GGUFEntry]:
    """The tensors of a GGUF file made of this checkpoint, or their substitutes (see above).

    needs_gguf: whether names that GGUF does not have are faults."""
    own = [name for name in checkpoint.tensors if name not in checkpoint.aside]
    if arch is not None:
        try:
            return gguf_entries(arch, checkpoint.config, own)
        except ModelError:
            if needs_gguf:
                raise
    if checkpoint.gguf_keys:
        return own_entries(checkpoint.tensors)
    stacks: dict[str, list[str]] = {}
    by_name = {site.name: site for site in sites(checkpoint)}
    for name in own:
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
    """The model facts that recipes use; ModelError if its config lacks them."""
    if checkpoint.gguf_keys and not checkpoint.config:
        keys = {name: value.value for name, value in checkpoint.gguf_keys.items()}
        name = str(keys.get("general.architecture"))
        pairs = ("block_count", "attention.head_count", "attention.head_count_kv", "expert_count")
        values = (keys.get(f"{name}.{pair}", 0) for pair in pairs)
        # If layers differ, the value is a list with one entry each; llama.cpp's mixtures use the first.
        n_layer, head, n_kv, experts = (v[0] if isinstance(v, list) and v else v for v in values)
        return Hyper(name, n_layer, head, n_kv or head, experts)
    text = checkpoint.text_config
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


def plain_kind(checkpoint: Checkpoint, entry: GGUFEntry, file_type: FileType) -> Kind:
    """The number type of an unquantized tensor: that of a GGUF file, or the default of the file type."""
    source = checkpoint.tensors[entry.sources[0]] if entry.sources else None
    if source is not None and checkpoint.gguf_keys:
        return source.kind
    return file_type.plain_kind(entry, source)


def decide(
    checkpoint: Checkpoint,
    entries: Sequence[GGUFEntry],
    to: Recipe | Format | None,
    plan: Plan,
    file_type: FileType,
    calibrated: bool = False,
) -> dict[str, Decision]:
    """-> entry name -> Decision. calibrated: whether there are statistics of activations, for which
    llama.cpp's mixtures make exceptions.

    Raises PlanError that lists every rule without a matching tensor."""
    stored = {entry.name: plain_kind(checkpoint, entry, file_type) for entry in entries}
    rules = {entry.name: plan.choose([entry.name, *entry.sources]) for entry in entries}
    quantizable = {site.name: site for site in sites(checkpoint)}
    if isinstance(to, Recipe):
        shapes = [(e.name, entry_shape(checkpoint, e), stored[e.name].name) for e in entries]
        choices = choose_types(
            to.name,
            shapes,
            hyper_of(checkpoint, architecture(checkpoint.config)),
            calibrated,
            overrides=lambda name: _type_name(rule) if (rule := rules[name]) else None,
        )
        decisions = {name: _from_recipe(choices[name], rules[name]) for name in choices}
        towers = [e for e in entries if any(_is_tower(quantizable.get(name)) for name in e.sources)]
        decisions |= {e.name: _kept(stored[e.name], TOWER) for e in towers if rules[e.name] is None}
    else:
        decisions = {e.name: _from_rules(e, quantizable, rules[e.name], to, stored[e.name]) for e in entries}
        decisions |= _unfit(checkpoint, entries, decisions, file_type, stored)
    _check_rules(plan, entries, decisions)
    return decisions


def _type_name(rule: Rule) -> str | None:
    """llama.cpp's name of a rule's type; None for a format that GGUF does not have."""
    kind = kind_of(rule.format)
    return kind.type_name if isinstance(kind, Ggml) else kind.name if isinstance(kind, DType) else None


def _from_recipe(choice: Choice, rule: Rule | None) -> Decision:
    if rule is not None and not choice.kept and _type_name(rule) is None:
        kind = kind_of(rule.format)
        return Decision(kind, kind, None, rule)
    given = kind_of(format_of(choice.type))
    requested = given if choice.kept else kind_of(format_of(choice.wanted))
    return Decision(requested, given, choice.reason, None if choice.kept else rule)


def _from_rules(
    entry: GGUFEntry, quantizable: Mapping[str, Site], rule: Rule | None, format: Format | None, stored: Kind
) -> Decision:
    site = quantizable.get(entry.sources[0]) if entry.sources else None
    if site is None:
        return Decision(stored, stored, "kept: not a weight matrix")
    if rule is not None:
        kind = kind_of(rule.format)
        return Decision(kind, kind, None, rule)
    if format is None:
        return Decision(stored, stored, "kept: no rule names it")
    return _kept(stored, site.role) if site.role in STAY else Decision(format, format)


def _kept(stored: Kind, role: str) -> Decision:
    return Decision(stored, stored, f"kept: {role} is unchanged unless a rule names it")


def _is_tower(site: Site | None) -> bool:
    return site is not None and site.role == TOWER


def _unfit(
    checkpoint: Checkpoint,
    entries: Sequence[GGUFEntry],
    decisions: Mapping[str, Decision],
    file_type: FileType,
    stored: Mapping[str, Kind],
) -> dict[str, Decision]:
    """The few weights whose shape the format or file type cannot have, kept in float; none where they are
    more than `FEW` of all: then another format suits the model, and the refusal says so."""
    kept, total, few = {}, 0, 0
    for entry in entries:
        decision = decisions[entry.name]
        if not isinstance(decision.kind, Format) or decision.rule is not None:
            continue
        *experts, n, k = entry_shape(checkpoint, entry)
        total += (size := n * k * prod(experts))
        if file_type.reason(decision.kind) is None and not file_type.fits(decision.kind, (n, k)):
            few += size
            reason = f"kept: {n} x {k} is no shape for {decision.kind.name} in {file_type.where}"
            reason = reason.format(name=file_type.name)
            kept[entry.name] = Decision(decision.kind, stored[entry.name], reason)
    return kept if few <= FEW * total else {}


def _nearest(pattern: str, entries: Sequence[GGUFEntry]) -> str:
    names = [source.removesuffix(".weight") for entry in entries for source in entry.sources]
    return (get_close_matches(pattern, names, n=1, cutoff=0.0) or ["?"])[0]


def _check_rules(plan: Plan, entries: Sequence[GGUFEntry], decisions: Mapping[str, Decision]) -> None:
    """Faults of rules that decide nothing, such as patterns with a typing error."""
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
    """Faults that would occur later, found from headers: PlanError lists all of them."""
    faults, again = [], []
    for entry in entries:
        kind = decisions[entry.name].kind
        if not isinstance(kind, Format) or not entry.sources:
            continue
        source = checkpoint.tensors[entry.sources[0]]
        if kind == source.kind:
            continue
        try:
            kind.check_shape(source.shape[-2], source.shape[-1], entry.sources[0])
        except FewbitsError as error:
            faults.append(str(error))
            continue
        if source.quantized and not requantize and not decisions[entry.name].lossless:
            again.append(f"{entry.sources[0]} is {source.kind.name}")
    if again:
        faults.append(
            f"{len(again)} tensors are already quantized, such as {again[0]}; quantize the original float "
            "model, or pass --requantize"
        )
    raise_all(PlanError, str(checkpoint.path), faults)
