"""A pair is used only if the block's output stays where it was: measured, not believed.

    move = |block(rewritten) - block(as it was)| / |block(as it was)|        Frobenius, on a sample

All pairs are tried together, which is one run; only if that moves, they are added one at a time, and
those that move it are left out. An expert that no token
of the sample reaches is not seen by this: its pair has the structure of the others'.
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
    """Scaled pairs -> those that leave the output alone, and {name: measured move} of the dropped.

    run: tensors to replace -> the block's output on a sample, with the others as they were.
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
