"""Activations: the hidden states between two blocks, one batch after the other.

    batch 0 | batch 1 | ... | batch n          batches within the limit stay in memory,
    '---- memory ----'  '--- file ---'          the rest is in one scratch file

A batch of the file is mapped when it is read (a private copy on write) and unmapped with the tensor, so
resident memory depends on the tensors in use. The file has no name (O_TMPFILE), or loses it at once on other
systems, so a killed run leaves nothing behind.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ..errors import FileError

DEFAULT_LIMIT = 2 * 2**30  # bytes


class Activations:
    """A sequence of tensors, `(b, t, h)` each; `limit` bytes of them in memory, the rest in `folder`.

    Read a batch with `a[i]` or by iterating, replace it with `a[i] = x` (same shape and dtype: in
    place), add one with `append`. Do not write to tensors read from it. Raises FileError, with the needed and
    the free bytes, if the disk is too small.
    """

    def __init__(
        self,
        batches: Iterable[torch.Tensor] = (),
        limit: int = DEFAULT_LIMIT,
        folder: Path | None = None,
    ) -> None:
        self._limit = limit
        self._folder = Path(tempfile.gettempdir()) if folder is None else Path(folder)
        self._slots: list[torch.Tensor | _Range] = []
        self._file: int | None = None
        self.nbytes_in_memory = self.nbytes_on_disk = 0
        for batch in batches:
            self.append(batch)

    def append(self, x: torch.Tensor) -> None:
        """`(b, t, h)`, kept as a copy on the CPU."""
        if self.nbytes_in_memory + x.nbytes <= self._limit:
            self._slots.append(x.detach().to("cpu", copy=True))
            self.nbytes_in_memory += x.nbytes
            return
        place = _Range(self.nbytes_on_disk, tuple(x.shape), x.dtype)
        self._write(place.offset, x)
        self._slots.append(place)
        # The next begins on a page, where a map must start.
        pages = -(-x.nbytes // mmap.ALLOCATIONGRANULARITY)
        self.nbytes_on_disk += pages * mmap.ALLOCATIONGRANULARITY

    def halve(self) -> None:
        """Every batch of more than one sequence becomes two."""
        halves: list[torch.Tensor | _Range] = []
        for slot in self._slots:
            halves += [x.clone() for x in slot.chunk(2)] if isinstance(slot, torch.Tensor) else slot.halves()
        self._slots = halves

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> torch.Tensor:
        slot = self._slots[i]
        if isinstance(slot, torch.Tensor):
            return slot
        assert self._file is not None
        before = slot.offset % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(
            self._file, before + slot.nbytes, access=mmap.ACCESS_COPY, offset=slot.offset - before
        )
        return torch.frombuffer(pages, dtype=slot.dtype, offset=before).view(slot.shape)

    def __setitem__(self, i: int, x: torch.Tensor) -> None:
        slot = self._slots[i]
        if tuple(x.shape) != tuple(slot.shape) or x.dtype != slot.dtype:
            raise ValueError(
                f"batch {i} is {tuple(slot.shape)} {slot.dtype}; {tuple(x.shape)} {x.dtype} cannot replace it"
            )
        if isinstance(slot, torch.Tensor):
            self._slots[i] = x.detach().to("cpu", copy=True)
        else:
            self._write(slot.offset, x)

    def close(self) -> None:
        """Delete all batches and free the disk; also done when this object is deleted."""
        self._slots.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()

    def _write(self, offset: int, x: torch.Tensor) -> None:
        if self._file is None:
            self._file = _scratch(self._folder)
        flat = x.detach().cpu().contiguous().view(-1).view(torch.uint8)
        rest = flat.numpy().data
        self._check_free(offset + len(rest))
        while len(rest):
            try:
                written = os.pwrite(self._file, rest, offset)
            except OSError as error:
                raise FileError(
                    f"{self._folder}: writing {len(rest)} bytes of activations to a scratch file failed: "
                    f"{error.strerror}; free disk there or raise the limit of {self._limit} bytes in memory"
                ) from error
            rest, offset = rest[written:], offset + written

    def _check_free(self, end: int) -> None:
        """FileError unless the disk has space for the file up to `end`."""
        assert self._file is not None
        needed = end - os.fstat(self._file).st_size
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise FileError(
                f"{self._folder}: activations need {needed} more bytes of disk, {free} are free; free space "
                f"there, choose another folder, calibrate on fewer tokens, or raise the limit of "
                f"{self._limit} bytes in memory"
            )


class _Range:
    """The place of a batch in the scratch file."""

    def __init__(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.offset, self.shape, self.dtype = offset, shape, dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def halves(self) -> list[_Range]:
        first = -(-self.shape[0] // 2)
        parts = [_Range(self.offset, (first, *self.shape[1:]), self.dtype)]
        if self.shape[0] > first:
            rest = (self.shape[0] - first, *self.shape[1:])
            parts.append(_Range(self.offset + parts[0].nbytes, rest, self.dtype))
        return parts


def _scratch(folder: Path) -> int:
    """A file in `folder` without a name -> its descriptor."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise FileError(f"{folder}: no scratch file can be made there: {error.strerror}") from error
