"""Equalization: producers and consumers of an activation get the same ranges (Nagel et al., 1906.04721).

    s = sqrt(max |producer row| / max |consumer column|)       both become sqrt of their product

(except for a factor that all columns of the pair share). Data-free. A weight is the consumer of one pair and
the producer of another, so the pairs are repeated until no scale changes by more than one percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..calibrate.stats import Stats
from ..formats.base import Format
from .loss import ratio
from .pairs import Choice, Pair, apply, settled

CHANGE = 0.01


def equalize(
    weights: Mapping[str, torch.Tensor],
    pairs: Sequence[Pair],
    stats: Mapping[str, Stats] | None = None,
    formats: Mapping[str, Format | None] | None = None,
    rounds: int = 20,
) -> list[Choice]:
    """Weights of a block -> every pair with its scale. Statistics and formats are not used."""
    total = {pair: torch.ones(pair.size, device=weights[pair.consumers[0]].device) for pair in pairs}
    for _ in range(rounds):
        now = dict(weights)
        moved = 0.0
        for pair in pairs:
            now |= apply(now, pair, total[pair])
        for pair in pairs:
            producer, consumer = ranges(now, pair)
            change = ratio(producer, 0.5, consumer, 0.5)
            before = total[pair]
            total[pair] = settled(weights, pair, before * change)
            now |= apply(now, pair, total[pair] / before)
            moved = max(moved, float((total[pair] / before).log().abs().amax()))
        if moved < CHANGE:
            break
    return list(total.items())


def ranges(weights: Mapping[str, torch.Tensor], pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest |weight| of each producer row (of the norm, if there are no rows) and consumer column."""
    if pair.rows is not None:
        rows = weights[pair.rows.name][pair.rows.start : pair.rows.start + pair.size]
        producer = rows.float().abs().amax(1)
    else:
        assert pair.vector is not None
        producer = (weights[pair.vector.name].float() + pair.vector.offset).abs()
    columns = torch.stack([weights[name].float().abs().amax(0) for name in pair.consumers])
    return producer, pair.gathered(columns.amax(0), "amax")
