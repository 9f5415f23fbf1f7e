"""Where a model runs: the CPU, or a device that torch knows under a name ("cuda", "cuda:1", "mps", "xpu").

auto        the GPU with the most free memory, else the CPU
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from .errors import KernelError
from .lazy import torch
from .memory import memory_left

AUTO = "auto"
GPUS = ("cuda", "xpu", "mps")
SECONDS = 0.2  # between two looks at how busy a device is


@dataclass(frozen=True)
class Room:
    """Where a model runs, by the name of a device, and the bytes that this process may still take: None for
    all that are free."""

    device: str = "cpu"
    left: int | None = None

    def places(self) -> list[tuple[torch.device, int]]:
        """The devices to try in turn, each with the bytes that are free for a model there; what runs on a GPU
        is loaded by the CPU first. `auto` falls back to the CPU."""
        device = device_of(self.device)
        free = memory_left(None) if self.left is None else self.left
        here = (torch.device("cpu"), free)
        if device.type == "cpu":
            return [here]
        there = free_device_memory(device)
        first = (device, free if there is None else min(free, there))
        return [first, here] if self.device == AUTO else [first]

    def place_for(self, nbytes: int) -> tuple[torch.device, int]:
        """The first of `places` with so many bytes free, else the last."""
        places = self.places()
        return next((place for place in places if nbytes <= place[1]), places[-1])


def device_of(name: str = AUTO) -> torch.device:
    """A name -> the device. KernelError for one that torch does not know or does not find here."""
    if name == AUTO:
        return _freest()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise KernelError(f"device {name!r}: torch knows no such device; use auto, cpu or cuda") from error
    if device.type == "cpu":
        return torch.device("cpu")
    count = _count(device.type)
    if not count:
        raise KernelError(f"device {name}: torch finds no {device.type} device here; use cpu")
    if (device.index or 0) >= count:
        raise KernelError(f"device {name}: there are {count}, numbered from 0")
    return device


def free_device_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, what torch has reserved and does not use included. None where torch
    cannot tell, and for the CPU: see memory.py."""
    module = _module(device.type)
    if device.type == "cpu" or not hasattr(module, "mem_get_info"):
        return None
    kept = module.memory_reserved(device) - module.memory_allocated(device)
    return int(module.mem_get_info(device)[0]) + int(kept)


class Busy:
    """Within, looks every SECONDS at how busy a device is. share: the mean, from 0 to 1; None where torch
    cannot tell (for CUDA it asks nvidia-ml-py, if that is installed)."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seen = device, list[float]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    @property
    def share(self) -> float | None:
        return sum(self.seen) / len(self.seen) / 100 if self.seen else None

    def _look(self) -> None:
        look = getattr(_module(self.device.type), "utilization", None)
        while look is not None and not self._stop.wait(SECONDS):
            try:
                self.seen.append(float(look(self.device)))
            except (ImportError, RuntimeError):
                return

    def __enter__(self) -> Busy:
        if self.device.type != "cpu":
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()


def return_device_memory(device: torch.device) -> None:
    """Give memory that torch keeps for later back to the device."""
    module = _module(device.type)
    if device.type != "cpu" and hasattr(module, "empty_cache"):
        module.empty_cache()


def has_amx() -> bool:
    """Whether the CPU multiplies bf16 in tiles, some times faster than f32. Asked of the CPU, not timed: one
    machine always answers the same."""
    return bool(torch.cpu._is_amx_tile_supported())


def device_name(device: torch.device) -> str:
    """For receipts: with the model of a GPU."""
    module = _module(device.type)
    known = device.type != "cpu" and hasattr(module, "get_device_name") and _count(device.type) > 0
    return f"{device} {module.get_device_name(device)}" if known else str(device)


def _freest() -> torch.device:
    for kind in GPUS:
        devices = [torch.device(kind, i) for i in range(_count(kind))]
        if devices:
            return max(devices, key=lambda device: free_device_memory(device) or 0)
    return torch.device("cpu")


def _count(kind: str) -> int:
    module = _module(kind)
    if module is None or not module.is_available():
        return 0
    return int(module.device_count()) if hasattr(module, "device_count") else 1


def _module(kind: str) -> Any:
    return getattr(torch, kind, None)
