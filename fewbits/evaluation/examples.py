"""Texts to evaluate a model on that generates none: one a line, or JSON lines with labels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import CalibrationError, raise_all

FAULTS = 20  # bad lines listed at most


@dataclass(frozen=True)
class Examples:
    """texts, and where they come from. labels: a class for each text, its name or number; or none at all."""

    texts: tuple[str, ...]
    source: str
    labels: tuple[str | int, ...] = ()


def lines_of(text: str, source: str) -> Examples:
    """Every line that is not blank."""
    texts = tuple(line for line in text.splitlines() if line.strip())
    if not texts:
        raise CalibrationError(f"{source}: holds no text; give one text a line")
    return Examples(texts, source)


def labelled(text: str, source: str) -> Examples:
    """JSON lines: {"text": "...", "label": name or number of a class}; CalibrationError: bad lines."""
    rows, faults = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        row = _parsed(line)
        label = row.get("label") if isinstance(row, dict) else None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or type(label) not in (str, int):
            faults.append(f'line {number}: is not {{"text": a text, "label": a name or a number}}')
            continue
        rows.append((row["text"], label))
    raise_all(CalibrationError, source, faults[:FAULTS])
    if not rows:
        raise CalibrationError(f"{source}: holds no line; give one object a line, with text and label")
    texts, labels = zip(*rows, strict=True)
    return Examples(texts, source, labels)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
