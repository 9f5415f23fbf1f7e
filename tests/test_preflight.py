"""Preflight: what is said before the work is what the work then does; and it reads headers alone."""

import json
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch

from fewbits.adapters.forward import next_logits
from fewbits.adapters.transformers import load_model
from fewbits.calibrate.tokens import Tokens
from fewbits.cli.main import main
from fewbits.errors import ModelError, PlanError
from fewbits.files.open import open_checkpoint
from fewbits.model.sites import sites
from fewbits.plan import Plan, parse_rule
from fewbits.plan.method import METHODS
from fewbits.preflight import engines, parameters, preflight
from fewbits.preflight.cache import KINDS, fields_of, kv_cache
from fewbits.preflight.machines import Machine, machines, read_per_token, tokens_per_second
from fewbits.preflight.sizes import OVERHEAD
from fewbits.preflight.speed import Encoding
from fewbits.workflow.memory import ALLOWANCE, MARGIN
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests.tiny import MODELS, save_tiny

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "MixtralForCausalLM")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def tiny(folder):
    """architecture -> its tiny model's directory, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny(name, folder / name, num_hidden_layers=3 if "Gemma" in name else 1)
        return made[name]

    return get


# What is said is what is done


@pytest.mark.parametrize(
    ("name", "to", "file"),
    [
        *product(ARCHITECTURES, ("q4_k_m",), ("gguf", "native")),
        ("LlamaForCausalLM", "int4_g32", "native"),
        ("LlamaForCausalLM", "int4_g32", "gptq"),
    ],
)
def test_output_bytes_and_memory_are_those_of_the_run(tiny, tmp_path, name, to, file):
    """Bytes to the last one. Memory: what is said bounds what is used, from above, and by no more than
    twice the margin for allocators (tensors this small need next to nothing)."""
    checkpoint, request = open_checkpoint(tiny(name)), Request(to=to, file=file)
    said = preflight(checkpoint, request)
    out = tmp_path / "out"
    receipt = quantize(checkpoint, out, request)
    assert said.output == (out if file == "gguf" else out / "model.safetensors").stat().st_size
    assert said.weights == receipt.numel and said.bits_per_weight == pytest.approx(receipt.bits_per_weight)
    assert sum(part.nbytes for part in said.parts) == said.output == said.work.output
    assert receipt.peak_memory_bytes <= said.work.peak_memory <= receipt.peak_memory_bytes + 2 * MARGIN
    assert said.work.scratch == 0 and said.work.way == "streaming" and said.work.total_seconds > 0


def test_parts_are_those_of_the_config(tiny):
    checkpoint = open_checkpoint(tiny("MixtralForCausalLM"))
    found = {p.name: p.weights for p in preflight(checkpoint, Request(to="q8_0", file="gguf")).parts}
    config = checkpoint.config
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    experts, layers = config["num_local_experts"], config["num_hidden_layers"]
    assert found["embedding"] == found["output"] == vocab * hidden
    assert found["experts"] == layers * (3 * experts * hidden * inner + experts * hidden)
    assert found["attention"] == layers * (2 + 2 / 2) * hidden * hidden
    assert found[OVERHEAD] == 0 and "mlp" not in found and "other" not in found


def calibrated(method: str, **given) -> Request:
    windows = torch.zeros(10, 64, dtype=torch.int64)
    return Request(
        to="int8_channel" if method == "ecsq" else "int4_g32",
        file="native",
        method=METHODS[method],
        tokens=Tokens.of(windows, "zeros"),
        **given,
    )


@pytest.mark.parametrize("method", METHODS)
def test_headers_alone_are_read(tiny, method):
    def refuse():
        raise AssertionError("a tensor was read")

    checkpoint = open_checkpoint(tiny("LlamaForCausalLM"))
    tensors = {name: replace(tensor, load=refuse) for name, tensor in checkpoint.tensors.items()}
    request = calibrated(method)
    request = replace(request, method=replace(request.method, transforms=("rotate",)))
    assert preflight(replace(checkpoint, tensors=tensors), request, writes_text=True).output > 0


def test_a_calibrated_run_stays_below_what_is_said(tiny, tmp_path):
    checkpoint, request = open_checkpoint(tiny("LlamaForCausalLM")), calibrated("gptq")
    said = preflight(checkpoint, request)
    receipt = quantize(checkpoint, tmp_path / "out", request)
    block = 4 * sum(prod(site.shape) for site in sites(checkpoint) if site.block == 0)
    assert said.output == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert said.work.way == "block by block" and said.work.peak_memory >= 2 * block + ALLOWANCE
    assert receipt.peak_memory_bytes <= said.work.peak_memory
    inside = sum(part.nbytes for part in said.parts if part.name in ("attention", "mlp"))
    assert said.work.scratch == inside, "the finished blocks lie beside the output until the end"


def test_whole_models_in_memory_are_counted(tiny):
    checkpoint, request = open_checkpoint(tiny("LlamaForCausalLM")), calibrated("gptq")
    plain = preflight(checkpoint, request).work
    written = preflight(checkpoint, request, writes_text=True).work
    distilled = preflight(checkpoint, replace(request, method=replace(request.method, distill=5))).work
    assert [w.way for w in (plain, written, distilled)] == ["block by block", "whole model", "whole model"]
    assert "writing the text" in written.seconds and "distill" in distilled.seconds
    assert distilled.seconds.keys() - plain.seconds.keys() == {"distill"}


def test_what_quantize_refuses_is_refused():
    with pytest.raises(PlanError, match="needs calibration data"):
        preflight(None, Request(to="q4_0", method=METHODS["gptq"]))  # type: ignore[arg-type]


def test_time_grows_with_rows_and_columns():
    plain, walk = Encoding(100, 1.0, 0.5), Encoding(100, 1.0, 0.5, factor=2.0)
    assert plain.seconds(10, 100) == walk.seconds(10, 100) == 6.0
    assert plain.seconds(10, 200) == 12.0 and walk.seconds(10, 200) == 2 * (1 + 10 * 0.5 * 2)
    assert walk.factoring(200) == 16.0 and plain.factoring(200) == 0.0


# Parameters alone


def test_the_classic_check():
    found = {name.split()[0] + (" codes" if "codes" in name else ""): n for name, _, n in parameters(65e9)}
    gib = {name: nbytes / 2**30 for name, nbytes in found.items()}
    assert round(gib["fp32"]) == 242 and round(gib["int4 codes"]) == 30
    assert gib["int4 codes"] < gib["int4_g128"] < gib["q4_k_m"] < gib["int8_channel"] < gib["bf16"]
    assert gib["int4_g128"] == pytest.approx(gib["fp32"] * 4.125 / 32)  # an f16 scale for 128 codes


# The key-value cache


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_is_as_large_as_the_models_own(tiny, name):
    """transformers' cache after some tokens. A full window of 8 keeps 7 between two steps, 8 in a step."""
    checkpoint = open_checkpoint(tiny(name))
    model, kv = load_model(checkpoint), preflight(checkpoint, Request(to="q8_0", file="native")).kv
    assert kv is not None
    window = sum(layer.numbers for layer in kv.layers if layer.window == 8)
    for tokens in (5, 20):
        with torch.no_grad():
            _, cache = next_logits(model, torch.ones(2, tokens, dtype=torch.int64))
        held = sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)
        between = 2 * 2 * window if tokens > 8 else 0
        assert kv.nbytes("f16", tokens, 2) == held + between
    assert (window > 0) == (name == "Gemma3ForCausalLM")


