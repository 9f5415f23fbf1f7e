"""Quantizing block by block: `run.py` walks the model, `job.py` does one block, `settings.py` says how."""

from .run import MEASURED, quantize_blocks
from .settings import Run, Streaming

__all__ = ["MEASURED", "Run", "Streaming", "quantize_blocks"]
