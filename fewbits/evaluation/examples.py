"""Texts to evaluate a model on that generates none: one a line, or JSON lines with labels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import CalibrationError, raise_all

FAULTS = 20  # bad lines listed at most


Example = str | tuple[str, str]  # a text, or two that are read together: a premise and a hypothesis


@dataclass(frozen=True)
class Examples:
    """texts, and where they come from. labels: a class for each text, its name or number; or none at all."""

    texts: tuple[Example, ...]
    source: str
    labels: tuple[str | int, ...] = ()


def lines_of(text: str, source: str) -> Examples:
    """Every line that is not blank."""
    texts = tuple(line for line in text.splitlines() if line.strip())
    if not texts:
        raise CalibrationError(f"{source}: holds no text; give one text a line")
    return Examples(texts, source)


def labelled(text: str, source: str) -> Examples:
    """JSON lines: {"text": "...", "label": name or number of a class}, and "text_pair" for the second of two
    texts that are read together; CalibrationError: bad lines."""
    rows: list[tuple[Example, str | int]] = []
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        row = _parsed(line)
        first, second, label = row.get("text"), row.get("text_pair", ""), row.get("label")
        known = isinstance(label, str | int) and not isinstance(label, bool)
        if not (isinstance(first, str) and isinstance(second, str) and known):
            faults.append(f'line {number}: is not {{"text": a text, "label": a name or a number}}')
            continue
        assert isinstance(label, str | int)
        rows.append(((first, second) if "text_pair" in row else first, label))
    raise_all(CalibrationError, source, faults[:FAULTS])
    if not rows:
        raise CalibrationError(f"{source}: holds no line; give one object a line, with text and label")
    return Examples(tuple(text for text, _ in rows), source, tuple(label for _, label in rows))


def _parsed(line: str) -> dict[str, Any]:
    """The object of a line; an empty one for anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
