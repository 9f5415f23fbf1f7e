"""The statistics of a whole model, by site: merging, joining, queries.

    site name --sites--> key --groups--> LazyStats --load--> Stats
    ...q_proj.weight ---.
    ...k_proj.weight ----+--> "...k_proj.weight": one group, the first of its names in the alphabet
    ...v_proj.weight ---'

A model is identified by its architecture and the names and shapes of its sites, so the statistics of a base
model also apply to its fine-tunes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from ..errors import CalibrationError, raise_all
from ..files.checkpoint import Checkpoint
from ..files.gguf.metadata import model_name
from ..model.archs import architecture
from ..model.sites import Site, sites
from ..storage.atomic import as_bytes
from .stats import Stats

FIELDS = ("absmax", "mean_square", "hessian")
"""What may be known of a group."""
RECENT = 2
"""Groups that stay in memory once read: sites that share one come before the third from it (k, o, q, v)."""
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class ModelIdentity:
    """name: for messages. architecture: its name in GGUF, else that in config.json. digest: of the sites."""

    name: str
    architecture: str
    digest: str

    def same_as(self, other: ModelIdentity) -> bool:
        return (self.architecture, self.digest) == (other.architecture, other.digest)

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture}, sites {self.digest[:12]})"


@dataclass(frozen=True)
class LazyStats:
    """The statistics of one activation of `columns` values; load(hessian) reads them, with or without it."""

    columns: int
    load: Callable[[bool], Stats]


@dataclass(frozen=True)
class Statistics:
    """The statistics of a model's activations.

    groups: key -> statistics of one activation. sites: site name -> key. knows: the fields of FIELDS that
    every group has. unseen: sites that no token reached. source: the text, in words. notes: for the receipt.
    digest: SHA-256 of the file that they were read from, else empty.
    """

    model: ModelIdentity
    source: str
    tokens: int
    groups: Mapping[str, LazyStats]
    sites: Mapping[str, str]
    knows: frozenset[str]
    unseen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    digest: str = ""

    def of(self, site: str, hessian: bool = True) -> Stats | None:
        """The statistics of a site's input, None if no token reached it."""
        key = self.sites.get(site)
        return None if key is None else self.groups[key].load(hessian)


def content_digest(statistics: Statistics) -> str:
    """SHA-256 of all statistics, read group by group."""
    digest = hashlib.sha256(json.dumps(sorted(statistics.sites.items())).encode())
    for key, group in sorted(statistics.groups.items()):
        stats = group.load(True)
        digest.update(f"{key} {stats.count}".encode())
        for field in FIELDS:
            value = getattr(stats, field)
            digest.update(field.encode() if value is None else as_bytes(value.cpu()))
    return digest.hexdigest()


def identify(checkpoint: Checkpoint) -> ModelIdentity:
    """The identity of a model, without a tied output, which not every file type stores."""
    arch = architecture(checkpoint.config)
    named = checkpoint.config.get("architectures") or ["unknown"]
    rows = sorted((site.name, *site.shape) for site in sites(checkpoint) if not _is_copy(site))
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return ModelIdentity(model_name(checkpoint), arch.gguf if arch else str(named[0]), digest)


def _is_copy(site: Site) -> bool:
    return site.role == "output" and site.tied_to is not None


def gather(
    model: ModelIdentity,
    source: str,
    tokens: int,
    stats: Mapping[str, Stats],
    unseen: Iterable[str] = (),
    notes: Sequence[str] = (),
) -> Statistics:
    """Site name -> Stats, in memory, as one `Statistics`: sites with the same object share a group.

    CalibrationError lists every group with impossible values.
    """
    names: dict[int, list[str]] = {}
    for site, seen in stats.items():
        if seen.count:
            names.setdefault(id(seen), []).append(site)
    groups = {min(shared): stats[shared[0]] for shared in names.values()}
    faults = [f"input of {key}: {fault}" for key, seen in groups.items() for fault in value_faults(seen)]
    raise_all(CalibrationError, f"statistics of {model}", faults)
    return Statistics(
        model,
        source,
        tokens,
        {key: LazyStats(seen.columns, partial(_in_memory, seen)) for key, seen in groups.items()},
        {site: min(shared) for shared in names.values() for site in shared},
        frozenset(f for f in FIELDS if all(getattr(seen, f) is not None for seen in groups.values())),
        tuple(sorted({*unseen, *(site for site, seen in stats.items() if not seen.count)})),
        tuple(notes),
    )


