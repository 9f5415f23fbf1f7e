"""What `quantize` says of its memory before it starts: refused in one line, or enough."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbits.calibrate.tokens import Tokens
from fewbits.cli.main import main
from fewbits.errors import CalibrationError, ModelError
from fewbits.files.open import open_checkpoint
from fewbits.release.verify import Outcome
from fewbits.workflow.memory import LEAST_STATES, fitted
from fewbits.workflow.options import Options
from fewbits.workflow.quantize import prepared
from fewbits.workflow.resolve import file_type_for, resolve
from tests.tiny import save_tiny

GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("model"))


def need(model: Path, **given: object):
    options = Options(to="int4_g32" if given.get("file") is None else "q4_0", **given)  # type: ignore[arg-type]
    return prepared(open_checkpoint(model), model, model.parent / "out", options)[2]


def test_a_machine_without_memory_refuses_before_anything_is_written(model, monkeypatch, capsys):
    """Of a text that is read; of one that the model writes; of one tensor at a time, which fits."""
    monkeypatch.setattr("fewbits.workflow.memory.free_memory", lambda: 2**28)
    monkeypatch.setattr("fewbits.memory.free_memory", lambda: 2**28)
    before = sorted(model.parent.rglob("*"))
    with pytest.raises(ModelError, match=r"block by block\); .* GiB are free: .*--effort fast"):
        need(model, calibrate="text.txt")
    with pytest.raises(
        CalibrationError, match=r"needs [\d.]+ GiB of memory, 0.25 GiB are free; give a text file"
    ):
        need(model)
    assert need(model, effort="fast", verify=False).way == "streaming"
    assert main(["quantize", str(model), "--to", "q4_0", "--out", str(model.parent / "x.gguf")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "needs" in error
    assert sorted(model.parent.rglob("*")) == before


@pytest.mark.parametrize("command", ["evaluate", "verify"])
def test_what_runs_a_model_says_its_memory_first_or_refuses_in_one_line(model, command, capsys, monkeypatch):
    monkeypatch.setattr("fewbits.cli.verify.verify", lambda *given, **named: Outcome("transformers", "same"))
    others = [str(model), "--sample", "64", "--context", "32"] if command == "evaluate" else []
    assert main([command, str(model), *others, "--memory", "0.1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "free" in error
    assert main([command, str(model), *others, "--memory", "20"]) == 0
    assert re.match(rf"fewbits {command}: needs [\d.]+ GiB of memory at most \(", capsys.readouterr().err)


def test_memory_given_is_taken_at_its_word(model):
    assert need(model, memory=20 * GIB, calibrate="text.txt").peak < 20 * GIB
    with pytest.raises(ModelError, match=r"1\.00 GiB are allowed \(--memory\)"):
        need(model, memory=GIB, calibrate="text.txt")


def test_memory_of_verification_counts_and_can_be_left_out(model, monkeypatch):
    """Rounding a tiny model takes less than the forward pass that verifies it, where its engine is there."""
    monkeypatch.setattr("fewbits.engines.Engine.interpreter", lambda self, method=None: None)
    assert need(model, file="gguf", effort="fast", memory=need(model, effort="fast").peak + 2**24)
    monkeypatch.setattr("fewbits.engines.Engine.interpreter", lambda self, method=None: sys.executable)
    rounded = need(model, file="gguf", effort="fast", verify=False)
    verified = need(model, file="gguf", effort="fast")
    assert rounded.peak < verified.peak
    between = (rounded.peak + verified.peak) // 2
    assert need(model, file="gguf", effort="fast", verify=False, memory=between).peak <= between
    with pytest.raises(ModelError, match=r"verifying the output needs .*--no-verify"):
        need(model, file="gguf", effort="fast", memory=between)


def test_no_faster_method_is_named_where_there_is_none(model):
    with pytest.raises(ModelError, match=r"\(streaming\); 0\.00 GiB are allowed \(--memory\): free memory$"):
        need(model, effort="fast", memory=2**20, verify=False)


def test_hidden_states_give_way_to_memory(model):
    """A long text: of its hidden states as much stays in memory as fits, the rest goes to scratch."""
    checkpoint = open_checkpoint(model)
    tokens = Tokens.of(torch.zeros(4096, 512, dtype=torch.int64), "zeros")
    request = Options(to="int4_g32", calibrate=tokens).request()
    request = replace(request, tokens=tokens)
    out = Path("out")
    resolved = resolve(checkpoint, request, file_type_for(None, out))
    output = resolved.lay_out(checkpoint, out)
    whole, most = fitted(
        checkpoint, output, resolved.by_output(checkpoint), replace(request, memory=64 * GIB)
    )
    assert whole.streaming.activation_memory == 2 * GIB
    limit = most.peak - GIB
    less, fits = fitted(checkpoint, output, resolved.by_output(checkpoint), replace(request, memory=limit))
    assert fits.peak <= limit and LEAST_STATES < less.streaming.activation_memory < 2 * GIB
    assert fits.scratch >= most.scratch


def test_the_peak_is_below_what_was_said(model, tmp_path):
    """A process of its own, on the model's own text: VmHWM, which the kernel counts."""
    out = tmp_path / "out.gguf"
    code = (
        "import re, sys; from fewbits.cli.main import main; "
        "assert main(sys.argv[1:]) == 0; "
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    command = [sys.executable, "-c", code, "quantize", str(model), "--to", "q4_0", "--tokens", "2048",
               "--context", "128", "--out", str(out), "--no-verify"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = float(done.stderr.split("needs ")[1].split(" GiB")[0])
    peak = int(done.stdout.splitlines()[-1]) * 1024
    assert 0.2 * GIB < peak < said * GIB
