"""Maximum tokens/s: a decoder reads its weights and its cache once for every step.

    seconds a step >= (weights read + cache of the batch) / bandwidth        tokens/s <= batch / seconds

A step reads all weights, except that it reads one row of the embedding (all of it if the output is tied to
it), and only the experts that a token is routed to, which is a lower bound.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .sizes import OVERHEAD, Part

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
GB = 1e9


@dataclass(frozen=True)
class Machine:
    """gb_per_s: published bandwidth of its memory. gib: its size, if the machine exists in one size."""

    name: str
    gb_per_s: float
    gib: float | None = None


@cache
def machines() -> tuple[Machine, ...]:
    rows = tomllib.loads(Path(__file__).with_name("machines.toml").read_text(encoding="utf-8"))["machine"]
    return tuple(Machine(**row) for row in rows)


def read_per_token(parts: Sequence[Part], config: Mapping[str, Any]) -> int:
    """Bytes of weights that one token needs."""
    nbytes = {part.name: part.nbytes for part in parts}
    if "output" in nbytes:
        nbytes.pop("embedding", None)
    nbytes.pop(OVERHEAD, None)
    count = next((config[name] for name in _EXPERTS if config.get(name)), None)
    used = config.get("num_experts_per_tok")
    if "experts" in nbytes and count and used:
        nbytes["experts"] = nbytes["experts"] * used // count
    return sum(nbytes.values())


def tokens_per_second(machine: Machine, weights: int, cache: int, batch: int = 1) -> float:
    """The bound. weights and cache: bytes, the cache of all sequences."""
    return batch * machine.gb_per_s * GB / (weights + cache)
