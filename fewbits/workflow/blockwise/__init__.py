"""Quantizing block by block: `run.py` walks the model, `job.py` does one block, `settings.py` says how."""

from .run import TRAINED, quantize_blocks
from .settings import Run, Streaming

__all__ = ["TRAINED", "Run", "Streaming", "quantize_blocks"]
