"""One file, written piece by piece, that survives a kill at any moment.

    <path>.partial   header | entry | zeros | entry ...       every byte at its final place
    <path>.journal   {"journal": 2, "layout": ..., "input": ...}      the run's fingerprint
                     {"name": ..., "nbytes": ..., "sha256": ..., "note": ...}      one line an entry
    <path>           appears by rename, when all entries are there and durable

The layout is fixed at the start, so pieces can be written in any order, and gaps stay zero. A journal line is
written only after its bytes have reached the disk. A run that finds a journal with the same fingerprint
checks each line's digest against the partial file, drops the first mismatch and all lines after it, and
continues. The finished file is therefore byte-identical to that of an uninterrupted run. The journal remains
after the rename if its owner still writes a receipt from its notes. It is also the lock file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from ..errors import FileError, raise_all
from ..lazy import torch
from .atomic import Chunk, as_bytes, failed, sync_directory

SYNC_BYTES = 256 * 2**20  # bytes written between two syncs: the work that a power cut may lose
SYNC_SECONDS = 2.0
SHORT = 40  # characters of a value that a message shows
READ_BYTES = 4 * 2**20  # bytes read at once to check a digest

_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has fsync only


Fingerprint: TypeAlias = "str | Mapping[str, str]"


def difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The differences of two fingerprints by name, with short values."""
    before, now = (
        side if isinstance(side, dict) else {"input": side} for side in (stored.get("input"), wanted["input"])
    )
    names = [name for name in {**now, **before} if now.get(name) != before.get(name)]
    parts = [
        f"{name} (it: {before.get(name)}, this run: {now.get(name)})"
        if max(len(str(side.get(name))) for side in (before, now)) <= SHORT
        else name
        for name in names or ["layout"]
    ]
    return f"it differs in {', '.join(parts)}"


class Span(NamedTuple):
    """One entry of a file: its name and its bytes."""

    name: str
    offset: int
    nbytes: int


