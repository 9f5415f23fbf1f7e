"""How many bits each kind of weight gets when the codes of a model are entropy-coded.

Any length is possible then, so bits go where they lower the loss most. With b bits a weight the loss of a
weight falls as 4^-b; the least sum has the same KL divergence per weight everywhere:

    bits = mean + OFFSETS[role] - (their mean over the model's weights)

OFFSETS are half the binary logarithms of the KL divergence per weight that the weights of each role caused
alone, at equal bits, in SmolLM2-135M (ecsq by error feedback; wikitext). The order is that of llama.cpp's
mixtures: v and down above, q and gate below. A rule with `bits` sets others.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..model.sites import Site
from .rules import Plan, Rule

OFFSETS = {
    "q": -0.6, "k": 0.5, "v": 1.0, "qkv": 0.0, "o": 0.0, "gate": -0.4, "up": 0.0, "gate_up": -0.2,
    "down": 0.25, "embed": -1.1, "output": 0.9,
}  # fmt: skip
LEAST, MOST = 1.0, 7.0


def with_rates(plan: Plan, sites: Sequence[Site], format: str, bits: float, tables: bool) -> Plan:
    """The plan, followed by a rule for each kind of weight that it leaves to `ecsq` in `format`: `bits` on
    average. tables: whether the embedding and the output layer are among them."""
    kinds: dict[str, list[Site]] = {}
    for site in sites:
        inside = site.block is not None and site.role in OFFSETS
        outside = tables and site.block is None and site.role in ("embed", "output")
        if (inside or outside) and plan.choose([site.name]) is None:
            kinds.setdefault(_pattern(site), []).append(site)
    weights = {match: sum(site.shape[0] * site.shape[1] for site in found) for match, found in kinds.items()}
    offsets = {match: OFFSETS[_role(found[0])] for match, found in kinds.items()}
    mean = sum(offsets[match] * count for match, count in weights.items()) / max(1, sum(weights.values()))
    rates = {match: min(max(bits + offset - mean, LEAST), MOST) for match, offset in offsets.items()}
    rules = (Rule(match, format, "ecsq", {"bits": round(rate, 3)}) for match, rate in rates.items())
    return Plan((*plan.rules, *rules), plan.run)


def _role(site: Site) -> str:
    """A table that is the output layer too is as sensitive as that."""
    return "output" if site.tied_to is not None else site.role


def _pattern(site: Site) -> str:
    """Of all weights of this name in any block."""
    name = site.name.removesuffix(".weight")
    return name if site.block is None else f"*.{'.'.join(name.split('.')[-2:])}"
