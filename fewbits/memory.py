"""Memory as the kernel counts it: what is free, and the most that this process had resident."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

_FREE = Path("/proc/meminfo")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def free_memory() -> int:
    """Bytes that can be taken without swapping (Linux: MemAvailable; elsewhere what the machine has)."""
    if _FREE.exists():
        for line in _FREE.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def reset_peak_memory() -> None:
    """Begin a new peak where the system allows it (Linux); otherwise the peak is of the whole process."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def peak_memory() -> int:
    """Largest resident set in bytes since the last reset."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
