"""What decides an output's bytes besides its layout: a run under another setting is told which one."""

import os
import shutil
import threading
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from fewbits.calibrate.imatrix import open_statistics
from fewbits.calibrate.statistics import Statistics, gather, identify
from fewbits.calibrate.stats import Stats
from fewbits.calibrate.store import save_statistics
from fewbits.calibrate.tokens import Tokens
from fewbits.errors import FileError
from fewbits.files.open import open_checkpoint
from fewbits.model.sites import sites
from fewbits.plan.method import Method
from fewbits.workflow import provenance
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests.interrupts import interrupt_at
from tests.tiny import VOCAB, save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1}
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("m") / "model", **shape)


def other_config(source: Path, _: pytest.MonkeyPatch) -> None:
    """Of the same size, and the weights untouched: the base of the rotary embedding."""
    config = source / "config.json"
    text = config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0')
    assert text != config.read_text()
    config.write_text(text)


def other_threads(_: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "get_num_threads", lambda: 77)


def other_torch(_: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "__version__", "9.9")


def other_instructions(_: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")


SETTINGS = {
    "config": other_config,
    r"threads \(it: \d+, this run: 77\)": other_threads,
    r'torch \(it: "2\.\S+", this run: "9\.9"\)': other_torch,
    r'instruction set \(it: "\S+ \S+", this run: "\S+ DEFAULT"\)': other_instructions,
}


@pytest.mark.parametrize("named", SETTINGS)
def test_a_run_under_another_setting_that_changes_bytes_names_it(model, tmp_path, monkeypatch, named):
    source = shutil.copytree(model, tmp_path / "source")
    windows = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    request = Request("q4_0", method=Method("gptq"), tokens=Tokens.of(windows, "random"))
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "m.gguf", request, interrupt_at(10))
    SETTINGS[named](source, monkeypatch)
    with pytest.raises(FileError, match=f"unfinished output of another run; it differs in {named}: run as"):
        quantize(source, tmp_path / "m.gguf", request)


@pytest.mark.parametrize("kind", ["saved", "merged"])
def test_other_statistics_of_the_same_name_and_count_do_not_continue_a_run(model, tmp_path, kind):
    def statistics(seed: int) -> Statistics:
        checkpoint, g = open_checkpoint(model), torch.Generator().manual_seed(seed)
        stats = {}
        for site in sites(checkpoint):
            x = torch.randn(600, site.shape[1], generator=g)
            stats[site.name] = Stats(600, x.abs().amax(0), x.square().mean(0))
        found = gather(identify(checkpoint), "text", 600, stats)
        if kind == "merged":
            return found
        save_statistics(found, tmp_path / "s.safetensors", overwrite=True)
        return open_statistics(tmp_path / "s.safetensors", checkpoint)

    def request(seed: int) -> Request:
        return Request("q4_0", method=Method("weighted"), statistics=statistics(seed))

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "m.gguf", request(0), interrupt_at(4))
    with pytest.raises(FileError, match="it differs in statistics"):
        quantize(model, tmp_path / "m.gguf", request(1))
    known = quantize(model, tmp_path / "m.gguf", request(0)).calibration.get("sha256")
    saved = tmp_path / "s.safetensors"
    assert known == (sha256(saved.read_bytes()).hexdigest() if kind == "saved" else None)


def test_a_run_that_fails_reads_its_input_no_further(model, tmp_path, monkeypatch):
    """Its digest is taken by a thread, which read on to the end of the files."""
    huge, before = tmp_path / "huge", set(threading.enumerate())
    huge.touch()
    os.truncate(huge, 2**38)
    monkeypatch.setattr(provenance, "input_files", lambda checkpoint: [huge])
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "m.gguf", Request("q8_0"), interrupt_at(1))
    assert set(threading.enumerate()) == before
