"""The stream writer: any kill leaves a state from which a rerun makes the same bytes."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import FileError
from fewbits.storage.stream import StreamFile
from tests.files.stream_cases import BODIES, ENTRIES, HEADER, WHOLE, fill, left_over, python, start


@given(st.permutations(list(BODIES)), st.integers(0, 4), st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_any_order_any_stop_same_bytes(tmp_path_factory, order, stop, align):
    path = tmp_path_factory.mktemp("s") / "out"
    with start(path, align=align) as file:
        fill(file, order[:stop])
    with start(path, align=align) as file:
        assert dict(file.done()) == {name: {"of": name} for name in order[:stop]}
        fill(file, order)
        file.finish()
    assert path.read_bytes() == WHOLE + bytes(-len(WHOLE) % align)
    assert left_over(path) == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from fewbits.storage import atomic, stream
path = Path(sys.argv[1])
ENTRIES = [(str(i), 8 + 100_000 * i, 100_000) for i in range(6)]

def body(i, die):
    yield bytes([i]) * 60_000
    if die:
        os.kill(os.getpid(), signal.SIGKILL)
    yield bytes([i]) * 40_000

def run(kill_in=None, after=None):
    if after:  # die right after one system call of the finish
        real = getattr(os, after)
        def call(*args, **kwargs):
            real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(os, after, call)
    with stream.StreamFile.open(path, b"HEADER--", ENTRIES, "run") as file:
        done = len(file.done())
        os.write(found, bytes([done]))
        for i in range(6):
            if str(i) not in file.done():
                file.write(str(i), body(i, i == kill_in), i)
        file.finish(keep_journal=True)
        atomic.write_atomic(path.with_name("receipt"), repr(sorted(file.done().items())).encode())
        file.close_journal()
    return done

def child(**how):
    pid = os.fork()
    if pid == 0:
        run(**how)
        os._exit(3)
    return os.waitpid(pid, 0)[1]

stream.SYNC_BYTES, stream.SYNC_SECONDS = int(sys.argv[2]), 1e9
told, found = os.pipe()
kills = [child(kill_in=2), child(kill_in=2), child(kill_in=5), child(after="replace")]
done = run()
print(list(os.read(told, 4)), kills, done)
"""


@pytest.mark.parametrize(("sync_bytes", "found"), [(1, [0, 2, 2, 5]), (250_000, [0, 0, 0, 3])])
def test_killed_four_times(tmp_path, sync_bytes, found):
    """In an entry, in the same again, in the last, and between rename and receipt.

    found: what each run finds done, by how often the journal is written. At the last start it is all.
    """
    path = tmp_path / "out"
    told = python(KILLED, path, sync_bytes)
    assert told == f"{found} [9, 9, 9, 9] 6\n"
    assert path.read_bytes() == b"HEADER--" + b"".join(bytes([i]) * 100_000 for i in range(6))
    assert (tmp_path / "receipt").read_text() == repr([(str(i), i) for i in range(6)])
    assert left_over(path) == ["out", "receipt"]