LLAMA3 = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (LLAMA3, 32 * 2 * 8 * 128),  # 128 KiB a token in f16
        ({**LLAMA3, "num_key_value_heads": None}, 32 * 2 * 32 * 128),
        ({**LLAMA3, "head_dim": 64}, 32 * 2 * 8 * 64),
        ({**LLAMA3, "num_key_value_heads": [4] * 16 + [8] * 16}, 16 * 2 * (4 + 8) * 128),
        ({**LLAMA3, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 32 * 576),
        ({**LLAMA3, "layer_types": ["linear_attention", "full_attention"] * 16}, 16 * 2 * 8 * 128),
        ({**LLAMA3, "num_kv_shared_layers": 12}, 20 * 2 * 8 * 128),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, 12 * 2 * 768),
    ],
)
def test_numbers_kept_for_a_token(config, numbers):
    kv = kv_cache(config)
    assert kv.per_token("f16") == 2 * numbers and kv.nbytes("f16", 100, 3) == 600 * numbers
    assert bool(kv.notes) == ("layer_types" in config)
    sizes = {kind: kv.nbytes(kind, 128) for kind in KINDS}
    assert sizes["f16"] > sizes["q8_0"] > sizes["int4"] > sizes["q4_0"]
    assert sizes["q8_0"] * 32 == sizes["f16"] * 17  # 32 codes of 8 bits and an f16 scale


