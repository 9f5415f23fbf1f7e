"""The curve of a training run as a picture, by matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from ..storage.atomic import write_atomic

NAME = "training.png"


def plot(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Evaluations, each with step, learned (loss since the last, or None) and held_out -> a PNG file;
    False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["step"] for row in history], [row["held_out"] for row in history], "o-", label="held out")
    seen = [row for row in history if row["learned"] is not None]
    axes.plot(
        [row["step"] for row in seen], [row["learned"] for row in seen], ".--", label="loss, training text"
    )
    best = min(history, key=lambda row: float(row["held_out"]))
    axes.axvline(best["step"], color="grey", linewidth=0.8, label=f"written: step {best['step']}")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=120, metadata={"Software": None})
    write_atomic(path, drawn.getvalue())
    return True