def test_killed_between_rename_and_receipt(tmp_path):
    path = tmp_path / "out"
    with start(path) as file:
        fill(file)
        file.finish(keep_journal=True)
    with start(path) as file:
        assert set(file.done()) == set(BODIES)
        file.finish()
    assert left_over(path) == ["out"]
    assert path.read_bytes() == WHOLE
    with pytest.raises(FileError, match="exists; choose another output"):
        start(path)
    assert left_over(path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_changed_after_the_rename_is_not_taken_for_ours(tmp_path, overwrite):
    path = tmp_path / "out"
    with start(path) as file:
        fill(file)
        file.finish(keep_journal=True)
    path.write_bytes(WHOLE[:-1] + b"!")
    if not overwrite:
        with pytest.raises(FileError, match="exists"):
            start(path)
        return
    with start(path, overwrite=True) as file:
        assert not file.done()
        fill(file)
        file.finish()
    assert path.read_bytes() == WHOLE


def test_damage_drops_the_entry_and_all_after_it(tmp_path):
    path = tmp_path / "out"
    with start(path) as file:
        fill(file, ["a", "b", "c"])
    partial = path.with_name("out.partial")
    raw = bytearray(partial.read_bytes())
    raw[20] ^= 1  # inside b
    partial.write_bytes(raw)
    with start(path) as file:
        assert set(file.done()) == {"a"}
        fill(file)
        file.finish()
    assert path.read_bytes() == WHOLE


@pytest.mark.parametrize("keep", range(0, 600, 23))
def test_a_journal_torn_anywhere(tmp_path, keep):
    path = tmp_path / "out"
    with start(path) as file:
        fill(file, ["a", "b", "c"])
    journal = path.with_name("out.journal")
    journal.write_bytes(journal.read_bytes()[:keep])
    with start(path) as file:
        assert len(file.done()) <= 3
        fill(file)
        file.finish()
    assert path.read_bytes() == WHOLE


def test_a_partial_file_that_vanished(tmp_path):
    path = tmp_path / "out"
    with start(path) as file:
        fill(file, ["a", "b"])
    path.with_name("out.partial").unlink()
    with start(path) as file:
        assert not file.done()
        fill(file)
        file.finish()
    assert path.read_bytes() == WHOLE


def test_another_run_is_never_continued(tmp_path):
    path = tmp_path / "out"
    with start(path, "one") as file:
        fill(file, ["a"])
    with pytest.raises(FileError, match=r"input \(it: one, this run: two\)[\s\S]*delete it"):
        start(path, "two")
    with pytest.raises(FileError, match="another run"):
        StreamFile.open(path, b"header--", ENTRIES, "one")
    with start(path, "two", overwrite=True) as file:
        assert not file.done()
    with start(path, "two") as file:
        fill(file)
        file.finish()
    assert path.read_bytes() == WHOLE


def test_an_existing_output_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(FileError, match="exists"):
        start(path)
    assert left_over(path) == ["out"]
    with start(path, overwrite=True) as file:
        fill(file, ["a"])
    assert path.read_bytes() == b"old"
    with start(path, overwrite=True) as file:
        assert set(file.done()) == {"a"}
        fill(file)
        file.finish()
    assert path.read_bytes() == WHOLE


def test_two_writers_of_one_output(tmp_path):
    with start(tmp_path / "out") as file:
        with pytest.raises(FileError, match="another process is writing"):
            start(tmp_path / "out")
        fill(file)
        file.finish()
    assert (tmp_path / "out").read_bytes() == WHOLE


def test_chunks_of_every_kind(tmp_path):
    values = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    entries = [("t", 0, 12), ("column", 12, 4), ("scalar", 16, 4), ("mixed", 20, 9)]
    with StreamFile.open(tmp_path / "out", b"", entries, "run") as file:
        file.write("t", values)
        file.write("column", [values[:, 1]])
        file.write("scalar", torch.tensor(1.5))
        file.write(
            "mixed",
            iter([b"ab", bytearray(b"cd"), memoryview(b"efgh")[::2], values[:0], values[0, :1], b"!"]),
        )
        file.finish()
    raw = (tmp_path / "out").read_bytes()
    assert raw[:12] == values.view(torch.uint8).numpy().tobytes()
    assert raw[12:16] == values[:, 1].contiguous().view(torch.uint8).numpy().tobytes()
    assert raw[16:20] == torch.tensor([1.5]).numpy().tobytes()
    assert raw[20:] == b"abcdeg" + bytes(2) + b"!"


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("a", b"aaaa", "got 4 of its 5 bytes"),
        ("a", [b"aaaa", b"aa"], "more than its 5 bytes"),
        ("x", b"", "not an entry"),
        ("c", BODIES["c"], "already written"),
    ],
)
def test_a_write_that_does_not_fit_spoils_nothing(tmp_path, name, body, says):
    with start(tmp_path / "out") as file:
        fill(file, ["c"])
        with pytest.raises(FileError) as caught:
            file.write(name, body)
        assert says in str(caught.value)
        with pytest.raises(FileError, match="'a' is not written"):
            file.finish()
        fill(file)
        file.finish()
    assert (tmp_path / "out").read_bytes() == WHOLE


@pytest.mark.parametrize(
    "entries",
    [[("a", 4, 8)], [("a", 8, 8), ("b", 15, 1)], [("a", 8, 1), ("a", 9, 1)], [("a", 8, -1)]],
)
def test_a_layout_that_is_none(tmp_path, entries):
    with pytest.raises(FileError):
        StreamFile.open(tmp_path / "out", HEADER, entries, "run")
    assert not list(tmp_path.iterdir())


def test_digests_are_of_the_entries(tmp_path):
    with start(tmp_path / "out") as file:
        fill(file, ["b"])
    with start(tmp_path / "out") as file:
        assert file.digests == {"b": hashlib.sha256(BODIES["b"]).hexdigest()}
