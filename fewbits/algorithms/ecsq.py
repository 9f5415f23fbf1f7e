"""ECSQ, entropy-coded scalar quantization: one step for a weight, codes chosen by error and length.

An entropy coder (`fewbits pack`) stores a code c that has probability p(c) in length(c) = -log2 p(c) bits.
Rare codes may be large then: no weight is clipped, no row needs a scale of its own, and the step sets the
size. At a given mean length one step for all rows has the least squared error. Columns are taken as in
gptq.py, but each code is the one of least

    (state - step c)^2 / U_jj^2  +  lambda length(c)           lambda = 2 ln 2 * mean loss of a weight

lambda is the slope of the loss against the bits of a weight, where one bit more leaves a quarter of the loss
(rate-distortion optimized quantization, RDOQ). Since lengths grow from the likeliest code on, ever faster,
the best code lies between two boundaries, which are off the middle between neighbours in favour of the
shorter:

    boundary(c, c+1) = step (c + 1/2) + lambda U_jj^2 / (2 step) (length(c+1) - length(c))

Two rounds of coordinate descent (descent.py) on the same sum follow. Lengths are those of the codes of the
pass before, first of plain rounding; passes are repeated with another step until the codes take `bits` each.

Sources: Chou, Lookabaugh, Gray, Entropy-constrained vector quantization (1989), for scalars; GPTQ, arXiv
2210.17323. A Gaussian takes 0.254 bits above the Shannon bound.
"""

from __future__ import annotations

import math

import torch

from ..calibrate.stats import Stats
from ..errors import FormatError, PlanError
from ..formats import Format
from ..formats.affine import Affine
from ..formats.cells import Cells
from ..packing.spread import coded_bits
from ..qtensor import QTensor
from .blocked import blocked_update
from .gptq import PIECE, column_order
from .hessian import DAMP, GPTAQ, HessianFactor, require_stats

BITS = 4.0
ROUNDS = 2  # of descent
PASSES = 5  # at most
CLOSE = 0.003  # of the bits asked
UNIT = 64  # columns rounded between matrix products
SLOPE = 2 * math.log(2) / 12  # lambda / step^2 where the loss is step^2 / 12: that of even errors
HALF, WIDE = 128, 2**15


