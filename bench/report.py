"""What every benchmark shares: the machine and its limits, other processes watched, the last line of JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
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


def multiplying(dtype: torch.dtype, rows: int = 4096, n: int = 1536, k: int = 576) -> float:
    """FLOP per second of a linear layer of the demo model's shape, with torch's threads."""
    x, w = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
    torch.nn.functional.linear(x, w)
    return 2 * rows * n * k / best_of(5, lambda: torch.nn.functional.linear(x, w))


def peak_of(
    command: Sequence[str],
    out: Path | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> tuple[int, float, int]:
    """Run a command -> its peak resident bytes (VmHWM: mapped file pages count), seconds, exit code.

    out: gets its stdout. environment: added to ours. folder: to run in.
    """
    start, peak = time.monotonic(), 0
    with (out or Path(os.devnull)).open("wb") as file:
        environment = {**os.environ, **(environment or {})}
        process = subprocess.Popen(command, stdout=file, env=environment, cwd=folder)
        status = Path(f"/proc/{process.pid}/status")
        try:
            while process.poll() is None:
                try:
                    lines = status.read_text().splitlines()
                except (FileNotFoundError, ProcessLookupError):
                    break
                peak = max([peak, *(int(li.split()[1]) * 1024 for li in lines if li.startswith("VmHWM"))])
                time.sleep(0.05)
            code = process.wait()
        finally:
            process.kill()
    return peak, time.monotonic() - start, code


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
