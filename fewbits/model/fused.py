"""Groups of weights that engines fuse into one matrix, so that each group must have one format.

    attention    q, k, v of a block            one matrix, rows of q before those of k and v
    mlp          gate, up of a block           one matrix
    experts      all experts of a block        one tensor for gate and up, one for down

vLLM loads compressed-tensors, GPTQ and AWQ checkpoints in this way (fused modules) and cannot load a group of
two formats. llama.cpp and transformers keep the weights separate.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .sites import Site

_FUSED = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}
_EXPERT = re.compile(r"\.experts\.\d+\..*")


@dataclass(frozen=True)
class Mixed:
    """A fused group whose weights differ. formats: format -> the names that have it."""

    group: str
    formats: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        parts = (
            f"{kind} ({names[0]}{f' and {len(names) - 1} more' if names[1:] else ''})"
            for kind, names in self.formats.items()
        )
        return f"{self.group}: {' and '.join(parts)}"


def fused_groups(sites: Iterable[Site]) -> dict[str, tuple[str, ...]]:
    """Group -> the names of the weights that engines fuse; groups of one are left out."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        if site.block is None:
            continue
        if site.expert is not None:
            groups.setdefault(_EXPERT.sub(".experts", site.name), []).append(site.name)
        elif site.role in _FUSED:
            parent = site.group.removesuffix(":in")
            groups.setdefault(f"{parent} ({_FUSED[site.role]})", []).append(site.name)
    return {group: tuple(names) for group, names in groups.items() if len(names) > 1}


def mixed_groups(sites: Iterable[Site], formats: Mapping[str, str]) -> list[Mixed]:
    """The fused groups with more than one format. formats: of each weight, by name."""
    mixed = []
    for group, names in fused_groups(sites).items():
        by_format: dict[str, list[str]] = {}
        for name in names:
            by_format.setdefault(formats[name], []).append(name)
        if len(by_format) > 1:
            mixed.append(Mixed(group, {kind: tuple(rows) for kind, rows in by_format.items()}))
    return mixed
