"""Runs that fail or are killed: nothing half-written stands under a final name, and a rerun completes it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from fewbits.errors import FewbitsError, FileError, FormatError
from fewbits.files.open import open_checkpoint
from fewbits.release.receipt import Receipt
from fewbits.workflow import task as jobs
from fewbits.workflow.request import Request
from fewbits.workflow.run import convert
from fewbits.workflow.run import run as quantize
from tests.interrupts import interrupt_at
from tests.tiny import change_weights, save_tiny

DOWN = "model.layers.0.mlp.down_proj.weight"
OUTPUTS = {"gguf": ("m.gguf", "q4_k_m"), "native": ("n", "nf4")}

RUN = """
import os, signal, sys
from pathlib import Path
from fewbits.workflow import run as pipeline
from fewbits.workflow.request import Request
from fewbits.storage.stream import StreamFile

source, out, to, point, after = *sys.argv[1:5], int(sys.argv[5])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying(real, before=False):  # the call after `after` others kills, when it begins or when it is done
    def call(*args, **kwargs):
        global after
        after -= 1
        if after < 0 and before:
            die()
        result = real(*args, **kwargs)
        if after < 0:
            die()
        return result
    return call

real_write = StreamFile.write
def half_written(self, name, chunks, note=None):
    def cut():
        global after
        for chunk in chunks:
            after -= 1
            if after < 0:
                yield bytes(7)  # some bytes of the entry, and not even the right ones
                die()
            yield chunk
    real_write(self, name, cut(), note)

StreamFile.write = {"inside": half_written, "entry": dying(real_write)}.get(point, real_write)
if point == "synced":  # the journal is written at every entry
    import fewbits.storage.stream as stream
    stream.SYNC_BYTES = 1
    StreamFile.write = dying(real_write)
if point == "renamed":
    StreamFile.finish = dying(StreamFile.finish)
if point == "receipt":
    pipeline.write_atomic = dying(pipeline.write_atomic, before=True)
if point == "side":
    from fewbits.files import directory, output
    directory.write_atomic = output.write_atomic = dying(output.write_atomic)
if point == "journal":
    StreamFile.close_journal = dying(StreamFile.close_journal, before=True)