def ecsq(
    w: torch.Tensor,
    format: Format,
    stats: Stats | None = None,
    bits: float = BITS,
    rate: float = 1.0,
    damp: float = DAMP,
    gptaq: float = GPTAQ,
) -> QTensor:
    """`(n, k)` float -> rows of integers whose codes take `bits` each when they are entropy-coded.

    rate: lambda, as a share of the one above; 0 rounds to nearest. Without statistics, as for embeddings,
    every error weighs the same. FormatError unless the format has one symmetric scale a row.
    """
    format.check(w)
    rows = row_integers(format)
    if not all(isinstance(each, (int, float)) for each in (bits, rate)) or not (
        0 < bits <= 7.5 and rate >= 0
    ):
        raise PlanError(f"ecsq: bits {bits}, rate {rate}; bits is above 0 and at most 7.5, rate 0 or more")
    k = w.shape[1]
    if stats is None:
        stats = Stats(0, None, torch.ones(k), torch.eye(k)).to(w.device)
    stats = require_stats(stats, w, "ecsq")
    hessian = HessianFactor.of(stats, damp, column_order(stats, k))
    target = hessian.target(w, stats, gptaq)
    step = first_step(target, bits)
    counts = counts_of(target / step)
    for _ in range(PASSES):
        scale, lengths = row_steps(target, step, rows), longer(counts)
        parts = [
            chosen(part / steps, hessian, lengths, rate)
            for part, steps in zip(
                target.split(max(1, PIECE // k)), scale.split(max(1, PIECE // k)), strict=True
            )
        ]
        counts = sum((counts_of(part) for part in parts), torch.zeros_like(counts))
        codes = torch.cat(parts).add_(HALF).to(torch.uint8)
        found = coded_bits(codes.cpu()) / codes.numel()
        if abs(found - bits) <= CLOSE * bits or entropy(counts) == 0:
            break
        step *= 2.0 ** (found - bits)
    return rows.pack(rows.grid((scale,), k), codes)


def row_integers(format: Format) -> Affine:
    """The format itself, if codes can be chosen for an entropy coder in it; FormatError otherwise."""
    kind = (format.bits, format.zero, format.cells) if isinstance(format, Affine) else None
    if isinstance(format, Affine) and kind == (8, "none", Cells(1, None)):
        return format
    raise FormatError(
        f"ecsq takes integers of 8 bits with one scale a row, not {format.name}; use int8_channel"
    )


def counts_of(codes: torch.Tensor) -> torch.Tensor:
    """How often each of the codes -2^15 to 2^15 occurs; codes are rounded, and saturate."""
    whole = codes.round().clamp_(-WIDE, WIDE).add_(WIDE).flatten().int()
    return torch.bincount(whole, minlength=2 * WIDE + 1)


def entropy(counts: torch.Tensor) -> float:
    """Bits a code."""
    p = counts[counts > 0].double() / counts.sum()
    return max(0.0, float(-(p * p.log2()).sum()))


def first_step(target: torch.Tensor, bits: float) -> float:
    """The step of which plain rounding has this entropy."""
    size = float(target.square().mean().sqrt()) or 1.0
    sample = target.flatten()[:: max(1, target.numel() // 2**18)] / size
    low, high = -10.0, 4.0
    for _ in range(12):
        middle = (low + high) / 2
        more = entropy(counts_of(sample / 2.0**middle)) > bits
        low, high = (middle, high) if more else (low, middle)
    return size * 2.0**low


def row_steps(target: torch.Tensor, step: float, format: Affine) -> torch.Tensor:
    """`(n, 1)`: the step as it is stored; larger for a row that it would take out of the codes' range."""
    reach = target.abs().amax(1, keepdim=True) / (HALF - 1)
    least = torch.finfo(format.dtype).smallest_normal
    return format.stored(reach.clamp(min=step)).clamp(min=least)


def longer(counts: torch.Tensor) -> torch.Tensor:
    """Counts of codes -> `(255,)` f32: by how many bits each code from -127 on is longer than the one before.
    Rising, as boundaries must be: where few codes were counted, differences are those nearer to zero."""
    inside = counts[WIDE - HALF : WIDE + HALF].double() + 0.5
    differences = -inside.log2().diff()
    up = differences[HALF:].clamp(min=0).cummax(0).values
    down = differences[:HALF].clamp(max=0).flip(0).cummin(0).values.flip(0)
    return torch.cat([down, up]).float()


def boundaries(lengths: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """lengths: of `longer`; weight `(c,)`: lambda over the error of a step, for each column -> `(c, 255)`:
    where, in steps, each code from -127 on begins."""
    middles = torch.arange(0.5 - HALF, HALF - 1, device=lengths.device)
    return middles + weight[:, None] / 2 * lengths


def chosen(target: torch.Tensor, hessian: HessianFactor, lengths: torch.Tensor, rate: float) -> torch.Tensor:
    """Rows `(n, k)` in steps -> codes `(n, k)`, whole f32: by feedback, then descent."""
    order, pivot, wanted = hessian.order, hessian.factor.diagonal(), target.T
    slope = rate * SLOPE * float(pivot.pow(-2).mean())
    edges = boundaries(lengths, slope * pivot.square())
    codes = _rounded(wanted[order].contiguous(), hessian.factor, edges, pivot=pivot)[order.argsort()]
    diagonal = hessian.hessian.diagonal()
    coupling, edges = hessian.hessian / diagonal, boundaries(lengths, slope / diagonal)
    for _ in range(ROUNDS):
        best = codes - (hessian.hessian @ (codes - wanted)) / diagonal[:, None]
        codes = _rounded(best, coupling, edges, old=codes)
    return codes.T.contiguous()


def _rounded(
    state: torch.Tensor,
    coupling: torch.Tensor,
    edges: torch.Tensor,
    pivot: torch.Tensor | None = None,
    old: torch.Tensor | None = None,
) -> torch.Tensor:
    """State `(k, n)` -> codes `(k, n)`: as in columns.py, each column by boundaries of its own."""
    codes, moves = torch.empty_like(state), torch.empty_like(state)

    def quantize(start: int, stop: int) -> None:
        here, inner = state[start:stop].clone(), coupling[start:stop, start:stop]
        for i, j in enumerate(range(start, stop)):
            codes[j] = torch.bucketize(here[i], edges[j], right=True).sub_(HALF)
            if pivot is not None:
                moves[j] = (here[i] - codes[j]) / pivot[j]
            elif old is not None:
                moves[j] = codes[j] - old[j]
            here[i + 1 :] -= inner[i, i + 1 :, None] * moves[j]

    blocked_update(state, coupling, moves, quantize, UNIT)
    return codes
