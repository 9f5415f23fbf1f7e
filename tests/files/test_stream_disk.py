"""The stream writer where the disk is full, closed or held by others: nothing is spoiled, and it says so."""

import errno
import json
import os
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest

from fewbits.errors import FileError
from fewbits.storage import atomic
from fewbits.storage.atomic import write_atomic
from fewbits.storage.stream import StreamFile
from tests.files.stream_cases import BODIES, WHOLE, fill, left_over, python, start


def test_too_little_disk_is_told_before_the_start(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 30, 70))
    with pytest.raises(FileError, match=r"needs 71 more bytes of disk, 70 are free"):
        start(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_stays_resumable(tmp_path, monkeypatch):
    path, real = tmp_path / "out", os.pwrite

    def full(descriptor, data, position):
        if position >= 64:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, position)

    with start(path) as file:
        fill(file, ["a", "b"])
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(FileError, match=r"No space left on device[\s\S]*run again to resume"):
            file.write("c", BODIES["c"])
        monkeypatch.undo()
    with start(path) as file:
        assert set(file.done()) == {"a", "b"}
        fill(file)
        file.finish()
    assert path.read_bytes() == WHOLE


def test_a_disk_that_fills_at_the_journal(tmp_path, monkeypatch):
    """The first journal line is torn by the full disk; the retry writes over it."""
    path, real = tmp_path / "out", os.pwrite

    with start(path) as file:
        fill(file, ["a", "b"])

        def torn(descriptor, data, position):
            if b'"sha256"' in bytes(data):
                real(descriptor, bytes(data)[:30], position)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(descriptor, data, position)

        monkeypatch.setattr(os, "pwrite", torn)
        with pytest.raises(FileError, match="No space left"):
            file._sync()
        monkeypatch.undo()
    with start(path) as file:
        assert set(file.done()) == {"a", "b"}


def test_a_file_size_limit_of_the_system(tmp_path):
    """A real refusal by the kernel, not a simulated one."""
    script = (
        "import resource, sys\n"
        "from fewbits.errors import FileError\n"
        "from fewbits.storage.stream import StreamFile\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "with StreamFile.open(sys.argv[1], b'', [('a', 0, 1000), ('b', 1000, 99_000)], 'run') as file:\n"
        "    file.write('a', bytes(1000))\n"
        "    try:\n"
        "        file.write('b', bytes(99_000))\n"
        "    except FileError as error:\n"
        "        print('refused', 'run again to resume' in str(error))\n"
    )
    path = tmp_path / "out"
    assert python(script, path) == "refused True\n"
    with StreamFile.open(path, b"", [("a", 0, 1000), ("b", 1000, 99_000)], "run") as file:
        assert set(file.done()) == {"a"}


def unwritable(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    yield tmp_path / "absent" / "out"
    yield tmp_path / "file" / "out"
    if Path("/proc/self").exists():
        yield Path("/proc/out")


def test_an_unwritable_place_is_a_file_error(tmp_path):
    for path in unwritable(tmp_path):
        for write in (start, partial(write_atomic, data=b"x")):
            with pytest.raises(FileError, match=r"cannot be written.*and run again$") as caught:
                write(path)
            assert "partial" not in str(caught.value)  # there is none


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(FileError, match="Permission denied"):
        start(tmp_path / "out")


def test_a_link_in_the_partials_place_is_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "out.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(FileError, match="cannot be written"):
        start(tmp_path / "out")
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_foreign_journal_is_left_alone(tmp_path):
    journal = tmp_path / "out.journal"
    for content in (b"dear diary\n", b"dear diary", json.dumps({"a": 1}).encode() + b"\n"):
        journal.write_bytes(content)
        with pytest.raises(FileError, match="is not a journal of fewbits"):
            start(tmp_path / "out")
        assert journal.read_bytes() == content


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_user_s_own_file_in_the_partials_place_is_left_alone(tmp_path, overwrite):
    (tmp_path / "out.partial").write_bytes(b"precious")
    with pytest.raises(FileError, match=r"out\.partial: is in the way"):
        start(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out.partial").read_bytes() == b"precious"
    assert left_over(tmp_path / "out") == ["out.partial"]


def test_write_atomic_replaces_whole(tmp_path, monkeypatch):
    path = tmp_path / "small"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileError, match="No space left"):
        write_atomic(path, b"three")
    assert path.read_bytes() == b"two"
    assert left_over(path) == ["small"]


def test_a_link_under_the_name_of_a_temporary_file_is_not_followed(tmp_path):
    """The name was the process's number, which anyone can foresee."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".out.json.{os.getpid()}.tmp").symlink_to(victim)
    atomic.write_atomic(tmp_path / "out.json", b"ours")
    assert victim.read_text() == "mine" and (tmp_path / "out.json").read_bytes() == b"ours"
    assert not (tmp_path / "out.json").is_symlink()
    assert (tmp_path / "out.json").stat().st_mode & 0o777 == 0o666 & ~atomic._umask()


def test_a_small_file_that_cannot_be_written_speaks_of_no_partial_file(tmp_path):
    (tmp_path / "out.json").mkdir()
    with pytest.raises(FileError, match=r"out\.json: cannot be written") as caught:
        atomic.write_atomic(tmp_path / "out.json", b"ours")
    assert "partial" not in str(caught.value) and [p.name for p in tmp_path.iterdir()] == ["out.json"]
