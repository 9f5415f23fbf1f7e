"""Memory of this process and of the machine, from the kernel."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_INFO = Path("/proc/meminfo")
# The parameters of mallopt, in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# Limit and use of a container: cgroup v2, then v1.
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


@dataclass(frozen=True)
class Need:
    """What work takes. way: how it is done, in words. peak: bytes that the process has at most; here: that it
    has already. scratch: bytes on disk beside the output, until the end. device: the GPU it is done on, if it
    is, and the bytes that it takes there."""

    way: str
    peak: int
    here: int
    scratch: int = 0
    device: tuple[str, int] | None = None

    def line(self) -> str:
        there = f", {self.device[1] / 2**30:.2f} GiB on {self.device[0]}" if self.device else ""
        return f"needs {self.peak / 2**30:.2f} GiB of memory at most{there} ({self.way})"


def reset_peak_memory() -> None:
    """Start a new peak, where the system supports it (Linux); otherwise the peak is that of the whole
    process."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5", encoding="utf-8")


def peak_memory() -> int:
    """Largest resident set in bytes since the last reset."""
    resident = _status("VmHWM")
    if resident is not None:
        return resident
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Resident bytes of this process, or its peak if the system does not report them."""
    resident = _status("VmRSS")
    return peak_memory() if resident is None else resident


def return_freed_memory() -> None:
    """Give freed memory back to the system. glibc keeps what lies between live pieces of less than 32 MiB:
    half a GiB between two weights of a 7B model. Nothing happens with another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, glibc keeps what is freed for the next arrays. Otherwise it gives large ones back each time,
    and new pages from the kernel take longer than the arithmetic on them: nearly half of a training step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, 65536)
        mallopt(_MMAP_THRESHOLD, 2**25)  # the most that glibc sets these two to by itself
        mallopt(_TRIM_THRESHOLD, 2**26)
        return_freed_memory()


def left_of(limit: int | None) -> int | None:
    """Bytes that this process may still take within a limit; None if there is no limit."""
    return None if limit is None else max(0, limit - resident_memory())


def memory_left(limit: int | None) -> int:
    """Bytes that this process may still take: of its limit, or where none is set what is free."""
    left = left_of(limit)
    return free_memory() if left is None else left


def free_memory() -> int:
    """Bytes that this process may still take: the available memory of the machine, or of its container if
    that is less."""
    free = [_available()]
    for limit, used in _GROUPS:
        with contextlib.suppress(OSError, ValueError):
            free.append(int(limit.read_text(encoding="utf-8")) - int(used.read_text(encoding="utf-8")))
    return max(0, min(free))


def _status(name: str) -> int | None:
    """A line of /proc/self/status in bytes; None if there is no such file (not Linux)."""
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def _available() -> int:
    if _INFO.exists():
        for line in _INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