@pytest.mark.parametrize(
    ("more", "full"),
    [
        ({"sliding_window": 64}, 0),
        ({"sliding_window": 64, "use_sliding_window": False}, 32),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 24}, 24),
        ({"sliding_window": 64, "sliding_window_pattern": 4}, 8),
        ({"sliding_window": 64, "layer_types": ["full_attention"] * 5 + ["sliding_attention"] * 27}, 5),
        ({"sliding_window": None}, 32),
    ],
)
def test_sliding_windows_stop_growing(more, full):
    kv, layer = kv_cache(LLAMA3 | more), 2 * 2 * 8 * 128
    assert kv.nbytes("f16", 64) == 64 * 32 * layer
    assert kv.nbytes("f16", 164) == (64 * 32 + 100 * full) * layer
    assert kv_cache(LLAMA3 | more, windows=False).nbytes("f16", 164) == 164 * 32 * layer


def test_llamacpp_attends_to_the_whole_context_of_a_mistral(folder):
    checkpoint = open_checkpoint(save_tiny("MistralForCausalLM", folder / "narrow", sliding_window=16))
    native, gguf = (
        preflight(checkpoint, Request(to="q8_0", file=file), (64, 1, "f16")) for file in ("native", "gguf")
    )
    assert gguf.cache == 4 * native.cache


def test_a_config_without_heads_has_no_cache():
    with pytest.raises(ModelError, match="number of layers, heads"):
        kv_cache({"num_hidden_layers": 4})


def test_gguf_files_say_the_same_as_their_config(tiny, tmp_path):
    checkpoint = open_checkpoint(tiny("LlamaForCausalLM"))
    quantize(checkpoint, tmp_path / "m.gguf", Request(to="q8_0"))
    gguf = open_checkpoint(tmp_path / "m.gguf")
    unknown = replace(gguf, config={})  # as of an architecture without a row
    expected = kv_cache(checkpoint.config)
    assert kv_cache(fields_of(gguf)) == kv_cache(fields_of(unknown)) == expected


def test_groups_that_differ_are_listed_before_the_work(tiny):
    rules = Plan((parse_rule("*.layers.0.*.k_proj=int4_g32"),))
    checkpoint = open_checkpoint(tiny("LlamaForCausalLM"))
    (mixed,) = preflight(checkpoint, Request(to="int8_g32", file="native", plan=rules)).fused
    assert "self_attn" in mixed.group and set(mixed.formats) == {"int4_g32", "int8_g32"}
    assert preflight(checkpoint, Request(to="int8_g32", file="native")).fused == ()
    assert preflight(checkpoint, Request(to="q8_0", file="gguf", plan=rules_of("q4_0"))).fused == ()


def rules_of(kind: str) -> Plan:
    return Plan((parse_rule(f"*.k_proj={kind}"),))


# Machines


def test_bandwidth_bounds_speed():
    machine = Machine("m", 100.0)
    assert tokens_per_second(machine, 10**11, 0) == 1.0
    assert tokens_per_second(machine, 10**11, 10**11) == 0.5
    assert tokens_per_second(machine, 10**11, 0, batch=4) == 4.0
    names = [row.name for row in machines()]
    assert len(set(names)) == len(names) >= 12 and all(row.gb_per_s > 50 for row in machines())


