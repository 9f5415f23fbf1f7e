"""A pair is used only if the block's output is unchanged, which is measured.

    move = |block(rewritten) - block(original)| / |block(original)|          Frobenius, on a sample

All pairs are tried together in one run. If that changes the output, they are added one at a time, and those
that change it are dropped. An expert without tokens in the sample is not checked; its pair has the structure
of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..errors import CalibrationError
from .pairs import Choice, applied

# A block in f32 computed in another order moves by 1e-7 to 1e-6; a wrong pair by 1e-3 and more.
TOLERANCE = 1e-4

Run = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


def checked(
    weights: Mapping[str, torch.Tensor], chosen: Sequence[Choice], run: Run, tolerance: float = TOLERANCE
) -> tuple[list[Choice], dict[str, float]]:
    """Scaled pairs -> those that preserve the output, and {name: measured move} of the dropped ones.

    run: tensors to replace -> the block's output on a sample, with the others unchanged.
    """
    if not chosen:
        return [], {}
    before = run({}).float()
    norm = float(torch.linalg.vector_norm(before, dtype=torch.float64))
    if not 0 < norm < float("inf"):
        raise CalibrationError(f"the block's output on the sample has norm {norm}; nothing can be compared")

    def moved(pairs: Sequence[Choice]) -> float:
        after = run(applied(weights, pairs)).float() - before
        return float(torch.linalg.vector_norm(after, dtype=torch.float64)) / norm

    if moved(chosen) <= tolerance:
        return list(chosen), {}
    kept: list[Choice] = []
    dropped = {}
    for choice in chosen:
        move = moved([*kept, choice])
        if move <= tolerance:
            kept.append(choice)
        else:
            dropped[choice[0].name] = move
    return kept, dropped
