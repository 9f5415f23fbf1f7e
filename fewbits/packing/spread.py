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
LEAST = 2.0**-12  # share of a code that occurs at all, in a coder's table
SIDE = 3  # bits that the class of a row or column takes, compressed


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


def coded_bits(codes: torch.Tensor) -> float:
    """Codes `(n, k)` u8 around 128 -> bits that their classes' tables leave of them, rows and columns
    included."""
    rows, columns = fitted(codes)
    counts = counted(codes, rows, columns)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    share = torch.where(counts > 0, share.double().clamp(min=LEAST), 0.0)  # as coders store it
    share /= share.sum(1, keepdim=True).clamp(min=LEAST)
    lengths = -share.clamp(min=LEAST / 2).log2()
    return float((counts * lengths).sum()) + SIDE * (len(rows) + len(columns))


def counted(codes: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """How often each code occurs in each class, `(64, 256)` int64."""
    counts = torch.zeros(CLASSES * 256, dtype=torch.int64)
    step = max(1, AT_ONCE // codes.shape[1])
    for start in range(0, len(codes), step):
        here = slice(start, start + step)
        both = classes(rows[here], columns).int().mul_(256).add_(codes[here])
        counts += torch.bincount(both.flatten(), minlength=len(counts))
    return counts.view(CLASSES, 256)


def _steps(square: torch.Tensor, zero: int) -> torch.Tensor:
    """Mean squares -> classes of their roots."""
    return (square.log2() * (STEPS / 2)).round().add(zero).clamp(0, CLASSES - 1).to(torch.uint8)
