"""The origin of an output: digests of files, versions, the fingerprint of a run."""

from __future__ import annotations

import hashlib
import json
import platform
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .. import core
from ..errors import FileError
from ..files.checkpoint import MEMORY, Checkpoint, LazyTensor
from ..qtensor import QTensor
from ..release.receipt import FileDigest
from ..storage.atomic import as_bytes
from ..version import VERSION


def input_files(checkpoint: Checkpoint) -> list[Path]:
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return sorted({root / tensor.file for tensor in checkpoint.tensors.values() if tensor.file != MEMORY})


def fingerprint(checkpoint: Checkpoint, options: Mapping[str, object]) -> dict[str, str]:
    """The values that decide the output's bytes besides its layout, by name. A run is resumed only if they
    are equal.

    options: the user's request (`fingerprint_fields`). Also included: the input's files and config.json
    (which holds the base of the rotary embedding), the versions of fewbits and torch, and the instruction set
    of torch. If activations are used: torch's threads, because matrix products then sum in another order. Not
    included: the core's instruction set, which changes no bit. Measured with torch 2.13 and 7 formats: torch
    without AVX2 rounds some weights differently in every algorithm; 2 threads instead of 1 change gptq, but
    not rtn, hqq or weighted; FEWBITS_ISA changes none."""
    stats: list[tuple[object, ...]] = [
        (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in input_files(checkpoint)
    ]
    stats += [(name, _digest_of(t)) for name, t in checkpoint.tensors.items() if t.file == MEMORY]
    fields = {
        "input files": _digest(stats),
        "config": _digest(checkpoint.config),
        **options,
        "fewbits": VERSION,
        "torch": torch.__version__,
        "instruction set": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
    return {name: json.dumps(value, sort_keys=True, default=str) for name, value in fields.items()}


def _digest_of(tensor: LazyTensor) -> str:
    """Of its values."""
    value, digest = tensor.load(), hashlib.sha256()
    for part in value.planes.values() if isinstance(value, QTensor) else (value,):
        digest.update(as_bytes(part.detach().cpu()))
    return digest.hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_file(path: Path, stopped: Callable[[], bool] = lambda: False) -> FileDigest:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while not stopped() and (piece := file.read(4 * 2**20)):
            digest.update(piece)
    return FileDigest(path.name, path.stat().st_size, digest.hexdigest())


class InputDigests:
    """SHA-256 of every input file, computed in parallel with the run, while the bytes are in the page cache.
    A context manager: a failed run stops reading."""

    def __init__(self, checkpoint: Checkpoint):
        files = input_files(checkpoint)
        self._digests: list[FileDigest] = []
        self._failed: OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(files,), daemon=True)

    def __enter__(self) -> InputDigests:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self, files: list[Path]) -> None:
        try:
            for path in files:
                self._digests.append(digest_file(path, self._stop.is_set))
        except OSError as error:
            self._failed = error

    def result(self) -> tuple[FileDigest, ...]:
        self._thread.join()
        if self._failed is not None:
            raise FileError(f"input cannot be read again for its digest: {self._failed}") from self._failed
        return tuple(self._digests)


def versions() -> dict[str, str]:
    return {
        "fewbits": VERSION,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "isa": core.isa(),
    }