def value_faults(stats: Stats) -> list[str]:
    """Faults: values that are not finite, or negative squares."""
    faults = [] if stats.count > 0 else [f"count is {stats.count}, not a number of tokens"]
    for field in FIELDS:
        value = getattr(stats, field)
        if value is None:
            continue
        wrong = int((~value.isfinite()).sum())
        if wrong:
            faults.append(f"{field} has {wrong} of {value.numel()} values that are not finite")
        elif float((value.diagonal() if value.ndim == 2 else value).amin()) < 0:
            faults.append(f"{field} is negative, and squares and magnitudes are not; damaged?")
    return faults


def _in_memory(stats: Stats, hessian: bool) -> Stats:
    return stats if hessian else replace(stats, hessian=None, mismatch=None)


# ---- merging -------------------------------------------------------------------------------------


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of two texts combined, weighted by count, and read lazily.

    Only fields that both have are kept, with a note. CalibrationError if the models differ.
    """
    if not a.model.same_as(b.model):
        raise CalibrationError(
            f"statistics of {a.model} and of {b.model} cannot be merged; they are of different models"
        )
    shared: dict[tuple[str | None, str | None], list[str]] = {}
    for site in {**a.sites, **b.sites}:
        shared.setdefault((a.sites.get(site), b.sites.get(site)), []).append(site)
    parts, knows = {}, a.knows & b.knows
    for (in_a, in_b), names in shared.items():
        sides = ((in_a, a.groups), (in_b, b.groups))
        parts[min(names)] = [groups[key] for key, groups in sides if key is not None]
    read = lru_cache(RECENT)(lambda key, hessian: _sum(parts[key], knows, hessian))
    lost = [
        f"{field} is in only one of the merged statistics, so the result does not have it"
        for field in FIELDS
        if field in a.knows ^ b.knows
    ]
    return Statistics(
        a.model,
        a.source if a.source == b.source else f"{a.source} + {b.source}",
        a.tokens + b.tokens,
        {key: LazyStats(both[0].columns, partial(read, key)) for key, both in parts.items()},
        {site: min(names) for names in shared.values() for site in names},
        knows,
        tuple(sorted({*a.unseen, *b.unseen} - {*a.sites, *b.sites})),
        tuple(dict.fromkeys([*a.notes, *b.notes, *lost])),
    )


def _sum(parts: Sequence[LazyStats], knows: frozenset[str], hessian: bool) -> Stats:
    wanted = hessian and "hessian" in knows
    total = parts[0].load(wanted)
    for part in parts[1:]:
        total = total + part.load(wanted)
    return replace(total, absmax=total.absmax if "absmax" in knows else None, mismatch=None)


def join(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of different blocks, from one run over one text, combined; nothing is read.

    CalibrationError for different models or texts, and for sites in two parts.
    """
    first = parts[0]
    faults = []
    for part in parts[1:]:
        if not part.model.same_as(first.model):
            faults.append(f"one part is of {part.model}, another of {first.model}")
        if (part.source, part.tokens) != (first.source, first.tokens):
            faults.append(f"one part saw {part.tokens} tokens of {part.source}, another {first.tokens} "
                          f"of {first.source}")  # fmt: skip
    places = Counter(site for part in parts for site in part.sites)
    faults += [f"site {site!r} is in {count} parts" for site, count in places.items() if count > 1]
    raise_all(CalibrationError, "statistics in parts", faults)
    return replace(
        first,
        groups={key: group for part in parts for key, group in part.groups.items()},
        sites={site: key for part in parts for site, key in part.sites.items()},
        knows=frozenset.intersection(*(part.knows for part in parts)),
        unseen=tuple(sorted({site for part in parts for site in part.unseen})),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


# ---- use ------------------------------------------------------------------------------------------


def check_model(statistics: Statistics, checkpoint: Checkpoint) -> None:
    """CalibrationError, naming both, unless the statistics are of the checkpoint's architecture and sites."""
    model = identify(checkpoint)
    if not statistics.model.same_as(model):
        raise CalibrationError(
            f"these statistics are of {statistics.model}, the checkpoint is {model}; calibrate this model"
        )
    columns = {site.name: site.shape[1] for site in sites(checkpoint)}
    seen = {site: statistics.groups[key].columns for site, key in statistics.sites.items()}
    faults = [
        f"site {site!r} has {columns.get(site, 'no')} columns, its statistics {k}"
        for site, k in seen.items()
        if columns.get(site) != k
    ]
    raise_all(CalibrationError, f"statistics of {statistics.model}", faults)


def importance_of(statistics: Statistics, site: Site) -> torch.Tensor:
    """The importance of each column of a weight: mean x^2 of its input, `(k,)` f32.

    An expert without tokens gets the mean over the tokens of the block's other experts (in llama.cpp its
    columns have equal importance); `importance_notes` names it. CalibrationError if nothing is known.
    """
    stats = statistics.of(site.name, hessian=False)
    if stats is not None:
        return stats.mean_square
    if not _other_experts(statistics, site.name):
        raise CalibrationError(
            f"{site.name}: no token of {statistics.source} reached it, nor another expert of its block; "
            "calibrate with more text, or give it a rule with an algorithm that needs no statistics"
        )
    return _mean_of_others(statistics, site.name)


def importance_notes(statistics: Statistics) -> tuple[str, ...]:
    """One sentence for each block and projection with experts without tokens, for the receipt."""
    unseen: dict[str, list[str]] = {}
    for site in statistics.unseen:
        if _EXPERT.search(site):
            unseen.setdefault(_EXPERT.sub(".experts.*.", site), []).append(site)
    notes = []
    for pattern, names in unseen.items():
        seen = len(_other_experts(statistics, names[0]))
        numbers = ", ".join(sorted((n.split(".experts.")[1].split(".")[0] for n in names), key=int))
        notes.append(f"{pattern}: {len(names)} of {len(names) + seen} experts saw no token ({numbers}); "
                     "their columns weigh as the mean of the others")  # fmt: skip
    return tuple(notes)


def stats_for(statistics: Statistics, name: str, hessian: bool) -> Stats | None:
    """The statistics of a weight's input. An expert without tokens has the importance of the others and count
    0; None if these have no statistics either."""
    seen = statistics.of(name, hessian)
    if seen is not None or not _other_experts(statistics, name):
        return seen
    return Stats(0, None, _mean_of_others(statistics, name))


def coverage_notes(statistics: Statistics, names: Iterable[str], hessian: bool) -> tuple[str, ...]:
    """For the receipt: the weights in `names` with too few tokens in these statistics."""
    lacking = [name for name in names if name not in statistics.sites
               and (hessian or not _other_experts(statistics, name))]  # fmt: skip
    notes = () if hessian else importance_notes(statistics)
    if not lacking:
        return notes
    more = f" (and {len(lacking) - 1} more)" if lacking[1:] else ""
    return (*notes, f"unseen: {lacking[0]} met no token and is rounded to nearest{more}")


def _mean_of_others(statistics: Statistics, name: str) -> torch.Tensor:
    """Mean x^2 over the tokens of the block's other experts."""
    others = [other for key in _other_experts(statistics, name)
              if (other := statistics.of(key, hessian=False)) is not None]  # fmt: skip
    total = sum(other.count for other in others)
    return torch.stack([other.mean_square * (other.count / total) for other in others]).sum(0)


def _other_experts(statistics: Statistics, site: str) -> list[str]:
    pattern = _EXPERT.sub(".experts.*.", site)
    if pattern == site:
        return []
    return [name for name in statistics.sites if _EXPERT.sub(".experts.*.", name) == pattern]
