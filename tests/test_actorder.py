"""Act order from the command to every file: quantize, convert, distill, and packed in transformers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fewbits.transformers  # noqa: F401  registers native directories
from fewbits import Plan, Rule
from fewbits.adapters.transformers import load_model
from fewbits.calibrate.tokens import Tokens
from fewbits.cli.main import main
from fewbits.errors import FewbitsError
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from fewbits.plan.method import EFFORTS, METHODS
from fewbits.qtensor import QTensor
from fewbits.workflow.request import Request
from fewbits.workflow.run import convert
from fewbits.workflow.run import run as quantize
from tests.packed_models import IDS, auto, logits
from tests.tiny import CORPUS, VOCAB, change_weights, save_tiny

SMALL = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
ACTORDER = "int4_g32_actorder"
WINDOWS = torch.randint(3, VOCAB, (12, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Norms of different sizes, so that inputs have columns that count more than others."""
    path = save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("actorder") / "model", **SMALL)
    uneven = torch.randn(128, generator=torch.Generator().manual_seed(1)).mul(0.5).exp()
    norms = [name for name in open_checkpoint(path).tensors if name.endswith("layernorm.weight")]
    return change_weights(path, dict.fromkeys(norms, lambda w: w * uneven))


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory) -> Path:
    """By the command, with gptq, as a GPTQ directory."""
    folder = tmp_path_factory.mktemp("packed")
    (folder / "text.txt").write_text(CORPUS, encoding="utf-8")
    text = ["--calibrate", str(folder / "text.txt"), "--tokens", "256", "--context", "32"]
    command = ["quantize", str(model), "--to", ACTORDER, "--file", "gptq", "--method", "gptq", *text]
    assert main([*command, "--out", str(folder / "gptq")]) == 0
    return folder / "gptq"


def quantized(path: Path) -> dict[str, QTensor]:
    tensors = open_checkpoint(path).tensors
    return {name: tensor.load() for name, tensor in tensors.items() if tensor.quantized}


def same(a: Path, b: Path) -> bool:
    """The same planes, so the same bits."""
    ours, theirs = quantized(a), quantized(b)
    return ours.keys() == theirs.keys() and all(
        q.format == theirs[name].format and torch.equal(plane, theirs[name].planes[key])
        for name, q in ours.items()
        for key, plane in q.planes.items()
    )


def test_the_command_writes_desc_act(packed):
    settings = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert (settings["desc_act"], settings["checkpoint_format"], settings["group_size"]) == (True, "gptq", 32)
    found = quantized(packed)
    assert {q.format.name for q in found.values()} == {ACTORDER} and len(found) == 14
    block = "model.layers.1.self_attn."
    q, k, v = (found[f"{block}{part}_proj.weight"].planes["g_idx"] for part in "qkv")
    assert torch.equal(q, k) and torch.equal(k, v), "vLLM keeps one g_idx for all three"
    assert not torch.equal(q, found[f"{block}o_proj.weight"].planes["g_idx"])


def test_the_model_comes_nearer_than_by_rounding(model, tmp_path):
    def off(name: str, **asked) -> float:
        quantize(model, tmp_path / name, Request(ACTORDER, file="gptq", **asked))
        with torch.no_grad():
            ours, theirs = (
                load_model(open_checkpoint(path))(WINDOWS).logits for path in (tmp_path / name, model)
            )
        return float((ours - theirs).norm() / theirs.norm())

    tokens = Tokens.of(WINDOWS, "random")
    assert off("gptq", method=METHODS["gptq"], tokens=tokens) < off("rtn")


def test_not_a_bit_changes_from_file_to_file(packed, tmp_path):
    here = packed
    for i, file in enumerate(("gptq_v2", "native", "gptq", "native", "gptq_v2", "gptq")):
        there = tmp_path / f"{i}-{file}"
        receipt = convert(here, there, file)
        assert {row.relative_error for row in receipt.tensors} <= {None, 0.0}
        assert same(there, packed)
        here = there
    arrays, before = (load_file(path / "model.safetensors") for path in (here, packed))
    assert arrays.keys() == before.keys()
    assert all(torch.equal(array, before[key]) for key, array in arrays.items())


