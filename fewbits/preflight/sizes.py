"""Bytes of an output by its parts, and of a number of parameters in one format.

    embedding   attention   mlp   experts (routers too)   norms and biases   output   other   file overhead
    '--------------------------- spans of the target ----------------------------------'   header, padding

Biases count with the weight of the same name; a tied output counts as the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ..files.output import Job, Output
from ..formats import FORMATS
from ..model.sites import role_of

OVERHEAD = "file overhead"
NORMS = "norms and biases"
PARTS = ("embedding", "attention", "mlp", "experts", NORMS, "output", "other", OVERHEAD)
_PART_OF_ROLE = {
    **dict.fromkeys(("embed", "position"), "embedding"),
    **dict.fromkeys(("q", "k", "v", "o", "qkv"), "attention"),
    **dict.fromkeys(("gate", "up", "gate_up", "down"), "mlp"),
    "router": "experts",
    "output": "output",
}


@dataclass(frozen=True)
class Part:
    """A group of an output's tensors."""

    name: str
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights if self.weights else 0.0


def part_of(job: Job) -> str:
    """The part of the model that a tensor belongs to."""
    name = job.sources[0] if job.sources else job.name
    if ".experts." in name or "_exps." in name:
        return "experts"
    role = role_of(name)
    if role == "other" and (len(job.shape) == 1 or "norm" in name):
        return NORMS
    if ".mlp." in name and role in ("o", "v"):  # c_proj is used for both
        return "mlp"
    return _PART_OF_ROLE.get(role, "other")


def file_nbytes(target: Output) -> int:
    """Bytes of the file with the weights, including the target's padding."""
    end = max([len(target.header), *(span.offset + span.nbytes for span in target.spans)])
    return -(-end // target.align) * target.align


def job_nbytes(target: Output) -> dict[str, int]:
    """Bytes of each tensor of the output, by its name."""
    spans = {span.name: span.nbytes for span in target.spans}
    return {job.name: sum(spans[name] for name in job.spans) for job in target.jobs}


def parts_of(target: Output) -> list[Part]:
    """The output's bytes by part; their sum is `file_nbytes`. Parts without a tensor are left out."""
    nbytes, weights = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for job, size in zip(target.jobs, job_nbytes(target).values(), strict=True):
        part = part_of(job)
        nbytes[part] += size
        weights[part] += prod(job.shape)
    nbytes[OVERHEAD] = file_nbytes(target) - sum(nbytes.values())
    return [Part(name, weights[name], nbytes[name]) for name in PARTS if nbytes[name] or weights[name]]


def sizes_of_parameters(count: float, mixtures: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """-> (format, bits per weight, bytes) of `count` parameters; mixtures: measured ones by name.

    `int4 codes` is 4 bits without scales; the row below has the scales.
    """
    bits = {"fp32": 32.0, "bf16": 16.0}
    bits |= {f"{name} (scales in)": float(FORMATS.get(name).bits_per_weight()) for name in ("int8_channel",)}
    bits |= mixtures
    bits |= {"int4_g128 (scales in)": float(FORMATS.get("int4_g128").bits_per_weight()), "int4 codes": 4.0}
    return [(name, each, count * each / 8) for name, each in bits.items()]
