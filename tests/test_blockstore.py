"""Finished blocks outlive the run that made them: kept whole, told when damaged, never another run's.

The second half kills runs in a process of their own; a rerun must give the bytes of one never killed.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbits.calibrate.tokens import Tokens
from fewbits.errors import FileError
from fewbits.formats import FORMATS
from fewbits.plan.method import Method
from fewbits.qtensor import QTensor
from fewbits.storage.stream import StreamFile
from fewbits.workflow.blockstore import BlockStore
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests.tiny import VOCAB, save_tiny

NOTES = {"told": {"a.weight": {"algorithm": "gptq", "lost": [0.5, 1.0, 0.25]}}, "notes": ["a", "ü"]}


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor | QTensor]:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(4, 256, generator=g)
    return {
        "a.weight": FORMATS.get("int4_g64_asym").encode(w),
        "b.weight": FORMATS.get("q4_k").encode(w),
        "norm.weight": w[0].bfloat16(),
        "bias": w[1],
    }


def same(a: torch.Tensor | QTensor, b: torch.Tensor | QTensor) -> bool:
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        planes = [plane.name for plane in a.format.planes]
        return a.format.name == b.format.name and all(torch.equal(a.planes[p], b.planes[p]) for p in planes)
    return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A store with block 3 of run "one"."""
    with BlockStore(tmp_path / "m.blocks", "one") as store:
        store.write(3, some_tensors(), NOTES)
    return tmp_path / "m.blocks"


def test_a_block_comes_back_as_it_was(folder):
    with BlockStore(folder, "one") as store:
        assert [store.has(i) for i in (0, 3)] == [False, True]
        found, notes = store.read(3)
        assert notes == NOTES
        wanted = some_tensors()
        assert found.keys() == wanted.keys()
        assert all(same(found[name].load(), value) for name, value in wanted.items())


def test_a_block_without_its_index_is_not_there(folder):
    (folder / "block-0003.json").unlink()
    with BlockStore(folder, "one") as store:
        assert not store.has(3)
        store.write(3, some_tensors(1), NOTES)
        assert same(store.read(3)[0]["bias"].load(), some_tensors(1)["bias"])


@pytest.mark.parametrize("cut", [1, 100, 10**6])
def test_a_truncated_block_is_told(folder, cut):
    planes = folder / "block-0003.safetensors"
    planes.write_bytes(planes.read_bytes()[:-cut])
    with (
        BlockStore(folder, "one") as store,
        pytest.raises(FileError, match=r"block-0003\.safetensors: has changed.*delete \S+m\.blocks and run"),
    ):
        store.read(3)


@pytest.mark.parametrize("change", [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b + b"\0"])
def test_a_changed_block_is_told(folder, change):
    planes = folder / "block-0003.safetensors"
    planes.write_bytes(change(planes.read_bytes()))
    with BlockStore(folder, "one") as store, pytest.raises(FileError, match="has changed since"):
        store.read(3)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"tensors": 1, "notes": {}, "sha256": ""}'])
def test_a_damaged_index_is_told(folder, text):
    (folder / "block-0003.json").write_text(text)
    with BlockStore(folder, "one") as store, pytest.raises(FileError, match=r"block-0003\.json"):
        store.read(3)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_store_is_told(folder, text):
    (folder / "run.json").write_text(text)
    with pytest.raises(FileError, match=r"run\.json"):
        BlockStore(folder, "one")


def test_blocks_of_another_run_are_refused_and_given_up_only_when_asked(folder):
    with pytest.raises(FileError, match="finished blocks of another run"):
        BlockStore(folder, "two")
    with BlockStore(folder, "one") as store:  # refusing has changed nothing
        assert store.has(3)
    with BlockStore(folder, "one", overwrite=True) as store:  # the same command again goes on
        assert store.has(3)
    with BlockStore(folder, "two", overwrite=True) as store:
        assert not store.has(3)
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_two_runs_of_one_output_exclude_each_other(folder):
    with (
        BlockStore(folder, "one"),
        pytest.raises(FileError, match="another process is working on this output"),
    ):
        BlockStore(folder, "one")
    with BlockStore(folder, "one") as store:
        store.remove()
    assert not folder.exists()


# ---- killed ------------------------------------------------------------------------------------------