@pytest.mark.parametrize("file", ["awq", "mlx", "compressed-tensors", "gguf", "bitsandbytes"])
def test_other_files_refuse_and_name_the_format_in_order(packed, tmp_path, file):
    out = tmp_path / ("m.gguf" if file == "gguf" else "m")
    near = {"gguf": "q4_0", "bitsandbytes": "nf4"}.get(file, "int4_g32")
    with pytest.raises(FewbitsError, match=rf"actorder.*{near}"):
        convert(packed, out, file)
    assert not out.exists()
    receipt = convert(packed, out, file, requantize=True)
    again = [row for row in receipt.tensors if row.relative_error]
    assert len(again) == 14 and all("actorder" not in row.format for row in again)


def test_columns_that_are_in_order_after_all_go_everywhere(model, tmp_path):
    """Without importance none moves: the values are those of int4_g32."""
    for to in (ACTORDER, "int4_g32"):
        quantize(model, tmp_path / to, Request(plan=Plan((Rule("model.layers.*_proj", to),)), file="native"))
    for file in ("gguf", "gptq", "compressed-tensors"):
        ends = []
        for to in (ACTORDER, "int4_g32"):
            out = tmp_path / f"{to}-{file}{'.gguf' if file == 'gguf' else ''}"
            convert(tmp_path / to, out, file)
            ends.append(out)
        assert same(*ends)


def test_transformers_holds_it_packed(packed, tmp_path):
    convert(packed, tmp_path / "n", "native")
    model = auto(tmp_path / "n")
    assert model.model.layers[0].mlp.up_proj.weight.format.name == ACTORDER
    with torch.no_grad():
        wanted = load_model(open_checkpoint(packed))(IDS).logits
    assert torch.equal(logits(model), wanted)


def test_effort_best_leaves_columns_in_their_groups(model, tmp_path):
    """Learned rounding moves codes, distill moves scales."""
    method = replace(EFFORTS["best"], learn="light", distill=4)
    asked = Request(ACTORDER, file="gptq_v2", method=method, tokens=Tokens.of(WINDOWS, "random"))
    quantize(model, tmp_path / "best", asked)
    quantize(model, tmp_path / "good", replace(asked, method=EFFORTS["good"]))
    best, good = quantized(tmp_path / "best"), quantized(tmp_path / "good")
    moved = [not torch.equal(q.planes["scale"], good[name].planes["scale"]) for name, q in best.items()]
    assert any(moved)
    assert {q.format.name for q in best.values()} == {ACTORDER}
    first = "model.layers.0.self_attn.q_proj.weight"  # whose input nothing has changed
    assert torch.equal(best[first].planes["g_idx"], good[first].planes["g_idx"])


def test_a_damaged_index_is_told_by_its_name(packed, tmp_path):
    convert(packed, tmp_path / "n", "native")
    path = tmp_path / "n" / "model.safetensors"
    data = path.read_bytes()
    index = quantized(packed)["model.layers.0.mlp.up_proj.weight"].planes["g_idx"].numpy().tobytes()
    assert data.count(index) == 2  # gate has the same
    path.write_bytes(data.replace(index, b"\x7f" + index[1:]))
    with pytest.raises(FewbitsError, match="g_idx names group 127, there are 4"):
        open_checkpoint(tmp_path / "n").tensors["model.layers.0.mlp.up_proj.weight"].load().decode()


def test_every_format_in_act_order_has_one_in_order():
    found = {name: FORMATS.get(name).ordered for name in FORMATS if name.endswith("_actorder")}
    assert len(found) == 3
    assert all(form.name == name.removesuffix("_actorder") for name, form in found.items())


@pytest.mark.engine
def test_compressed_tensors_has_no_act_order_any_more():
    """Why the layout does not write it: the package refuses a config that says so."""
    arguments = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs
    assert arguments(num_bits=4, group_size=32, actorder="weight")
    with pytest.raises(ValueError, match="has been removed"):
        arguments(num_bits=4, group_size=32, actorder="group")