class StreamFile:
    """The writer of large files: resumable, atomic, locked. Made by `StreamFile.open`.

    with StreamFile.open(path, header, entries, fingerprint) as file:
        for name in names:
            if name not in file.done():
                file.write(name, chunks, note)
        file.finish()
    """

    def __init__(self, path: Path, header: bytes, entries: Sequence[Span], size: int):
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.journal = path.with_name(path.name + ".journal")
        self.size = size
        self.renamed = False
        self.digests: dict[str, str] = {}  # sha256 of each finished entry
        self._header = header
        self._entries = {span.name: span for span in entries}
        self._notes: dict[str, Any] = {}
        self._data = self._log = -1  # descriptors; -1 is closed
        self._first = b""  # the journal's first line
        self._log_end = 0
        self._pending: list[bytes] = []  # journal lines whose data may not be durable yet
        self._pending_bytes = 0
        self._synced = time.monotonic()

    @classmethod
    def open(
        cls,
        path: Path,
        header: bytes,
        entries: Sequence[tuple[str, int, int]],
        fingerprint: Fingerprint,
        overwrite: bool = False,
        align: int = 1,
    ) -> StreamFile:
        """Start or resume writing `path`: `header`, then `(name, offset, nbytes)` in offset order.

        fingerprint: the values that decide the content (input, plan, versions), by name; a partial file with
        another one is never continued. overwrite: replace a finished output, discard a partial one of another
        fingerprint. align: the file's size is rounded up to it with zeros.
        Raises FileError: an existing output or foreign partial file, locked, unwritable, too little disk.
        """
        path = Path(path)
        spans = [Span(*entry) for entry in entries]
        end = _check_layout(path, header, spans)
        file = cls(path, header, spans, end + -end % align)
        layout = hashlib.sha256(header + json.dumps([spans, file.size]).encode()).hexdigest()
        try:
            file._start({"journal": 2, "layout": layout, "input": fingerprint}, overwrite)
        except OSError as error:
            file._close()
            raise failed(path, error) from error
        except FileError:
            file._close()
            raise
        return file

    def _start(self, identity: dict[str, Any], overwrite: bool) -> None:
        """Lock; then the output is complete, or is resumed or begun."""
        self._log = _lock(self.journal)
        self._first = _line(identity)
        stored, rows = _read_journal(self.journal)
        same = stored == identity
        if same and not self.partial.exists() and self._is_complete(rows):
            self.renamed = True
            return
        if self.path.exists() and not overwrite:
            raise FileError(f"{self.path}: exists; choose another output or pass overwrite")
        if stored and not same and not overwrite:
            raise FileError(
                f"{self.partial}: is the unfinished output of another run; {difference(stored, identity)}: "
                f"run as it was run, delete it and {self.journal.name}, or pass overwrite"
            )
        if not stored and not self._begins_ours(self.partial):
            raise FileError(
                f"{self.partial}: is in the way: an unfinished output has this name, and fewbits did not "
                "write this file; move it, or choose another output"
            )
        _check_disk(self.path, self.size, self.partial)
        self._data = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        if same:
            self._resume(self.partial, rows)
        else:
            os.ftruncate(self._data, 0)
            self._log_end = len(self._first)
            os.ftruncate(self._log, 0)
        _write_all(self._log, self._first, 0)
        os.ftruncate(self._log, self._log_end)
        _write_all(self._data, self._header, 0)
        os.fsync(self._log)
        sync_directory(self.path.parent)

    def _begins_ours(self, partial: Path) -> bool:
        """Whether a file without a journal is empty, absent, or begins like this output."""
        if partial.is_symlink() or not partial.is_file():
            return True  # what cannot be opened is reported when it is opened
        with partial.open("rb") as file:
            return file.read(len(self._header)) in (b"", self._header)

    def _is_complete(self, rows: list[tuple[dict[str, Any], int]]) -> bool:
        """Whether a killed run had already renamed the output into place."""
        if len(rows) != len(self._entries) or not self.path.is_file():
            return False
        with self.path.open("rb") as file:
            if file.read(len(self._header)) != self._header or self.path.stat().st_size != self.size:
                return False
        self._resume(self.path, rows)
        return len(self._notes) == len(self._entries)

    def _resume(self, path: Path, rows: list[tuple[dict[str, Any], int]]) -> None:
        """Accept journal rows, checked against the bytes in `path`, up to the first mismatch."""
        self._notes.clear()
        self.digests.clear()
        self._log_end = len(self._first)
        with path.open("rb") as file:
            for row, end in rows:
                span = self._entries.get(row.get("name", ""))
                if span is None or span.name in self._notes or row.get("sha256") != _digest(file, span):
                    break
                self._notes[span.name], self.digests[span.name] = row.get("note"), row["sha256"]
                self._log_end = end

    def done(self) -> Mapping[str, Any]:
        """Finished entries with their notes; resumed ones were checked by digest."""
        return MappingProxyType(self._notes)

    def spans_of(self, names: Iterable[str]) -> list[Span]:
        return [self._entries[name] for name in names]

    def write(self, name: str, chunks: Chunk | Iterable[Chunk], note: Any = None) -> None:
        """Write all bytes of one entry, in any number of pieces.

        note: any JSON value; `done()` returns it in a resumed run.
        Raises FileError: unknown or finished entry, not exactly its bytes, or a failed write (the
        earlier entries stay resumable).
        """
        span = self._entries.get(name)
        if span is None or name in self._notes or self.renamed:
            fault = "is not an entry of this file" if span is None else "is already written"
            raise FileError(f"{self.path}: {name!r} {fault}; write each entry once")
        digest, position, end = hashlib.sha256(), span.offset, span.offset + span.nbytes
        for chunk in (
            [chunks] if isinstance(chunks, bytes | bytearray | memoryview | torch.Tensor) else chunks
        ):
            view = as_bytes(chunk)
            if len(view) > end - position:
                raise FileError(f"{self.path}: {name!r} got more than its {span.nbytes} bytes")
            try:
                _write_all(self._data, view, position)
            except OSError as error:
                raise failed(self.path, error) from error
            digest.update(view)
            position += len(view)
        if position != end:
            raise FileError(f"{self.path}: {name!r} got {position - span.offset} of its {span.nbytes} bytes")
        self._notes[name], self.digests[name] = note, digest.hexdigest()
        row = {"name": name, "nbytes": span.nbytes, "sha256": digest.hexdigest(), "note": note}
        self._pending.append(_line(row))
        self._pending_bytes += span.nbytes
        if self._pending_bytes >= SYNC_BYTES or time.monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        """Make the data durable, then their journal lines."""
        try:
            _sync_data(self._data)
            lines = b"".join(self._pending)
            # At a fixed position: the next attempt overwrites a line that a full disk cut off.
            _write_all(self._log, lines, self._log_end)
            _sync_data(self._log)
        except OSError as error:
            raise failed(self.path, error) from error
        self._log_end += len(lines)
        self._pending, self._pending_bytes, self._synced = [], 0, time.monotonic()

    def finish(self, keep_journal: bool = False) -> None:
        """Rename the complete file into place; durable when this returns.

        keep_journal: the caller still writes files from the notes and then calls `close_journal()`;
        until then a rerun finds everything done.
        """
        missing = [f"entry {name!r} is not written" for name in self._entries if name not in self._notes]
        raise_all(FileError, str(self.path), missing)
        if not self.renamed:
            self._sync()
            try:
                os.ftruncate(self._data, self.size)
                os.fsync(self._data)
                os.replace(self.partial, self.path)
                sync_directory(self.path.parent)
            except OSError as error:
                raise failed(self.path, error) from error
            self.renamed = True
        if not keep_journal:
            self.close_journal()

    def close_journal(self) -> None:
        """Remove the journal: the output and all derived files are complete."""
        if not self.renamed:
            raise FileError(f"{self.path}: the journal is still needed; call finish() first")
        try:
            self.journal.unlink(missing_ok=True)
            sync_directory(self.path.parent)
        except OSError as error:
            raise failed(self.path, error) from error

    def __enter__(self) -> StreamFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._pending:
                self._sync()
        except FileError:
            if error is None:  # else report the original error
                raise
        finally:
            self._close()

    def _close(self) -> None:
        if self._log >= 0 and os.fstat(self._log).st_size == 0:
            self.journal.unlink(missing_ok=True)  # made only to hold the lock
        for descriptor in (self._data, self._log):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._log = -1


