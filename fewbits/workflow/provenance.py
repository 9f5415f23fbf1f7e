"""Where an output comes from and what made it: digests of files, versions, the fingerprint of a run."""

from __future__ import annotations

import hashlib
import json
import platform
import threading
from pathlib import Path
from typing import Any

import torch

from .. import core
from ..errors import FileError
from ..files.checkpoint import Checkpoint
from ..release.receipt import FileDigest
from ..version import VERSION


def input_files(checkpoint: Checkpoint) -> list[Path]:
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return sorted({root / tensor.file for tensor in checkpoint.tensors.values()})


def fingerprint(checkpoint: Checkpoint, asked: list[Any]) -> str:
    """All that decides the output's bytes besides its layout: input files, what was asked, version."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in input_files(checkpoint)]
    return hashlib.sha256(json.dumps([stats, asked, VERSION]).encode()).hexdigest()


def digest_file(path: Path) -> FileDigest:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(4 * 2**20):
            digest.update(piece)
    return FileDigest(path.name, path.stat().st_size, digest.hexdigest())


class InputDigests:
    """SHA-256 of every input file, taken beside the work: the bytes are in the page cache anyway."""

    def __init__(self, checkpoint: Checkpoint):
        files = input_files(checkpoint)
        self._found: list[FileDigest] = []
        self._failed: OSError | None = None
        self._thread = threading.Thread(target=self._run, args=(files,), daemon=True)
        self._thread.start()

    def _run(self, files: list[Path]) -> None:
        try:
            for path in files:
                self._found.append(digest_file(path))
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
