"""Clipping: a group's largest weights are clipped if that lowers the group's error (AWQ's second search).

    w' = clamp(w, -r top, r top)       top = max |w| of a group of a row, r from 1 down to 0.6
    r of each group minimizes  e H_gg e,   e = Q(w') - w,   H_gg the group's part of the Hessian

It changes the function, so it comes directly before rounding, after all other transforms. Formats already fit
each block under mean x^2; clipping adds the correlations inside a group. On blocks of the demo model it
lowered the output error of plain rounding to 4 bits by 3 to 23 percent; after `awq` the change was -13 to +7
percent. It is not for error feedback, which uses the whole Hessian and would approximate the clipped weight:
GPTQ was 16 to 29 percent worse with it.
"""

from __future__ import annotations

from math import gcd

import torch

from ..calibrate.stats import Stats
from ..errors import CalibrationError
from ..formats.base import Format
from .loss import Quantizer, weighted

RATIOS = tuple(1 - step / 20 for step in range(9))
WIDTH = 128  # columns of a group if the format has no groups


def clipped(
    w: torch.Tensor, format: Format, stats: Stats, quantize: Quantizer = weighted, width: int | None = None
) -> torch.Tensor:
    """`(n, k)` float -> `(n, k)` f32, clamped group by group. width: columns of a group, a divisor of k.

    CalibrationError without a Hessian.
    """
    n, k = w.shape
    if stats.hessian is None:
        raise CalibrationError("clipping needs a Hessian, which these statistics do not have; capture one")
    block = format.column_block(k)
    width = width or (block if block is not None and 1 < block <= WIDTH else gcd(k, WIDTH))
    parts = torch.stack([stats.hessian[at : at + width, at : at + width] for at in range(0, k, width)])
    groups = w.float().reshape(n, -1, width)
    top = groups.abs().amax(-1, keepdim=True)
    best, least = groups, torch.full(groups.shape[:2], torch.inf)
    for ratio in RATIOS:
        cut = groups.clamp(-ratio * top, ratio * top)
        error = quantize(cut.reshape(n, k), format, stats).decode().reshape(groups.shape) - groups
        loss = torch.einsum("ngi,gij,ngj->ng", error, parts, error)
        better = loss < least
        best = torch.where(better[..., None], cut, best)
        least = torch.where(better, loss, least)
    return best.reshape(n, k)