def _check_layout(path: Path, header: bytes, spans: Sequence[Span]) -> int:
    """The end of the last entry; FileError unless entries are named once, ordered and disjoint."""
    end, faults = len(header), []
    for span in spans:
        if span.offset < end or span.nbytes < 0:
            faults.append(f"entry {span.name!r} at byte {span.offset} is not after byte {end}")
        end = max(end, span.offset + span.nbytes)
    if len({span.name for span in spans}) < len(spans):
        faults.append("two entries share a name")
    raise_all(FileError, str(path), faults)
    return end


def _check_disk(path: Path, size: int, partial: Path) -> None:
    there = partial.stat().st_blocks * 512 if partial.exists() else 0
    needed, free = size - there, shutil.disk_usage(path.parent).free
    if needed > free:
        raise FileError(
            f"{path}: needs {needed} more bytes of disk, {free} are free in {path.parent}; free space there "
            "or choose another output"
        )


def _lock(journal: Path) -> int:
    """Open and lock the journal -> descriptor."""
    while True:
        descriptor = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(journal)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise FileError(f"{journal}: another process is writing this output; wait for it") from error
        except FileNotFoundError:
            pass  # its last owner removed it between our open and our lock: create a new one
        os.close(descriptor)


def _read_journal(journal: Path) -> tuple[dict[str, Any] | None, list[tuple[dict[str, Any], int]]]:
    """The first line, or None if there is none yet, and `(row, end position)` up to the first incomplete
    one."""
    rows: list[tuple[dict[str, Any], int]] = []
    raw, end = journal.read_bytes(), 0
    for line in raw.splitlines(keepends=True):
        end += len(line)
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not line.endswith(b"\n"):
            break
        rows.append((row, end))
    if rows and "journal" in rows[0][0]:
        return rows[0][0], rows[1:]
    if rows or b"\n" in raw or not _line({"journal": 2}).startswith(raw[:11]):
        raise FileError(f"{journal}: is not a journal of fewbits; move it away")
    return None, []


def _digest(file: BinaryIO, span: Span) -> str:
    """sha256 of the bytes of one entry; of those that are there if the file is shorter."""
    digest, left = hashlib.sha256(), span.nbytes
    file.seek(span.offset)
    while left and (piece := file.read(min(left, READ_BYTES))):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()


def _write_all(descriptor: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"