def test_a_token_reads_its_experts_and_one_row_of_the_embedding(tiny):
    checkpoint = open_checkpoint(tiny("MixtralForCausalLM"))
    parts = {p.name: p for p in preflight(checkpoint, Request(to="q8_0", file="gguf")).parts}
    read = read_per_token(tuple(parts.values()), checkpoint.config)
    left = parts["embedding"].nbytes + parts[OVERHEAD].nbytes + parts["experts"].nbytes / 2  # 2 of 4
    assert read == sum(p.nbytes for p in parts.values()) - left
    tied = preflight(open_checkpoint(tiny("Qwen2ForCausalLM")), Request(to="q8_0", file="gguf"))
    assert tied.read == tied.output - next(p.nbytes for p in tied.parts if p.name == OVERHEAD)


# The command


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(["plan", *map(str, arguments)])
        said = capsys.readouterr()
        assert list(tmp_path.iterdir()) == [], "nothing is written"
        return code, said.out, said.err

    return call


def test_the_command_prints_tables_and_json(tiny, run):
    model = tiny("LlamaForCausalLM")
    code, out, err = run(model, "--to", "q4_k_m", "--context", 1000, "--batch", 2)
    assert (code, err) == (0, "") and "tiny" not in out
    for word in ("bits/weight", "1000 tokens x 2", "peak memory", "RTX 4090", "transformers", "file (gguf)"):
        assert word in out
    code, out, err = run(model, "--to", "q4_k_m", "--context", 1000, "--batch", 2, "--json")
    found = json.loads(out)
    assert (code, err, found["unfit"]) == (0, "", [])
    kv = found["kv_cache"]
    assert kv["f16"]["nbytes"] == 2000 * kv["f16"]["per_token"]
    run_memory = found["run"]
    assert run_memory["memory"] == found["nbytes"] + kv["f16"]["nbytes"] + run_memory["overhead"]
    assert found["quantize"]["way"] == "whole model", "the default calibrates on the model's own text"
    assert {row["engine"] for row in found["engines"]} == set(engines.ANSWERS)


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--memory", 100], 0, ""),
        (["--memory", 0.01], 3, "more than 0.01 GiB"),
        (["--engine", "llama.cpp=b4000"], 0, ""),
        (["--engine", "mlx-lm=1.0"], 3, "mlx-lm 1.0 cannot load this: does not read gguf"),
        (["--engine", "llama.cpp=b4000", "--file", "native"], 3, "reads GGUF"),
        (["--rule", "*.down_proj=q6_k"], 0, ""),
    ],
)
def test_exit_code_3_says_what_does_not_fit(tiny, run, more, code, says):
    got, out, err = run(tiny("LlamaForCausalLM"), "--to", "q8_0", "--effort", "fast", *more, "--json")
    assert got == code and says in err and bool(json.loads(out)["unfit"]) == (code == 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to plan"),
        (["{model}"], "--to TYPE"),
        (["{model}", "--to", "q8_0", "--engine", "x"], "unknown engine"),
        (["{model}", "--to", "q8_0", "--batch", 0], "at least 1"),
        (["{model}", "--params", 1e9], "leave out MODEL"),
        (["--params", 0], "at least 1 parameter"),
        (["--params", "inf"], "at least 1 parameter"),
    ],
)
def test_errors(tiny, run, arguments, says):
    code, out, err = run(*(str(a).format(model=tiny("LlamaForCausalLM")) for a in arguments))
    assert (code, out) == (1, "") and says in err


def test_parameters_alone(run):
    code, out, err = run("--params", "65e9")
    assert (code, err) == (0, "") and "242.14 GiB" in out and "30.27 GiB" in out
    rows = json.loads(run("--params", "65e9", "--json")[1])["rows"]
    assert all(row["nbytes"] == 65e9 * row["bits_per_weight"] / 8 for row in rows)