DISTILL = 30  # steps: the state is kept after 25
RUN = """
import os, signal, sys
from fewbits.workflow.blockwise import job
from fewbits.workflow import blockstore
from fewbits.storage.stream import StreamFile
from fewbits.train import loop
from tests.test_blockstore import calibrated

source, out, point, after = *sys.argv[1:4], int(sys.argv[4])

def dying(real):  # the call after `after` others kills when it is done
    def call(*args, **kwargs):
        global after
        after -= 1
        result = real(*args, **kwargs)
        if after < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

if point == "inside":
    job.chosen = dying(job.chosen)
if point in ("unclaimed", "unrenamed"):
    real_replace = os.replace
    def replace(*names):
        global after
        after -= 1
        if after < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real_replace(*names)
    os.replace = replace
if point == "unindexed":
    blockstore.write_file_atomic = dying(blockstore.write_file_atomic)
if point == "between":
    blockstore.BlockStore.write = dying(blockstore.BlockStore.write)
if point == "output":
    StreamFile.write = dying(StreamFile.write)
if point == "renamed":
    StreamFile.finish = dying(StreamFile.finish)
if point == "receipt":
    blockstore.BlockStore.remove = dying(blockstore.BlockStore.remove)
if point == "distill":
    loop.Loop.advance = dying(loop.Loop.advance)
calibrated(source, out, point == "distill")
"""
# Where runs are killed, and after how many calls: a block has 7 weights, distill 30 steps.
POINTS = {
    "inside": 9,
    "unclaimed": 0,
    "unrenamed": 1,
    "unindexed": 0,
    "between": 1,
    "output": 4,
    "distill": 27,
}
LATE = ("renamed", "receipt")  # when the output is in its place
FAST = ("inside", "output")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("m") / "model", **shape)


def calibrated(model: str | Path, out: str | Path, distilled: bool) -> None:
    """The run that is killed, and that is not."""
    windows = torch.randint(0, VOCAB, (12, 32), generator=torch.Generator().manual_seed(0))
    method = Method("gptq", sequential=True, gptaq=True, distill=DISTILL if distilled else 0)
    quantize(model, out, Request("q4_0", method=method, tokens=Tokens.of(windows, "random")))


def spawn(model: Path, out: Path, point: str, after: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(model), str(out), point, str(after)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> dict[bool, bytes]:
    """distilled? -> the output of a run that nothing stopped; made when asked for."""

    class Whole(dict):
        def __missing__(self, distilled: bool) -> bytes:
            out = tmp_path_factory.mktemp("whole") / "m.gguf"
            calibrated(model, out, distilled)
            self[distilled] = out.read_bytes()
            return self[distilled]

    return Whole()


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=() if point in FAST else pytest.mark.slow) for point in POINTS]
)
def test_a_killed_run_is_continued_to_the_same_bytes(model, whole, tmp_path, point):
    out = tmp_path / "m.gguf"
    done = spawn(model, out, point, POINTS[point])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    kept = {path.name for path in (tmp_path / "m.gguf.blocks").iterdir()}
    blocks = {
        "inside": 1,
        "unclaimed": 0,
        "unrenamed": 0,
        "unindexed": 0,
        "between": 2,
        "output": 2,
        "distill": 2,
    }[point]
    assert {f"block-{i:04d}.json" for i in range(blocks)} == {
        name for name in kept if "block" in name and "json" in name
    }
    assert ("distill.state" in kept) == (point == "distill")
    assert ("block-0000.safetensors" in kept) or blocks == 0
    calibrated(model, out, point == "distill")
    assert out.read_bytes() == whole[point == "distill"]
    assert not (tmp_path / "m.gguf.blocks").exists()


@pytest.mark.parametrize("point", LATE)
def test_killed_when_the_output_is_in_its_place_it_ends_with_its_notes_and_nothing_left(
    model, whole, tmp_path, point
):
    done = spawn(model, tmp_path / "m.gguf", point, 0)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "m.gguf").exists()
    calibrated(model, tmp_path / "m.gguf", False)
    calibrated(model, tmp_path / "never.gguf", False)
    assert (tmp_path / "m.gguf").read_bytes() == whole[False]
    ours, never = (json.loads((tmp_path / f"{n}.gguf.receipt.json").read_text()) for n in ("m", "never"))
    assert ours["notes"] == never["notes"] and ours["tensors"] == never["tensors"]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.gguf{end}" for name in ("m", "never") for end in ("", ".receipt.json")
    }


def test_a_folder_of_the_user_s_own_is_left_alone(model, tmp_path):
    mine = tmp_path / "m.gguf.blocks"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    with pytest.raises(FileError, match=r"m\.gguf\.blocks: is in the way"):
        calibrated(model, tmp_path / "m.gguf", False)
    assert [path.name for path in tmp_path.rglob("*")] == ["m.gguf.blocks", "thesis.txt"]


def test_a_run_without_blocks_minds_no_folder_of_that_name(model, tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    (tmp_path / "m.gguf.blocks").mkdir()
    (tmp_path / "m.gguf.blocks/thesis.txt").write_text("all of it")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StreamFile, "close_journal", interrupted)
        quantize(model, tmp_path / "m.gguf", Request("q4_0"))
    quantize(model, tmp_path / "m.gguf", Request("q4_0"))
    assert (tmp_path / "m.gguf.blocks/thesis.txt").exists() and not (tmp_path / "m.gguf.journal").exists()


def test_what_a_user_put_beside_the_blocks_stays(tmp_path):
    with BlockStore(tmp_path / "o.blocks", "x") as store:
        for name in ("note.txt", "block-1 of mine.json"):
            (tmp_path / "o.blocks" / name).write_text("mine")
        store.write(0, {"a": torch.ones(2)}, {})
        store.remove()
    left = {path.name for path in (tmp_path / "o.blocks").iterdir()}
    assert left == {"note.txt", "block-1 of mine.json"}
