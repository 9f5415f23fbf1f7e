"""A plain-text table: words are left-aligned, numbers right-aligned, with a line below the head.

tensor       bits     error
-----------  ----  --------
q_proj        4.5   0.04113
o_proj          8  0.004120
"""

from collections.abc import Sequence

Cell = str | int | float | None


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], digits: int = 4) -> str:
    """Rows of cells -> text without a final newline.

    A column is right-aligned if each of its cells is a number or begins with a digit (`1.5 MiB`).
    Floats are shown with `digits` significant digits; None is shown as `-`.
    """
    texts = [[_text(cell, digits) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *texts, strict=True)]
    right = [all(map(_is_number, column)) for column in zip(*rows, strict=True)] or [False] * len(head)
    lines = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [list(head), ["-" * width for width in widths], *texts]
    ]
    return "\n".join(lines)


def _is_number(cell: Cell) -> bool:
    return not isinstance(cell, str) or cell[:1].isdigit()


def _text(cell: Cell, digits: int) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.0f}" if 10**digits <= abs(cell) < 1e15 else f"{cell:#.{digits}g}"
    return str(cell)


def size(nbytes: float) -> str:
    """Readable size in powers of 1024: 1536 -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
