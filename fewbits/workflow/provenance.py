"""Where an output comes from and what made it: digests of files, versions, the fingerprint of a run."""

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
from ..files.checkpoint import Checkpoint
from ..release.receipt import FileDigest
from ..version import VERSION


def input_files(checkpoint: Checkpoint) -> list[Path]:
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return sorted({root / tensor.file for tensor in checkpoint.tensors.values()})


def fingerprint(checkpoint: Checkpoint, asked: Mapping[str, object]) -> dict[str, str]:
    """All that decides the output's bytes besides its layout, by name; a run is resumed where it is the same.

    asked: what the user asks for (`fingerprint_fields`). In, besides: the input's files and config.json (a
    base of the rotary embedding changes what weights read), the versions of fewbits and torch, and the
    instruction set that torch computes with. In where weights meet activations: torch's threads, for a
    product of matrices sums in another order. Left out: the core's instruction set, which changes no bit.
    Measured with torch 2.13, 7 formats: torch without AVX2 rounds some weights otherwise in every algorithm;
    2 threads for 1 change gptq, and not rtn, hqq or weighted; FEWBITS_ISA changes none.
    """
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in input_files(checkpoint)]
    fields = {
        "input files": _digest(stats),
        "config": _digest(checkpoint.config),
        **asked,
        "fewbits": VERSION,
        "torch": torch.__version__,
        "instruction set": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
    return {name: json.dumps(value, sort_keys=True, default=str) for name, value in fields.items()}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_file(path: Path, stopped: Callable[[], bool] = lambda: False) -> FileDigest:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while not stopped() and (piece := file.read(4 * 2**20)):
            digest.update(piece)
    return FileDigest(path.name, path.stat().st_size, digest.hexdigest())


class InputDigests:
    """SHA-256 of every input file, taken beside the work: the bytes are in the page cache anyway. Used as a
    context: a run that fails reads no further."""

    def __init__(self, checkpoint: Checkpoint):
        files = input_files(checkpoint)
        self._found: list[FileDigest] = []
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
                self._found.append(digest_file(path, self._stop.is_set))
        except OSError as error:
            self._failed = error

    def result(self) -> tuple[FileDigest, ...]:
        self._thread.join()
        if self._failed is not None:
            raise FileError(f"input cannot be read again for its digest: {self._failed}") from self._failed
        return tuple(self._found)


def versions() -> dict[str, str]:
    return {
        "fewbits": VERSION,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "isa": core.isa(),
    }
