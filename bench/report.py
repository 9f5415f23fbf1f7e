"""What every benchmark shares: the machine, its memory bandwidth, and the one line of JSON at the end."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fewbits import core


def best_of(runs: int, work: Callable[[], Any]) -> float:
    """Shortest wall time of `runs` calls, in seconds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def memory_bandwidth(threads: int, mib: int = 512) -> float:
    """Bytes per second that `threads` threads read from memory (a sum over an array beyond the caches)."""
    data = torch.ones(mib * 2**20 // 4, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return data.nbytes / best_of(3, data.sum)
    finally:
        torch.set_num_threads(before)


def machine() -> dict[str, Any]:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {"cpu": model, "cores": os.cpu_count(), "isa": core.isa(), "load": os.getloadavg()[0]}


def finish(name: str, rows: list[dict[str, Any]], short: list[str]) -> None:
    """Print the last line: `short` names each row that misses its stated target."""
    print(json.dumps({"benchmark": name, "machine": machine(), "rows": rows, "short": short}))
