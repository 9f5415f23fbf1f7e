"""quantize and convert from end to end on tiny models: what was asked is written, and said truly."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fewbits.adapters.transformers import load_model, load_tokenizer
from fewbits.errors import FormatError, ModelError, PlanError
from fewbits.files.gguf.file import read_gguf
from fewbits.files.open import open_checkpoint
from fewbits.model.archs import gguf_entries, require_architecture, rope_rows
from fewbits.plan import Plan, parse_rule
from fewbits.plan.method import Method
from fewbits.qtensor import QTensor
from fewbits.release.receipt import Receipt
from fewbits.workflow.request import Request
from fewbits.workflow.run import convert
from fewbits.workflow.run import run as quantize
from tests.tiny import read_by_gguf, save_tiny

DOWN = "model.layers.0.mlp.down_proj.weight"
Q4_K_M = ("q4_k", "q5_0", "q6_k", "q8_0", "f32")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """llama has rows of 320 in down_proj, which no block of 256 divides."""
    at = tmp_path_factory.mktemp("models")
    shapes = {"LlamaForCausalLM": {"intermediate_size": 320}, "Gemma3ForCausalLM": {}}
    names = ("LlamaForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM")
    return {name: save_tiny(name, at / name, **shapes.get(name, {})) for name in names}


@pytest.fixture
def llama(models) -> Path:
    return models["LlamaForCausalLM"]


def rules(*texts: str) -> Plan:
    return Plan(tuple(map(parse_rule, texts)))


def formats(receipt: Receipt) -> dict[str, str]:
    return {row.name: row.format for row in receipt.tensors}


def written(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))


def relative_error(w: torch.Tensor, decoded: torch.Tensor) -> float:
    return float((decoded.double() - w.double()).norm() / w.double().norm())


# The receipt


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("to", ["q4_k_m", "q3_k_s", "q8_0", "f16"])
def test_the_receipt_is_true_of_a_gguf_file(models, name, to, tmp_path):
    """Every figure again from the files, by the gguf package and plain arithmetic."""
    receipt = quantize(models[name], tmp_path / "m.gguf", Request(to))
    found = read_by_gguf(tmp_path / "m.gguf")
    source = open_checkpoint(models[name])
    entries = {
        e.name: e for e in gguf_entries(require_architecture(source.config), source.config, source.tensors)
    }
    assert [row.gguf_name for row in receipt.tensors] == list(found) == list(entries)
    for row in receipt.tensors:
        kind, decoded, raw = found[row.gguf_name]
        entry = entries[row.gguf_name]
        parts = [source.tensors[name].load() for name in entry.sources]
        if entry.rows == "rope":
            parts = [part[rope_rows(part.shape[0], entry.heads)] for part in parts]
        w = torch.stack(parts) if len(parts) > 1 else parts[0]
        assert (kind, len(raw), tuple(w.shape)) == (row.format, row.nbytes, row.shape)
        assert row.digest == sha256(raw).hexdigest()
        error = relative_error(w, decoded.view(w.shape))
        # Squares are summed in another order, and the errors are differences of f32.
        assert (row.relative_error or 0.0) == pytest.approx(error, rel=1e-5)
        assert (row.max_abs_error or 0.0) == pytest.approx(float((decoded.view(w.shape) - w).abs().max()))
    check_totals(receipt, tmp_path / "m.gguf", models[name])
    assert Receipt.from_json((tmp_path / "m.gguf.receipt.json").read_text()) == receipt


@pytest.mark.parametrize("to", ["int4_g32", "nf4", "mxfp4", "int8_channel_asym", "q4_k_m"])
def test_the_receipt_is_true_of_a_native_directory(llama, to, tmp_path):
    receipt = quantize(llama, tmp_path / "n", Request(to, file="native"))
    source, quantized = open_checkpoint(llama), open_checkpoint(tmp_path / "n")
    assert [row.name for row in receipt.tensors] == list(source.tensors)
    with safe_open(tmp_path / "n/model.safetensors", "pt") as file:
        planes = {
            key: file.get_tensor(key).contiguous().view(torch.uint8).numpy().tobytes()
            for key in list(file.keys())
        }
    for row in receipt.tensors:
        value = quantized.tensors[row.name].load()
        names = [row.name]
        if isinstance(value, QTensor):
            assert value.format.name == row.format
            names = [f"{row.name}.{plane.name}" for plane in value.format.planes]
        digests = [sha256(planes[name]).hexdigest() for name in names]
        assert row.digest == (
            digests[0] if len(names) == 1 else sha256("".join(digests).encode()).hexdigest()
        )
        assert row.nbytes == sum(len(planes.pop(name)) for name in names)
        decoded = value.decode() if isinstance(value, QTensor) else value
        error = relative_error(source.tensors[row.name].load(), decoded)
        assert (row.relative_error or 0.0) == pytest.approx(error, rel=1e-5)
    assert not planes
    check_totals(receipt, tmp_path / "n/model.safetensors", llama)
    linear = {name for name in source.tensors if "_proj" in name}
    assert {row.name for row in receipt.tensors if row.format not in ("f32", "bf16")} >= linear


def check_totals(receipt: Receipt, out: Path, model: Path) -> None:
    weights = model / "model.safetensors"
    assert [(f.file, f.nbytes, f.sha256) for f in receipt.outputs] == [
        (out.name, out.stat().st_size, sha256(out.read_bytes()).hexdigest())
    ]
    assert [(f.file, f.sha256) for f in receipt.inputs] == [
        (weights.name, sha256(weights.read_bytes()).hexdigest())
    ]
    assert receipt.bits_per_weight == 8 * sum(r.nbytes for r in receipt.tensors) / receipt.numel
    header = out.stat().st_size - receipt.nbytes
    assert 0 < header < 100_000


def test_a_row_that_no_block_divides_gets_the_fall_back_and_the_reason(llama, tmp_path):
    receipt = quantize(llama, tmp_path / "m.gguf", Request("q4_k_m"))
    assert [(row.gguf_name, row.asked, row.format) for row in receipt.changed()] == [
        ("blk.0.ffn_down.weight", "q4_k", "q5_0"),
        ("blk.1.ffn_down.weight", "q6_k", "q8_0"),
    ]
    assert all("row length 320 is not a multiple of 256" in row.reason for row in receipt.changed())
    assert all(row.reason.startswith("kept") for row in receipt.tensors if row.format == "f32")


# Rules


def test_the_first_rule_that_matches_wins_by_either_name(llama, tmp_path):
    plan = rules("*.0.mlp.down_proj=q8_0", "blk.1.attn_q=mxfp4_ggml", "*.down_proj=q4_0", "*=q5_1")
    receipt = quantize(llama, tmp_path / "m.gguf", Request("q4_k_m", plan))
    assert formats(receipt) | {
        DOWN: "q8_0",
        DOWN.replace("0", "1"): "q4_0",
        "model.layers.1.self_attn.q_proj.weight": "mxfp4_ggml",
        "model.layers.0.self_attn.q_proj.weight": "q5_1",
        "lm_head.weight": "q5_1",
        "model.norm.weight": "f32",
    } == formats(receipt)
    assert not receipt.changed()
    assert {row.rule for row in receipt.tensors} == {rule.match for rule in plan.rules} | {None}
    assert Plan.from_toml(receipt.plan) == plan and receipt.plan_digest == plan.digest()


def test_a_plan_alone_keeps_what_it_does_not_name(llama, tmp_path):
    plan = Plan.from_toml(
        '[[rule]]\nmatch = "*.up_proj"\nformat = "int4_g64_asym"\noptions = {search = false}\n'
    )
    receipt = quantize(llama, tmp_path / "n", Request(plan=plan))
    assert {row.format for row in receipt.tensors if "up_proj" in row.name} == {"int4_g64_asym"}
    others = [row for row in receipt.tensors if "up_proj" not in row.name]
    assert {(row.format, row.relative_error) for row in others} == {("f32", None)}
    assert next(row.options for row in receipt.tensors if "up_proj" in row.name) == {"search": False}


@pytest.mark.parametrize("to", [None, "q4_k_m", "int4_g32"])
def test_rules_that_decide_nothing_are_all_named(llama, to, tmp_path):
    plan = rules("*.doun_proj=q6_k", "model.norm=q8_0", "*.up_proj=q8_0", "*.0.mlp.up_proj=q4_0")
    with pytest.raises(
        PlanError, match=r"doun_proj.*matches no tensor[\s\S]*norm.*kept[\s\S]*0\.mlp\.up_proj.*earlier"
    ):
        quantize(llama, tmp_path / "out", Request(to, plan, file="native"))
    assert written(tmp_path) == []


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request("q4_k_x"), r"'q4_k_x' is neither.*q4_k_m"),
        (Request("int4_g32"), r"does not support int4_g32 \(.*\); the nearest supported format is q4_0"),
        (Request("q8_0", rules("*.up_proj=nf4")), "up_proj|ffn_up.*does not support nf4.*iq4_nl"),
        (Request("int4_g32", rules("*.down_proj=q4_k"), file="native"), "320 is not a multiple of 256"),
        (Request(plan=rules("*.up_proj=gptk:q8_0")), "up_proj.*unknown algorithm 'gptk'"),
        (Request(plan=rules("*.up_proj=q8_0,serch=true")), "rtn has no option 'serch'; it takes search"),
        (Request("q8_0", search=False, method=Method("hqq")), "method: hqq always searches.*--no-search"),
        (Request("q8_0", rules("*.up_proj=hqq:q8_0"), search=False), "rule '.*up_proj': hqq always searches"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(llama, request_, says, tmp_path):
    with pytest.raises((PlanError, FormatError), match=says):
        quantize(llama, tmp_path / ("n" if request_.file else "m.gguf"), request_)
    assert written(tmp_path) == []


# Converting


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM"]
)
def test_every_way_to_a_gguf_file_gives_the_same_bytes(models, name, tmp_path):
    """Directly; through a native directory; through a float GGUF file; and through both."""
    source, wanted = models[name], tmp_path / "direct.gguf"
    quantize(source, wanted, Request("q4_k_m"))
    quantize(source, tmp_path / "native", Request("q4_k_m", file="native"))
    convert(tmp_path / "native", tmp_path / "native.gguf")
    convert(source, tmp_path / "float.gguf")
    quantize(tmp_path / "float.gguf", tmp_path / "twice.gguf", Request("q4_k_m"))
    quantize(tmp_path / "float.gguf", tmp_path / "far", Request("q4_k_m", file="native"))
    convert(tmp_path / "far", tmp_path / "far.gguf")
    for way in ("native", "twice", "far"):
        assert_same_gguf(tmp_path / f"{way}.gguf", wanted)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_gguf_file_to_a_native_directory_and_back(models, name, tmp_path):
    quantize(models[name], tmp_path / "a.gguf", Request("q4_k_m"))
    convert(tmp_path / "a.gguf", tmp_path / "copy.gguf")
    there = convert(tmp_path / "a.gguf", tmp_path / "native")
    back = convert(tmp_path / "native", tmp_path / "back.gguf")
    assert_same_gguf(tmp_path / "copy.gguf", tmp_path / "a.gguf")
    assert_same_gguf(tmp_path / "back.gguf", tmp_path / "a.gguf")
    assert {row.relative_error for row in (*there.tensors, *back.tensors)} == {None}


def assert_same_gguf(ours: Path, wanted: Path) -> None:
    a, b = read_gguf(ours).values, read_gguf(wanted).values
    assert {key: (a.get(key), b.get(key)) for key in {*a, *b} if a.get(key) != b.get(key)} == {}
    assert ours.read_bytes() == wanted.read_bytes()


def test_a_native_directory_made_of_a_gguf_file_runs(llama, tmp_path):
    quantize(llama, tmp_path / "m.gguf", Request("q8_0"))
    convert(tmp_path / "m.gguf", tmp_path / "native")
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= set(written(tmp_path / "native"))
    a, b = open_checkpoint(tmp_path / "m.gguf"), open_checkpoint(tmp_path / "native")
    text = "Hello 123 world, été"
    ids = [load_tokenizer(c)(text).input_ids for c in (open_checkpoint(llama), a, b)]
    assert ids[0] == ids[1] == ids[2]
    with torch.no_grad():
        logits = [load_model(c)(torch.tensor([ids[0]])).logits for c in (a, b)]
    assert torch.equal(*logits)


def test_a_format_that_gguf_cannot_carry_names_the_nearest_and_writes_nothing(llama, tmp_path):
    quantize(llama, tmp_path / "n", Request("nf4", rules("*.up_proj=int4_g32")))
    before = written(tmp_path)
    with pytest.raises(
        FormatError, match=r"11 more: .* does not support nf4 \(.*\); the nearest supported format is iq4_nl"
    ):
        convert(tmp_path / "n", tmp_path / "m.gguf")
    assert written(tmp_path) == before


def test_a_quantized_model_is_not_quantized_again_unasked(llama, tmp_path):
    quantize(llama, tmp_path / "a.gguf", Request("q8_0"))
    before = written(tmp_path)
    with pytest.raises(PlanError, match=r"already quantized, such as .* is q8_0; .*--requantize"):
        quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", Request("q4_k_m"))
    assert written(tmp_path) == before
    receipt = quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", Request("q4_0", requantize=True))
    assert {row.source_dtype for row in receipt.tensors if row.format == "q4_0"} == {"q8_0"}


def test_an_unknown_architecture_goes_to_a_native_directory_only(models, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    GPTNeoXForCausalLM(GPTNeoXConfig(**config, vocab_size=64)).save_pretrained(tmp_path / "neox")
    with pytest.raises(ModelError, match=r"GPTNeoXForCausalLM.*make converter.*native directory"):
        quantize(tmp_path / "neox", tmp_path / "m.gguf", Request("q4_k_m"))
    for to, kind in (("int4_g32", "int4_g32"), ("q4_k_m", "q4_k")):
        receipt = quantize(tmp_path / "neox", tmp_path / to, Request(to))
        matrices = [row for row in receipt.tensors if len(row.shape) == 2 and "layers" in row.name]
        assert len(matrices) == 8
        assert {row.format for row in matrices} <= {kind, "q6_k", "q5_k"}
        quantized = load_model(open_checkpoint(tmp_path / to))
        assert torch.isfinite(quantized(torch.tensor([[1, 2, 3]])).logits).all()
    index = json.loads((tmp_path / "int4_g32/fewbits.json").read_text())
    assert {row["format"] for row in index["tensors"].values()} == {"int4_g32"}
