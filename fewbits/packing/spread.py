"""Classes of the codes of a matrix: how far they spread around zero, by their row and column.

Rows whose weights are large have wide codes where one step serves all rows, and so have columns. A code of
spread sigma takes about log2 sigma + 2 bits, which a table for all codes misses:

    class of code (i, j) = row_i + column_j          in quarters of an octave of sigma

The same class has the same table in every tensor of a file. Rows and columns are stored a byte each.
"""

from __future__ import annotations

import torch

CLASSES = 64
STEPS = 4  # classes to an octave: half a class more or less costs 0.004 bits
ZERO = 16  # the class of sigma 1
AT_ONCE = 2**22


def fitted(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `(n, k)` u8 around 128 -> rows `(n,)` and columns `(k,)`, u8."""
    n, k = codes.shape
    rows, columns = torch.ones(n), torch.ones(k)
    step = max(1, AT_ONCE // k)
    for _ in range(2):
        above = torch.zeros(k)
        for start in range(0, n, step):
            here = slice(start, start + step)
            square = (codes[here].float() - 128).square_()
            rows[here] = (square / columns).mean(1).clamp(min=2.0**-12)
            above += (square / rows[here, None]).sum(0)
        columns = (above / n).clamp(min=2.0**-12)
    return _steps(rows, ZERO), _steps(columns, CLASSES // 2)


def classes(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Rows `(n,)` and columns `(k,)` u8 -> the class of each code, `(n, k)` u8."""
    both = rows.to(torch.int16)[:, None] + columns.to(torch.int16) - CLASSES // 2
    return both.clamp_(0, CLASSES - 1).to(torch.uint8)


def _steps(square: torch.Tensor, zero: int) -> torch.Tensor:
    """Mean squares -> classes of their roots."""
    return (square.log2() * (STEPS / 2)).round().add(zero).clamp(0, CLASSES - 1).to(torch.uint8)