pipeline.run(source, out, Request(to))
"""
POINTS = {
    "gguf": [("entry", 0), ("synced", 5), ("inside", 3), ("renamed", 0), ("receipt", 0), ("journal", 0)],
    "native": [("synced", 9), ("inside", 4), ("renamed", 0), ("side", 0), ("side", 3), ("receipt", 0)],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1}
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("m") / "model", **shape)


def files(path: Path) -> dict[str, bytes]:
    """The output, and what lies beside it, but for the receipt."""
    return {
        str(p.relative_to(path)): p.read_bytes()
        for p in path.rglob("*")
        if p.is_file() and "receipt" not in p.name
    }


def spawn(model: Path, at: Path, kind: str, point: str, after: int) -> subprocess.CompletedProcess[str]:
    name, to = OUTPUTS[kind]
    command = [sys.executable, "-c", RUN, str(model), str(at / name), to, point, str(after)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def killed(model: Path, at: Path, kind: str, point: str, after: int = 0) -> None:
    done = spawn(model, at, kind, point, after)
    assert done.returncode == -signal.SIGKILL, done.stderr


def receipt_of(at: Path, kind: str) -> Receipt:
    path = at / ("m.gguf.receipt.json" if kind == "gguf" else "n/receipt.json")
    return Receipt.from_json(path.read_text())


def check_resumed(model: Path, at: Path, kind: str, whole: Path) -> None:
    """The rerun of the same command, here, gives what a run that was never killed gives."""
    name, to = OUTPUTS[kind]
    quantize(model, at / name, Request(to))
    assert files(at) == files(whole)
    ours, wanted = receipt_of(at, kind), receipt_of(whole, kind)
    assert (ours.tensors, ours.outputs, ours.inputs) == (wanted.tensors, wanted.outputs, wanted.inputs)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:
    at = tmp_path_factory.mktemp("whole")
    for name, to in OUTPUTS.values():
        (at / ("gguf" if name == "m.gguf" else "native")).mkdir()
        quantize(model, at / ("gguf" if name == "m.gguf" else "native") / name, Request(to))
    return at


# A process takes 1.5 s, most of it to import torch: by default one is killed for each kind of output.
QUICK = [("gguf", "inside", 3), ("native", "side", 0)]
CASES = [
    pytest.param(kind, *point, marks=() if (kind, *point) in QUICK else pytest.mark.slow)
    for kind, points in POINTS.items()
    for point in points
]  # fmt: skip


@pytest.mark.parametrize(("kind", "point", "after"), CASES)
def test_killed_and_run_again_is_never_killed(model, whole, tmp_path, kind, point, after):
    killed(model, tmp_path, kind, point, after)
    if point in ("entry", "synced", "inside"):
        out = tmp_path / OUTPUTS[kind][0]
        assert not (out if kind == "gguf" else out / "fewbits.json").exists()
    check_resumed(model, tmp_path, kind, whole / kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", POINTS)
def test_killed_at_point_after_point(model, whole, tmp_path, kind):
    for point, after in POINTS[kind]:
        if point != "entry":
            killed(model, tmp_path, kind, point, after)
    check_resumed(model, tmp_path, kind, whole / kind)


def test_what_is_done_is_not_done_again(model, tmp_path, monkeypatch):
    killed(model, tmp_path, "gguf", "synced", 5)
    done = [json.loads(line)["name"] for line in (tmp_path / "m.gguf.journal").read_text().splitlines()[1:]]
    encoded: list[str] = []
    real = jobs._piece

    def encode(name, *rest):
        encoded.append(name)
        return real(name, *rest)

    monkeypatch.setattr(jobs, "_piece", encode)
    receipt = quantize(model, tmp_path / "m.gguf", Request("q4_k_m"))
    assert len(done) == 6
    assert encoded == [row.name for row in receipt.tensors if row.gguf_name not in done]


def test_a_run_with_other_wishes_does_not_continue_it(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "m.gguf", Request("q4_k_m"), interrupt_at(4))
    before = files(tmp_path)
    with pytest.raises(FileError, match="unfinished output of another run"):
        quantize(model, tmp_path / "m.gguf", Request("q4_k_m", search=False))
    assert files(tmp_path) == before
    quantize(model, tmp_path / "m.gguf", Request("q4_k_m", search=False, overwrite=True))
    quantize(model, tmp_path / "fresh.gguf", Request("q4_k_m", search=False))
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def test_progress_counts_every_byte_once(model, tmp_path):
    seen = []
    quantize(model, tmp_path / "m.gguf", Request("q8_0"), lambda *at: seen.append(at))
    total = sum(tensor.nbytes for tensor in open_checkpoint(model).tensors.values())
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert {of for _, _, of in seen} == {total} and seen[0][1] == 0 and seen[-1] == ("", total, total)


# What cannot be read, and what cannot be written


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("name", [DOWN, "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_named(model, tmp_path, kind, name, bad):
    def spoil(w: torch.Tensor) -> torch.Tensor:
        w.view(-1)[17] = bad
        return w

    source = change_weights(shutil.copytree(model, tmp_path / "source"), {name: spoil})
    out, to = OUTPUTS[kind]
    with pytest.raises(FormatError, match=rf"{name}: 1 of \d+ weights are NaN or infinite; repair"):
        quantize(source, tmp_path / out, Request(to))
    finals = [out, f"{out}.receipt.json", "n/model.safetensors", "n/fewbits.json", "n/receipt.json"]
    assert not any((tmp_path / final).is_file() for final in finals)


def test_a_float_too_large_for_f16_is_named(model, tmp_path):
    source = change_weights(shutil.copytree(model, tmp_path / "source"), {DOWN: lambda w: w * 1e9})
    with pytest.raises(FormatError, match=rf"{DOWN} as f16: \d+ of \d+"):
        quantize(source, tmp_path / "m.gguf", Request("f16"))
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_that_exists_stays_as_it_is(model, tmp_path, kind):
    name, to = OUTPUTS[kind]
    quantize(model, tmp_path / name, Request(to))
    before = files(tmp_path)
    other = "q8_0" if kind == "gguf" else "int8_channel"
    with pytest.raises(FileError, match="exists; choose another output or pass overwrite"):
        quantize(model, tmp_path / name, Request(other))
    assert files(tmp_path) == before
    quantize(model, tmp_path / name, Request(other, overwrite=True))
    quantize(model, tmp_path / "fresh" / name, Request(other))
    fresh = files(tmp_path / "fresh")
    assert {file: data for file, data in files(tmp_path).items() if not file.startswith("fresh")} == fresh


def test_an_output_of_the_wrong_kind_or_in_the_place_of_a_model(model, tmp_path):
    quantize(model, tmp_path / "m.gguf", Request("q8_0"))
    source = shutil.copytree(model, tmp_path / "source")
    other = shutil.copytree(model, tmp_path / "other")
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(open_checkpoint(other).tensors, "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    shutil.copytree(source, tmp_path / "third")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/tokenizer.json").write_text("{}")
    before = files(tmp_path)
    (tmp_path / "link").symlink_to(source)
    for out, request, fault in [
        ("source", Request("q4_k_m", file="gguf"), "is a directory"),
        ("m.gguf", Request("nf4", file="native"), "is not a directory"),
        ("source", Request("nf4", overwrite=True), "is the input itself"),
        ("link", Request("nf4", overwrite=True), "is the input itself"),
        ("third", Request("nf4"), "holds files that fewbits did not write"),
        ("mine", Request("nf4"), "holds files that fewbits did not write"),
    ]:
        with pytest.raises(FileError, match=fault):
            quantize(source, tmp_path / out, request)
    with pytest.raises(FileError, match="is the input itself"):
        quantize(tmp_path / "m.gguf", tmp_path / "m.gguf", Request("q4_0", requantize=True, overwrite=True))
    assert {file: data for file, data in files(tmp_path).items() if not file.startswith("link")} == before


@pytest.mark.parametrize(
    ("out", "to"), [("file/m.gguf", "q8_0"), ("file/n", "nf4"), ("/proc/none/m.gguf", "q8_0")]
)
def test_a_place_that_cannot_be_written(model, tmp_path, out, to):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match=r"(file|none).*choose another output"):
        quantize(model, tmp_path / out, Request(to))
    assert files(tmp_path) == {"file": b"in the way"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(model, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(FileError, match=r"m\.gguf"):
        quantize(model, tmp_path / "closed" / "m.gguf", Request("q8_0"))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_too_little_disk_is_told_before_the_start(model, tmp_path, kind, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    name, to = OUTPUTS[kind]
    with pytest.raises(FileError, match=r"needs \d+ more bytes of disk, 1000 are free in"):
        quantize(model, tmp_path / name, Request(to))
    assert files(tmp_path) == {}


def test_a_disk_that_fills_meanwhile_leaves_a_run_to_be_continued(model, whole, tmp_path):
    code = (
        "import resource, signal, sys\n"
        "from fewbits.workflow.request import Request\nfrom fewbits.workflow.run import run as quantize\n"
        "from fewbits.errors import FileError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    quantize(sys.argv[1], sys.argv[2], Request('q4_k_m'))\n"
        "except FileError as error:\n"
        "    sys.exit(str(error))\n"
    )
    out = tmp_path / "m.gguf"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "m.gguf: cannot be written" in done.stderr and "run again to resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    check_resumed(model, tmp_path, "gguf", whole / "gguf")


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_shard_that_is_missing_is_named(model, tmp_path, kind):
    source = shutil.copytree(model, tmp_path / "source")
    names = dict.fromkeys(open_checkpoint(model).tensors, "model-00002-of-00002.safetensors")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    before = files(tmp_path)
    name, to = OUTPUTS[kind]
    with pytest.raises(FewbitsError, match=r"model-00002-of-00002\.safetensors is missing"):
        quantize(source, tmp_path / name, Request(to))
    assert files(tmp_path) == before


def test_an_index_of_the_old_output_never_stands_beside_new_weights(model, tmp_path, monkeypatch):
    """nf4 and fp4 have the same planes: the old index would read the new codes as the wrong numbers."""
    quantize(model, tmp_path / "n", Request("fp4"))
    monkeypatch.setitem(quantize.__globals__, "write_atomic", None)
    monkeypatch.setattr("fewbits.files.directory.copy_side_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "n", Request("nf4", overwrite=True))
    assert not (tmp_path / "n/fewbits.json").exists()
    monkeypatch.undo()
    quantize(model, tmp_path / "n", Request("nf4", overwrite=True))
    assert {t.dtype for t in open_checkpoint(tmp_path / "n").tensors.values() if t.quantized} == {"nf4"}


def interrupted(*_given):
    raise KeyboardInterrupt


def test_convert_resumes_too(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "m.gguf", progress=interrupt_at(5))
    assert not (tmp_path / "m.gguf").exists()
    convert(model, tmp_path / "m.gguf")
    convert(model, tmp_path / "fresh.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "fresh.gguf").read_bytes()
