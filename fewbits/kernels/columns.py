"""Columns of a weight rounded one after the other, as algorithms/columns.py does: one launch a panel.

A program holds ROWS rows of the weight, all columns of them, in registers. In lockstep the rows are those of
several weights of n rows each, which have couplings, columns and pivots of their own. The rounding is that of
a grid as data (`core.Rounding`): scale and offset, or a sorted table of levels, in which it searches by
halving. Products and sums are rounded one by one, as in plain torch: nothing is fused.
"""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl

from ..core import Rounding

ROWS = 32
EXACT = {"enable_fp_fusion": False}


@triton.jit
def _nearest_integer(x):  # type: ignore[no-untyped-def]
    """Ties to the even one."""
    below = tl.floor(x)
    rest, odd = x - below, below - 2 * tl.floor(below * 0.5)
    return tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), below + 1, below)


@triton.jit
def _quantize_columns(  # type: ignore[no-untyped-def]
    state, coupling, group, scale, inverse, offset, zeros, levels, boundaries, level_codes, pivot, old,
    codes, values, moves, k, n, across, zero, top, count,
    TABLE: tl.constexpr, OFFSET: tl.constexpr, ZEROS: tl.constexpr, PIVOT: tl.constexpr,
    HALVINGS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    weight = tl.program_id(1)
    inside = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    there = inside < n
    rows = weight * n + inside
    coupling += weight * k * k
    group += weight * k
    pivot += weight * k
    tile = tl.load(
        state + columns[:, None] * across + rows[None, :],
        mask=(columns[:, None] < k) & there[None, :],
        other=0.0,
    )
    for j in range(k):
        x = tl.sum(tl.where(columns[:, None] == j, tile, 0.0), 0)
        at = tl.load(group + j) * across + rows
        by, over = tl.load(scale + at, mask=there, other=0.0), tl.load(inverse + at, mask=there, other=0.0)
        if TABLE:
            t = x * over
            place = tl.zeros([ROWS], dtype=tl.int32)
            for i in tl.static_range(HALVINGS):
                probe = place + (1 << (HALVINGS - 1 - i))
                edge = tl.load(boundaries + probe - 1, mask=probe < count, other=float("inf"))
                place = tl.where((t >= edge) & (probe < count), probe, place)
            code = tl.load(level_codes + place)
            value = by * tl.load(levels + place)
        else:
            base = tl.full([ROWS], 0.0, tl.float32) + zero
            if ZEROS:
                base = tl.load(zeros + at, mask=there, other=0.0)
            shift = tl.zeros([ROWS], dtype=tl.float32)
            if OFFSET:
                shift = tl.load(offset + at, mask=there, other=0.0)
            code = tl.minimum(tl.maximum(_nearest_integer((x - shift) * over) + base, 0.0), top)
            value = by * (code - base) + shift
        if PIVOT:
            move = tl.math.div_rn(x - value, tl.full([ROWS], 0.0, tl.float32) + tl.load(pivot + j))
        else:
            move = value - tl.load(old + j * across + rows, mask=there, other=0.0)
        pull = tl.load(coupling + j * k + columns, mask=(columns > j) & (columns < k), other=0.0)
        tile = tl.where(columns[:, None] > j, tile - pull[:, None] * move[None, :], tile)
        tl.store(codes + j * across + rows, code.to(tl.uint8), mask=there)
        tl.store(values + j * across + rows, value, mask=there)
        tl.store(moves + j * across + rows, move, mask=there)


def quantize_columns(
    state: torch.Tensor,
    coupling: torch.Tensor,
    rounding: Rounding,
    pivot: torch.Tensor | None,
    old: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous f32 state `(k, n)`, coupling `(k, k)` -> codes u8, values and moves `(k, n)`, there.

    pivot `(k,)`: moves are (state - value) / pivot; else from old `(k, n)`, value - old. In lockstep coupling
    `(e, k, k)`, rounding.group and pivot `(e, k)`, one for each e-th of the rows.
    """
    k, n = state.shape
    e = 1 if coupling.ndim == 2 else len(coupling)
    codes = torch.empty(k, n, dtype=torch.uint8, device=state.device)
    values, moves = torch.empty_like(state), torch.empty_like(state)
    levels, boundaries, level_codes = rounding.table or (state, state, state)
    zeros = rounding.zero if isinstance(rounding.zero, torch.Tensor) else None
    count = len(levels) if rounding.table else 0
    settings = {} if state.device.type == "cpu" else EXACT  # the interpreter takes none
    _quantize_columns[(ceil(n // e / ROWS), e)](
        state, coupling, rounding.group, rounding.scale, rounding.inverse,
        state if rounding.offset is None else rounding.offset, state if zeros is None else zeros,
        levels, boundaries, level_codes, state if pivot is None else pivot, state if old is None else old,
        codes, values, moves, k, n // e, n, 0.0 if zeros is not None else float(rounding.zero),
        float(rounding.top), count,
        TABLE=count > 0, OFFSET=rounding.offset is not None, ZEROS=zeros is not None,
        PIVOT=pivot is not None, HALVINGS=max(1, count - 1).bit_length(),
        COLUMNS=triton.next_power_of_2(k), ROWS=ROWS, **settings,
    )  # fmt: skip
    return codes, values, moves
