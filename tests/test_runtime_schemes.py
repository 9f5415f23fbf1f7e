"""Schemes for activations and the KV cache in files: written, read, converted, evaluated."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention

from fewbits.activations import CACHES, attention
from fewbits.activations.kv_cache import ranges, to_e4m3
from fewbits.adapters.transformers import load_model
from fewbits.blocks.simulate import changed_attention
from fewbits.calibrate.tokens import Tokens
from fewbits.cli.main import main
from fewbits.errors import CalibrationError, FewbitsError, PlanError
from fewbits.evaluation import Settings, Simulation, Text, evaluate
from fewbits.files.open import open_checkpoint
from fewbits.workflow.request import Request
from fewbits.workflow.run import convert
from fewbits.workflow.run import run as quantize
from tests.tiny import save_tiny, tiny_model

WINDOWS = torch.randint(3, 500, (4, 64), generator=torch.Generator().manual_seed(0))
TOKENS = Tokens.of(WINDOWS, "random")
ATTENTION = "model.layers.{}.self_attn"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("recorded") / "m")


def written(source, out, **asked):
    quantize(source, out, Request(to="int8_channel", tokens=TOKENS, **asked))
    return out


def metadata_of(path):
    return open_checkpoint(path).metadata


def test_steps_are_the_largest_over_448():
    model, largest = tiny_model("LlamaForCausalLM"), []

    def seen(query, key, value, *rest, **given):
        largest.append((float(key.abs().max()), float(value.abs().max())))
        return scaled_dot_product_attention(query, key, value, *rest, **given)

    with changed_attention(model, seen), torch.no_grad():
        model(WINDOWS)
    found = ranges(model, WINDOWS)
    assert list(found) == [ATTENTION.format(i) for i in range(2)]
    for scales, peaks in zip(found.values(), largest, strict=True):
        assert scales == pytest.approx([peak / 448 for peak in peaks], rel=1e-6)


def test_what_is_stored_is_the_nearest_e4m3():
    x = torch.tensor([0.0, 1.0, 1.06, 1.07, -3.3, 447.0, 500.0, -1e9])
    assert to_e4m3(x * 0.5, 0.5).tolist() == [0, 0.5, 0.5, 0.5625, -1.625, 224, 224, -224]


def test_every_block_reads_its_own_steps():
    cache, x = CACHES.get("fp8"), torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    scales = [(0.01, 0.02), (0.5, 1.0)]
    attend = attention(cache, scales)
    for of_keys, of_values in scales + scales:
        expected = scaled_dot_product_attention(x, to_e4m3(x, of_keys), to_e4m3(x, of_values), is_causal=True)
        assert torch.equal(attend(x, x, x, is_causal=True), expected)
    with pytest.raises(CalibrationError, match="fixed scale for each block"):
        attention(cache)


@pytest.mark.parametrize("file", ["compressed-tensors", "native"])
def test_a_cache_is_told_and_read_again(source, tmp_path, file):
    out = written(source, tmp_path / "out", file=file, kv_cache="fp8")
    found = metadata_of(out)["kv_cache"]
    assert found["scheme"] == "fp8" and list(found["steps"]) == [ATTENTION.format(i) for i in range(2)]
    expected = ranges(load_model(open_checkpoint(out)), WINDOWS)
    for module, scales in found["steps"].items():
        assert scales == pytest.approx(expected[module], rel=1e-6)
    if file == "compressed-tensors":
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert config["kv_cache_scheme"] == {
            "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False,
        }  # fmt: skip
        arrays = load_file(out / "model.safetensors")
        for module, scales in found["steps"].items():
            assert [arrays[f"{module}.{part}_scale"].item() for part in "kv"] == pytest.approx(scales)


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static", "int8_asymmetric_static"])
def test_a_conversion_keeps_what_it_can_say(source, tmp_path, scheme):
    first = written(source, tmp_path / "a", file="compressed-tensors", activations=scheme, kv_cache="fp8")
    convert(first, tmp_path / "b", "native")
    convert(tmp_path / "b", tmp_path / "c", "compressed-tensors")
    recorded = [
        {key: metadata_of(path)[key] for key in ("activations", "kv_cache")}
        for path in (first, tmp_path / "b")
    ]
    assert recorded[0] == recorded[1] and recorded[0]["activations"]["scheme"] == scheme
    assert load_file(first / "model.safetensors").keys() == load_file(tmp_path / "c/model.safetensors").keys()
    for key, value in load_file(tmp_path / "c" / "model.safetensors").items():
        assert torch.equal(value, load_file(first / "model.safetensors")[key]), key
    assert (first / "config.json").read_bytes() == (tmp_path / "c" / "config.json").read_bytes()


def test_what_is_not_kept_is_a_note(source, tmp_path):
    first = written(
        source, tmp_path / "a", file="compressed-tensors", activations="int8_dynamic", kv_cache="fp8"
    )
    notes = convert(first, tmp_path / "b", "gptq").notes
    assert any("activations in int8_dynamic: not kept" in note for note in notes)
    assert any("kv_cache in fp8: not kept" in note for note in notes)
    notes = convert(first, tmp_path / "c.gguf").notes
    assert sum("a GGUF file cannot record" in note for note in notes) == 2
    request = Request(to="int4_g32", requantize=True)
    assert sum("quantized again" in note for note in quantize(first, tmp_path / "d", request).notes) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": 3}, "activations is 3, no scheme"),
        ({"kv_cache": {"scheme": "fp8", "steps": {"a": [1]}}}, "kv_cache is .* no scheme with its ranges"),
        ({"activations": {"scheme": "int8_static", "ranges": {"a": ["x", 0]}}}, "activations is"),
        ({"activations": {"scheme": "int8_static", "ranges": {}}}, "has no ranges for it"),
        ({"kv_cache": {"scheme": "fp8", "steps": {}}}, "self_attn: the record of kv_cache has no steps"),
    ],
)
def test_a_damaged_record_is_told(source, tmp_path, changes, message):
    out = written(source, tmp_path / "a", file="native", activations="int8_dynamic", kv_cache="fp8")
    index = json.loads((out / "fewbits.json").read_text()) | changes
    (out / "fewbits.json").write_text(json.dumps(index))
    with pytest.raises(FewbitsError, match=message):
        convert(out, tmp_path / "b", "compressed-tensors")
    assert not (tmp_path / "b" / "config.json").exists()


def test_what_no_record_says_is_told(source, tmp_path):
    out = written(source, tmp_path / "a", file="compressed-tensors", activations="int8_dynamic")
    config = json.loads((out / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] |= {"strategy": "group", "group_size": 16}
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "int", "symmetric": True}
    (out / "config.json").write_text(json.dumps(config))
    unread = metadata_of(out)["unread"]
    assert len(unread) == 2 and "inputs of weights" in unread[0] and "cache of keys" in unread[1]
    notes = convert(out, tmp_path / "b", "native").notes
    assert [note for note in notes if note.startswith("the input: ")] == [f"the input: {x}" for x in unread]


def test_it_is_refused_where_it_cannot_be_said(source, tmp_path):
    with pytest.raises(PlanError, match="gptq directory cannot record a scheme of the KV cache"):
        written(source, tmp_path / "a", file="gptq", kv_cache="fp8")
    with pytest.raises(PlanError, match="GGUF file cannot record"):
        written(source, tmp_path / "a.gguf", kv_cache="fp8")
    with pytest.raises(PlanError, match="a cache of keys and values in int4; it can say fp8"):
        written(source, tmp_path / "a", file="compressed-tensors", kv_cache="int4")
    with pytest.raises(PlanError, match="no file records it; use fp8"):
        written(source, tmp_path / "a", file="native", kv_cache="int4")
    with pytest.raises(CalibrationError, match="scales measured on calibration text"):
        request = Request(to="int8_channel", file="compressed-tensors", kv_cache="fp8")
        quantize(source, tmp_path / "b", request)
    plan = [
        f"--rule={part}=bf16" for part in ("*.0.self_attn.k_proj.weight", "*.0.self_attn.[qv]_proj.weight")
    ]
    command = ["quantize", str(source), "--to", "int4_g32", "--file", "compressed-tensors", *plan]
    assert main([*command, "--kv-cache", "fp8", "--effort", "fast", "--out", str(tmp_path / "c")]) == 1


def test_evaluate_runs_a_quantized_as_its_directory_says(source, tmp_path):
    """A static scheme and a cache, with the scales in the directory, without any text to calibrate."""
    out = written(
        source, tmp_path / "a", file="compressed-tensors", activations="int8_static", kv_cache="fp8"
    )
    convert(out, tmp_path / "plain", "gptq")
    text = Text(WINDOWS.flatten(), "random tokens")
    settings = Settings(context=32, prompts=0)
    found = evaluate(
        open_checkpoint(source), [open_checkpoint(p) for p in (out, tmp_path / "plain")], text, settings
    )
    recorded, plain = found.quantized_models
    assert recorded.simulated.activations == "int8_static" and recorded.simulated.cache == "fp8"
    assert recorded.simulated.sites == 14 and plain.simulated is None
    assert recorded.fidelity.kl.value > plain.fidelity.kl.value
    asked = Simulation(cache="fp8", calibration=WINDOWS)
    again = evaluate(open_checkpoint(source), [open_checkpoint(tmp_path / "plain")], text,
                     Settings(context=32, prompts=0, simulation=asked))  # fmt: skip
    assert again.quantized_models[0].simulated.cache_bits == 8
    assert again.quantized_models[0].fidelity.kl.value != plain.fidelity.kl.value


def test_a_text_is_read_where_only_the_runtime_is_told_of_it(source, tmp_path):
    """--effort fast rounds without a text, and the scales of a cache still come from the given one."""
    (tmp_path / "text.txt").write_text("a quick brown fox jumps over the lazy dog; " * 200)
    command = ["quantize", str(source), "--to", "int8_channel", "--file", "compressed-tensors", "--no-verify"]
    command += [
        "--effort",
        "fast",
        "--calibrate",
        str(tmp_path / "text.txt"),
        "--tokens",
        "64",
        "--context",
        "32",
    ]
    assert (
        main([*command, "--kv-cache", "fp8", "--activations", "int8_static", "--out", str(tmp_path / "a")])
        == 0
    )
    assert main([*command, "--activations", "int8_dynamic", "--out", str(tmp_path / "b")]) == 0
    recorded = metadata_of(tmp_path / "a")
    assert len(recorded["kv_cache"]["steps"]) == 2 and len(recorded["activations"]["ranges"]) == 14
    assert metadata_of(tmp_path / "b")["activations"]["scheme"] == "int8_dynamic"
