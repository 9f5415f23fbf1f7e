"""AWQ: columns that carry large activations are scaled up before rounding (Lin et al., arXiv 2306.00978).

    s = rms(x)^a / rms(w)^b          a, b in [0, 1]; a = b = 0 leaves the weight unchanged

Rounding moves a weight by about half the scale whatever its size; after W s the same scale is s times smaller
where it matters, but the scale of the group grows. The paper searches only a; b uses that columns of small
weights can grow before they widen a group's range. The two are searched alternately from a = b = 0 until
neither changes, on the output error of all the pair's consumers in their own formats. The paper's search for
a clipped range: clip.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..calibrate.stats import Stats
from ..formats.base import Format
from .loss import Quantizer, Reader, column_rms, input_rms, ratio, readers_of, weight_loss, weighted
from .pairs import Choice, Pair, settled

ROUNDS = 3


def awq(
    weights: Mapping[str, torch.Tensor],
    pairs: Sequence[Pair],
    stats: Mapping[str, Stats],
    formats: Mapping[str, Format | None],
    steps: int = 10,
    rows: int = 128,
    quantize: Quantizer = weighted,
) -> list[Choice]:
    """Weights of a block, statistics (with Hessian) and formats by consumer -> the pairs worth scaling.

    steps: intervals of [0, 1] for each exponent. rows: number of sampled rows of all consumers. quantize: the
    rounding of the search. A pair that gains nothing is left out. CalibrationError without statistics.
    """
    chosen = []
    for pair in pairs:
        readers = readers_of(weights, pair, stats, formats, rows)
        if readers:
            scale = _search(weights, pair, readers, steps, quantize)
            if scale is not None:
                chosen.append((pair, scale))
    return chosen


def _search(
    weights: Mapping[str, torch.Tensor], pair: Pair, readers: list[Reader], steps: int, quantize: Quantizer
) -> torch.Tensor | None:
    """The best settled scale, or None if the unscaled weight is as good."""
    x, w = input_rms(pair, readers), column_rms(pair, readers)

    def scale(at: tuple[int, int]) -> torch.Tensor:
        return settled(weights, pair, ratio(x, at[0] / steps, w, at[1] / steps))

    def loss(s: torch.Tensor) -> float:
        return sum(weight_loss(reader, pair, s, quantize) for reader in readers)

    losses = {(0, 0): loss(torch.ones_like(x))}
    best = (0, 0)
    for turn in range(2 * ROUNDS):
        start = best
        for step in range(steps + 1):
            at = (start[0], step) if turn % 2 else (step, start[1])
            if at not in losses:
                losses[at] = loss(scale(at))
        best = min(losses, key=losses.__getitem__)
        if turn and best == start:
            break
    return None if best == (0, 0) else scale(best)
