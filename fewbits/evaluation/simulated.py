"""Quantized models with quantized activations or a quantized cache; their reference stays in float.

`activations` names a scheme of `activations.SCHEMES`, `cache` one of `activations.CACHES`. With windows to
calibrate on, sites that cannot bear the scheme keep their input in float (`activations.mixed`); a static
scheme needs them for its ranges, a dynamic one does without and then leaves no site out. What a quantized
model's own directory says of both (activations/record.py) holds where nothing else is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..activations import (
    CACHES,
    LIMIT_DB,
    OBSERVERS,
    SCHEMES,
    attention,
    calibrate,
)
from ..activations.kv_cache import Steps, ranges
from ..activations.record import activations_of, record_of
from ..blocks.simulate import changed_attention, changed_inputs
from ..errors import CalibrationError


@dataclass(frozen=True)
class Simulation:
    """What quantized models run with. None: float.

    calibration: windows `(w, t)` int64 of other text than is scored. observer: the rule for the ranges
    of a static scheme. limit_db: sites whose output keeps less stay in float; left: sites that do anyway.
    ranges: of sites, step and zero; steps: of keys and values, by attention: known without a calibration.
    """

    activations: str | None = None
    cache: str | None = None
    calibration: torch.Tensor | None = None
    observer: str = "mse"
    limit_db: float = LIMIT_DB
    left: tuple[str, ...] = ()
    ranges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    steps: Sequence[Steps] = ()

    def of(self, metadata: Mapping[str, Any]) -> Simulation:
        """This, or what a quantized model's own directory says of them, where this says nothing."""
        found, said = self, record_of(metadata, "activations")
        if self.activations is None and said is not None:
            left = tuple(map(str, said.get("left", ())))
            found = replace(found, activations=said["scheme"], left=left, ranges=said.get("ranges", {}))
        said = record_of(metadata, "kv_cache")
        if self.cache is None and said is not None:
            found = replace(found, cache=said["scheme"], steps=[*said.get("steps", {}).values()])
        return found

    def __post_init__(self) -> None:
        """PlanError for a name that is not known."""
        OBSERVERS.get(self.observer)
        if self.cache is not None:
            CACHES.get(self.cache)
        if self.activations is not None:
            SCHEMES.get(self.activations)

    def check(self, vocabulary: int) -> None:
        """Raise CalibrationError, before any model runs, for calibration text that is missing or wrong."""
        static = [self.activations] if self.activations and not SCHEMES.get(self.activations).dynamic else []
        static += [f"a cache in {self.cache}"] if self.cache and CACHES.get(self.cache).fixed else []
        if static and self.calibration is None:
            raise CalibrationError(
                f"{static[0]} has a fixed range and no text to take it from; give calibration text "
                "(--activation-text), or use a dynamic scheme"
            )
        tokens = self.calibration
        if tokens is not None and (tokens.ndim != 2 or not tokens.numel() or int(tokens.max()) >= vocabulary):
            raise CalibrationError(
                f"calibration windows are {tuple(tokens.shape)}, (w, t) tokens of a vocabulary of "
                f"{vocabulary} are needed; give text of this model's tokenizer"
            )


@dataclass(frozen=True)
class Simulated:
    """What a quantized model ran with, for the record. sites: weights whose input was quantized. left: sites
    that stayed in float for their SQNR. cache_bits: mean bits of a cached number."""

    activations: str | None = None
    sites: int = 0
    left: tuple[str, ...] = ()
    cache: str | None = None
    cache_bits: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.activations:
            shown = ", ".join(self.left[:3]) + (", ..." if len(self.left) > 3 else "")
            kept = f", {len(self.left)} left in float ({shown})" if self.left else ""
            parts.append(f"activations {self.activations} at {self.sites} sites{kept}")
        if self.cache:
            parts.append(f"cache {self.cache} ({self.cache_bits:g} bits a number)")
        return "; ".join(parts)


@contextmanager
def simulated(model: Any, simulation: Simulation) -> Iterator[list[Simulated]]:
    """Within, the model runs so; the list holds its record once the context has ended."""
    record: list[Simulated] = []
    scheme = None if simulation.activations is None else SCHEMES.get(simulation.activations)
    cache = None if simulation.cache is None else CACHES.get(simulation.cache)
    plan, reached = None, set[str]()
    with ExitStack() as stack:
        if scheme is not None:
            said = {"scheme": scheme.name, "ranges": simulation.ranges, "left": simulation.left}
            plan = activations_of(said)
            if simulation.calibration is not None and not simulation.ranges:
                found = (simulation.calibration, scheme, simulation.observer, simulation.limit_db)
                plan = calibrate(model, *found)
            reached = stack.enter_context(changed_inputs(model, plan.change))
        if cache is not None:
            steps = simulation.steps
            if cache.fixed and not steps and simulation.calibration is not None:
                steps = [*ranges(model, simulation.calibration).values()]
            stack.enter_context(changed_attention(model, attention(cache, steps)))
        yield record
    record.append(
        Simulated(
            activations=scheme.name if scheme else None,
            sites=sum(plan.quantizes(site) for site in reached) if plan else 0,
            left=plan.left if plan else (),
            cache=cache.name if cache else None,
            cache_bits=cache.bits_per_number(_head_size(model)) if cache else None,
        )
    )


def _head_size(model: Any) -> int:
    config = model.config.get_text_config()
    given = getattr(config, "head_dim", None)
    return given if given is not None else config.hidden_size // config.num_attention_heads
