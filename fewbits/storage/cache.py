"""The folder where what was fetched or made once is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$FEWBITS_CACHE, or ~/.cache/fewbits."""
    return Path(os.environ.get("FEWBITS_CACHE") or Path.home() / ".cache" / "fewbits")
