"""evaluate(engine=...): the figures are those of the engine's own logits, got here in another way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fewbits.adapters.llamacpp import engine_logits
from fewbits.cli.main import main
from fewbits.engines import Engine
from fewbits.engines.process import Process
from fewbits.errors import FileError, KernelError, PlanError
from fewbits.evaluation import Settings, Simulation, Text, evaluate
from fewbits.evaluation import compare as compare_module
from fewbits.files.open import open_checkpoint
from fewbits.memory import resident_memory
from fewbits.release.publish import read_receipt
from fewbits.runtime.runner import Blockwise, InEngine, Whole
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests.tiny import CORPUS, save_tiny

WINDOWS = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(
        "LlamaForCausalLM",
        tmp_path_factory.mktemp("evaluate") / "model",
        max_position_embeddings=1024,
    )


@pytest.fixture(scope="module")
def gguf(model):
    quantize(model, model.parent / "q.gguf", Request("q4_0"))
    return model.parent / "q.gguf"


def by_hand(model, gguf, windows, first):
    """Mean KL divergence, agreement and perplexity; the engine loaded anew for each window."""
    float_model, found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), []
    for window in windows:
        with torch.inference_mode():
            p = float_model(window[None]).logits[0, first:-1].double().log_softmax(-1)
        q = engine_logits(gguf, window)[first:-1].double().log_softmax(-1)
        nll = -q[torch.arange(len(q)), window[first + 1 :]]
        found.append(torch.stack([(p.exp() * (p - q)).sum(1), (p.argmax(1) == q.argmax(1)).double(), nll]))
    kl, agreement, nll = torch.cat(found, 1).mean(1).tolist()
    return kl, agreement, torch.tensor(nll).exp().item()


@pytest.mark.engine
@pytest.mark.parametrize(("context", "first"), [(32, 16), (32, 3), (700, 350)])  # 700: more than a batch
def test_figures_are_those_of_the_engines_logits(model, gguf, context, first):
    tokens = torch.randint(0, 300, (3 * context,), generator=torch.Generator().manual_seed(1))
    settings = Settings(context=context, score_from=first, engine="llama.cpp")
    found = evaluate(model, [gguf], Text(tokens, "random"), settings)
    scores = found.quantized_models[0]
    kl, agreement, perplexity = by_hand(model, gguf, tokens.view(3, context), first)
    assert scores.fidelity.kl.value == pytest.approx(kl, rel=1e-5)
    assert scores.fidelity.agreement.value == pytest.approx(agreement)
    assert scores.perplexity.value == pytest.approx(perplexity, rel=1e-5)
    decoded = evaluate(model, [gguf], Text(tokens, "random"), replace(settings, engine=None, prompts=0))
    assert decoded.quantized_models[0].fidelity.kl.value != pytest.approx(kl, rel=1e-4)
    assert scores.ran.startswith("in llama.cpp (llama-cpp-python ") and scores.ran in found.table()
    assert not scores.continuations and "ran in an engine" in found.table()


@pytest.mark.engine
def test_a_reference_that_does_not_fit_runs_block_by_block(model, gguf, monkeypatch):
    tokens = Text(WINDOWS.flatten(), "random")
    settings = Settings(context=40, engine="llama.cpp")
    least = Blockwise(open_checkpoint(model)).needs(3, 40)
    whole = evaluate(model, [gguf], tokens, settings)
    # A tiny model takes less than the allowance for buffers: so much that it does not fit whole.
    monkeypatch.setattr(Whole, "needs", lambda *given: least + 2**30)
    memory = resident_memory() + least + 2**28
    parts = evaluate(model, [gguf], tokens, replace(settings, memory=memory))
    assert (parts.reference.ran, whole.reference.ran) == ("block by block", "whole, float32")
    kl = whole.quantized_models[0].fidelity.kl.value
    assert parts.quantized_models[0].fidelity.kl.value == pytest.approx(kl, rel=1e-4)


@pytest.mark.engine
def test_the_command_says_what_ran(model, gguf, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(CORPUS, encoding="utf-8")
    given = ["evaluate", str(model), str(gguf), "--text", str(text), "--context", "32", "--windows", "3"]
    assert main([*given, "--engine", "llama.cpp", "--record"]) == 0
    assert "q.gguf ran in llama.cpp (llama-cpp-python" in capsys.readouterr().out
    assert main([*given, "--engine", "llama.cpp", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["quantized_models"][0]
    assert read_receipt(gguf).evaluation["ran"] == found["ran"]
    card = gguf.with_name("q.gguf.README.md").read_text(encoding="utf-8")
    assert "KL divergence to the reference in llama.cpp" in card
    assert read_receipt(gguf).evaluation["kl"] == found["fidelity"]["kl"][0]


@pytest.mark.engine
@pytest.mark.parametrize("file", ["huggingface", "native", "compressed-tensors", "gptq", "onnx", "mlx"])
def test_other_engines_give_the_files_logits(model, tmp_path, file):
    if file != "huggingface":
        quantize(model, tmp_path / "q", Request(to="int4_g32", file=file))
    checkpoint = open_checkpoint(model if file == "huggingface" else tmp_path / "q")
    try:
        runner = InEngine(checkpoint, checkpoint.file_type.engines[0])
    except KernelError as error:
        pytest.skip(str(error))
    for wanted, got in zip(Whole(checkpoint).logits(WINDOWS, 7), runner.logits(WINDOWS, 7), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0.02)  # GPTQModel: 0.007
    assert runner.seconds > 0 and runner.kind.endswith(")")


def test_what_cannot_run_is_refused_before_anything_runs(model, gguf, tmp_path, monkeypatch):
    text, settings = Text(WINDOWS.flatten(), "random"), Settings(context=40, engine="llama.cpp")
    with pytest.raises(PlanError, match=r"--engine llama\.cpp .* --activations and --kv-cache"):
        replace(settings, simulation=Simulation("int8_dynamic"))
    monkeypatch.setattr(Whole, "logits", None)
    with pytest.raises(PlanError, match=r"'llama\.cpp' is no engine that huggingface files .*: transformers"):
        evaluate(model, [model], text, settings)
    quantize(model, tmp_path / "q", Request(to="int4_g32", file="gptq"))
    with pytest.raises(PlanError, match="only asked whether it reads the config"):
        evaluate(model, [tmp_path / "q"], text, replace(settings, engine="vllm"))
    monkeypatch.setattr("fewbits.engines.installed", lambda name: None)
    with pytest.raises(KernelError, match=r"llama-cpp-python is not installed \(pip install"):
        evaluate(model, [gguf], text, settings)


def test_a_disk_that_does_not_hold_the_engines_logits_is_an_error(model, monkeypatch):
    nbytes = 4 * 600 * 3 * 19  # of the reference alone
    monkeypatch.setattr(compare_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": nbytes}))
    text, settings = Text(WINDOWS.flatten(), "random"), Settings(context=40, engine="transformers")
    with pytest.raises(FileError, match=r"and logits of the engine: 27\d\.\d KiB, free: 133\.6 KiB"):
        evaluate(model, [model], text, settings)


SCRIPT = """
import json, os, sys, time
import numpy as np
task, folder = json.load(open(sys.argv[2])), sys.argv[3]
for i, window in enumerate(task["windows"]):
    np.save(f"{folder}/{i}.npy", np.full((2, 3), i, np.float32))
    if i == 1:
        exec(os.environ["THEN"])
