"""The finished blocks of a run that quantizes block by block, kept until its output is written.

    <output>.blocks/run.json            {"blocks": 2, "input": fingerprint}
                    block-0003.safetensors   planes of each tensor, as in a native directory
                    block-0003.json          formats, shapes, notes, SHA-256 of the planes; written last

A block is complete when its JSON exists. A killed run therefore loses at most the current block, which is
written again. The folder is locked while a run works on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..dtypes import dtype_of
from ..errors import FileError
from ..files.checkpoint import LazyTensor
from ..files.directory import laid_out
from ..files.native import NATIVE, indexed_tensors
from ..files.output import planes_of
from ..formats.base import Kind
from ..qtensor import QTensor
from ..storage.atomic import as_bytes, make_directory, write_atomic, write_file_atomic
from ..storage.json import read_json_object
from ..storage.stream import Fingerprint, difference

VERSION = 2
NAMES = (
    *(f"block-{'[0-9]' * 4}.{end}" for end in ("json", "safetensors")),
    "distill.state",
    "distill.teacher",
    "run.json",
)
OURS = (
    *NAMES,
    *(f".{name}.*.tmp" for name in NAMES),
)  # the second: temporary files that a killed storage/atomic.py leaves
Value = torch.Tensor | QTensor


def check_ours(folder: Path) -> None:
    """FileError for a non-empty folder that no run of fewbits made."""
    run = folder / "run.json"
    if run.is_file():
        ours = "blocks" in read_json_object(run)
    else:  # a kill while run.json was written leaves its temporary file
        ours = not folder.is_dir() or all(path.match(".run.json.*.tmp") for path in folder.iterdir())
    if not ours:
        raise FileError(
            f"{folder}: is in the way: a calibrated run keeps its finished blocks under this name, but "
            "no run made this folder; move it, or choose another output"
        )


class BlockStore:
    """Blocks by number, each a mapping name -> float tensor or QTensor with notes.

    with BlockStore(folder, fingerprint, overwrite) as store:
        if not store.has(i):
            store.write(i, tensors, notes)
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint, overwrite: bool = False):
        self.folder = folder
        check_ours(folder)
        make_directory(folder)
        self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise FileError(f"{folder}: another process is working on this output; wait for it") from error
        try:
            self._claim({"blocks": VERSION, "input": fingerprint}, overwrite)
        except BaseException:
            os.close(self._lock)
            raise

    def _claim(self, identity: dict[str, Any], overwrite: bool) -> None:
        run = self.folder / "run.json"
        stored = read_json_object(run) if run.exists() else None
        if stored is not None and stored != identity:
            if not overwrite:
                other = difference(stored, identity)
                raise FileError(
                    f"{self.folder}: holds the finished blocks of another run; {other}: run as it was run, "
                    "delete the folder, or pass overwrite"
                )
            self._unlink()
        write_atomic(run, json.dumps(identity).encode())

    def has(self, block: int) -> bool:
        return self._index(block).exists()

    def write(self, block: int, tensors: Mapping[str, Value], notes: Mapping[str, Any]) -> None:
        """Store a block; it is durable on return. notes: any JSON values."""
        rows = {name: (_kind(value), tuple(value.shape)) for name, value in tensors.items()}
        header, _, _ = laid_out(NATIVE, rows)
        parts: list[bytes | memoryview] = [header]
        for value in tensors.values():
            if isinstance(value, QTensor):
                parts += [as_bytes(plane) for plane in planes_of(value)]
            else:
                parts.append(as_bytes(value))
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        write_file_atomic(self._planes(block), parts)
        index = {
            "sha256": digest.hexdigest(),
            "tensors": {
                name: {"format": _kind(value).name, "shape": list(value.shape)}
                for name, value in tensors.items()
                if isinstance(value, QTensor)
            },
            "notes": dict(notes),
        }
        write_atomic(self._index(block), json.dumps(index).encode())

    def read(self, block: int) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
        """-> the block's tensors, mapped, and its notes; FileError for a damaged one."""
        index, path = read_json_object(self._index(block)), self._planes(block)
        rows, notes, sha256 = index.get("tensors"), index.get("notes"), index.get("sha256")
        if not isinstance(rows, dict) or not isinstance(notes, dict):
            raise FileError(f"{self._index(block)}: is not an index of a block; delete it and run again")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise FileError(
                    f"{path}: has changed since it was written; delete {self.folder} and run again"
                )
        return indexed_tensors(path, rows), notes

    def remove(self) -> None:
        """Delete the finished blocks, and the folder if it is empty then; the output is written."""
        self._unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _unlink(self) -> None:
        """Delete only the files that fewbits wrote here."""
        for pattern in OURS:
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            os.close(self._lock)

    def _planes(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"

    def _index(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.json"


def _kind(value: Value) -> Kind:
    return value.format if isinstance(value, QTensor) else dtype_of(value.dtype)