print(json.dumps({"engine": "toy", "version": "1", "seconds": 1.0}))
"""


@pytest.mark.parametrize(
    ("then", "whole", "why"),
    [("pass", 4, None), ("time.sleep(1); sys.exit('no memory')", 1, "exit code 1: no memory"),
     ("time.sleep(60)", 1, "more than 4 s"), ("os._exit(0)", 2, "exit code 0: no output")],
)  # fmt: skip
def test_windows_are_read_one_by_one_and_only_whole_ones(model, tmp_path, monkeypatch, then, whole, why):
    """A window is taken when the next is there: the last one written may be half of it."""
    monkeypatch.setenv("THEN", then)
    (tmp_path / "run_toy.py").write_text(SCRIPT, encoding="utf-8")
    (scratch := tmp_path / "scratch").mkdir()
    engine = Engine("toy", str(tmp_path / "run_toy.py"), (), "not to be had")
    process, read = Process(engine, open_checkpoint(model), seconds=4), []
    try:
        for i, logits in enumerate(process.logits([[1, 2]] * 4, scratch=scratch)):
            read.append(bool((logits == i).all()))
            assert not [path for path in Path(scratch).rglob("*.npy") if int(path.stem) < i]
    except KernelError as error:
        assert why and why in str(error)
    assert read == [True] * whole and (process.said.get("version") == "1") == (why is None)
    assert list(scratch.iterdir()) == []
