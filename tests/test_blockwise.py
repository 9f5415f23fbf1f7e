"""Quantizing block by block: every architecture and option; what is noted, refused, and kept."""

import json
import re
import shutil
import warnings
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from fewbits.adapters.transformers import load_model
from fewbits.algorithms import CalibrationWarning
from fewbits.calibrate.tokens import Tokens
from fewbits.cli.main import main
from fewbits.errors import CalibrationError, FewbitsError
from fewbits.files.open import open_checkpoint
from fewbits.model.sites import sites
from fewbits.plan import Plan
from fewbits.plan.method import EFFORTS, METHODS, Method
from fewbits.plan.rules import parse_rule
from fewbits.release.receipt import Receipt, TensorRow
from fewbits.transforms import checked
from fewbits.workflow.blockwise import Streaming
from fewbits.workflow.blockwise import job as job_module
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests.tiny import VOCAB, change_weights, save_tiny

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
MODELS = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "Gemma3ForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "moe_intermediate_size": 64},
}
GOOD = EFFORTS["good"]
Q, OUT, DOWN = (
    f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """architecture -> its directory, made once."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def of(name: str) -> Path:
        return save_tiny(name, root / name, **(SMALL | MODELS[name]))

    return of


@pytest.fixture
def llama(models) -> Path:
    return models("LlamaForCausalLM")


def tokens_of(windows: int = 8, context: int = 32, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return Tokens.of(torch.randint(0, VOCAB, (windows, context), generator=generator), "random")


def asked(to: str = "int4_g32", method: Method = GOOD, **given) -> Request:
    return Request(to, method=method, tokens=tokens_of(), **given)


def rows_of(receipt: Receipt) -> dict[str, TensorRow]:
    return {row.name: row for row in receipt.tensors}


def logit_error(model: Path, quantized: Path, tokens: Tokens) -> float:
    """Mean square of the change of the logits, over that of the logits."""
    with torch.no_grad():
        wanted, got = (load_model(open_checkpoint(at))(tokens.windows).logits for at in (model, quantized))
    return float((got - wanted).square().mean() / wanted.square().mean())


# ---- every architecture ----------------------------------------------------------------------------


CASES = [
    *((name, "m.gguf", "q4_0") for name in MODELS),
    *((name, "n", "int4_g32") for name in ("LlamaForCausalLM", "Qwen3MoeForCausalLM")),
]


@pytest.mark.parametrize(("name", "out", "to"), CASES)
def test_every_architecture_is_quantized_and_better_than_by_rounding(models, tmp_path, name, out, to):
    model, request = models(name), asked(to)
    receipt = quantize(model, tmp_path / out, request)
    found = open_checkpoint(tmp_path / out)
    inside = [site for site in sites(open_checkpoint(model)) if site.block is not None]
    linear = [site.name for site in inside if site.role != "router"]
    assert {found.tensors[name].dtype for name in linear} == {to}
    rows = [row for row in receipt.tensors if ".layers." in row.name or "blk." in row.name]
    done = [row for row in rows if row.format == to]
    assert {row.algorithm for row in done} == {"gptq"}
    assert all(row.tokens and 0 < row.output_error < 1 and row.relative_error > 0 for row in done)
    dense = [row for row in done if "expert" not in row.name and "_exps" not in row.name]
    assert {row.tokens for row in dense} == {request.tokens.count}
    assert receipt.calibration["sha256"] == request.tokens.digest
    assert not (tmp_path / f"{out}.blocks").exists()
    quantize(model, tmp_path / f"rtn-{out}", Request(to))
    ours, plain = (logit_error(model, tmp_path / at, request.tokens) for at in (out, f"rtn-{out}"))
    assert 0 < ours < plain


@pytest.fixture(scope="module")
def plain_error(models, tmp_path_factory) -> float:
    """What plain rounding costs the logits."""
    model, at = models("LlamaForCausalLM"), tmp_path_factory.mktemp("rtn") / "n"
    quantize(model, at, Request("int4_g32"))
    return logit_error(model, at, tokens_of())


# ---- every option ----------------------------------------------------------------------------------

OPTIONS = {
    "plain": (Method("gptq"), {"algorithm": "gptq"}),
    "sequential": (Method("gptq", sequential=True), {"sequential": True}),
    "gptaq": (Method("gptq", gptaq=True), {"gptaq": True}),
    "weighted": (METHODS["weighted"], {"algorithm": "weighted"}),
    "awq": (replace(GOOD, transforms=("awq",)), {"transforms": ["awq"]}),
    "smooth": (
        replace(GOOD, transforms=("smooth",), transform_options={"alpha": 0.5}),
        {"transforms": ["smooth"], "transform_options": {"alpha": 0.5}},
    ),
    "equalize": (replace(GOOD, transforms=("equalize",)), {"transforms": ["equalize"]}),
    "rotate": (replace(GOOD, transforms=("rotate",)), {"transforms": ["rotate"]}),
    "learn": (METHODS["learned"], {"learn": "light"}),
    "distill": (replace(GOOD, distill=3), {"distill": 3}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_followed_and_recorded(llama, plain_error, tmp_path, name):
    method, recorded = OPTIONS[name]
    tokens = tokens_of(windows=12 if method.distill else 8)
    receipt = quantize(llama, tmp_path / "n", replace(asked(method=method), tokens=tokens))
    told = Receipt.from_json((tmp_path / "n/receipt.json").read_text())
    assert receipt.to_json() == told.to_json()
    assert {key: told.method[key] for key in recorded} == recorded
    rows = rows_of(receipt)
    assert {row.format for row in rows.values() if row.algorithm == method.algorithm} == {"int4_g32"}
    if name in ("awq", "smooth", "equalize"):
        assert any(note.startswith("scaled: ") for note in receipt.notes)
    if name == "rotate":
        assert any("rotated" in note for note in receipt.notes)
    if name == "learn":
        assert rows[Q].options["learn"] == "light"
    if name == "distill":
        (note,) = [note for note in receipt.notes if note.startswith("distilled: ")]
        distilled = [row for row in rows.values() if row.options.get("distill") == 3]
        assert bool(distilled) == ("no step improved" not in note)
        if distilled:
            before, after = (float(number) for number in re.findall(r"\d+\.\d+", note))
            assert 0 < after < before
    if method.algorithm == "gptq":  # what weighs columns alone may lose more of the logits
        assert 0 < logit_error(llama, tmp_path / "n", tokens_of()) < plain_error


@pytest.mark.parametrize("name", ["awq", "smooth", "equalize"])
def test_a_transform_keeps_its_pairs_where_the_model_runs_in_bf16(llama, tmp_path, name):
    """The check of a pair is in f32: in bf16 every output moves by more than a wrong pair's does."""
    kept = {}
    for dtype in (torch.float32, torch.bfloat16):
        request = asked(method=OPTIONS[name][0], streaming=Streaming(dtype=dtype))
        notes = quantize(llama, tmp_path / str(dtype), request).notes
        kept[dtype] = [note for note in notes if note.startswith(("scaled: ", "dropped: "))]
    assert kept[torch.float32] == kept[torch.bfloat16] and kept[torch.float32][0].startswith("scaled: ")


def test_a_transform_that_changes_nothing_is_a_warning_with_the_reason(llama, tmp_path, monkeypatch):
    """Here because every pair moves the output."""
    monkeypatch.setattr("fewbits.workflow.blockwise.job.checked", partial(checked, tolerance=-1.0))
    with pytest.warns(CalibrationWarning, match=r"smooth changed nothing: dropped: .* moved by"):
        receipt = quantize(llama, tmp_path / "n", asked(method=OPTIONS["smooth"][0]))
    assert any(note.startswith("smooth changed nothing: dropped: ") for note in receipt.notes)


def test_a_rule_gives_one_weight_its_own_format_and_algorithm(llama, tmp_path):
    plan = Plan((parse_rule("*.1.mlp.down_proj=int8_channel"), parse_rule("*.1.self_attn.o_proj=f32")))
    rows = rows_of(quantize(llama, tmp_path / "n", asked(plan=plan)))
    assert (rows[DOWN].format, rows[DOWN].algorithm) == ("int8_channel", "gptq")
    assert (rows[OUT].format, rows[OUT].algorithm) == ("f32", None)
    assert rows[Q].format == "int4_g32"


def test_a_scratch_file_and_any_memory_give_the_same_bytes(llama, tmp_path):
    outputs = []
    for memory in (2**30, 0):
        out = tmp_path / f"{memory}.gguf"
        quantize(llama, out, asked("q4_0", streaming=Streaming(activation_memory=memory, scratch=tmp_path)))
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]
    assert {path.suffix for path in tmp_path.iterdir()} == {".gguf", ".json"}


def test_progress_names_blocks_and_sites_and_ends_at_the_whole(llama, tmp_path):
    said = []
    quantize(llama, tmp_path / "n", asked(), lambda *told: said.append(told))
    blocks = [told for told in said if told[0].startswith("block ")]
    assert blocks[0][0].startswith("block 1/2 ") and blocks[-1][0].startswith("block 2/2 ")
    assert any(re.search(r"mlp\.down_proj, last error 0\.\d{3}$", what) for what, _, _ in blocks)
    assert all(0 <= done < total for _, done, total in blocks)
    assert [done for _, done, _ in blocks] == sorted(done for _, done, _ in blocks)


# ---- what is noted ---------------------------------------------------------------------------------


def test_experts_that_no_token_reached_are_named_and_rounded(models, tmp_path):
    """Every token goes to expert 0 or 1: a score and its negative; the others' are a thousandth."""
    model = save_tiny(
        "MixtralForCausalLM", tmp_path / "m", **SMALL, num_local_experts=4, num_experts_per_tok=1
    )
    routers = [f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(2)]
    narrow = [1.0, -1.0, 1e-3, -1e-3]
    change_weights(model, dict.fromkeys(routers, lambda w: torch.stack([w[0] * f for f in narrow])))
    receipt = quantize(model, tmp_path / "n", asked())
    rows = rows_of(receipt)
    for name, row in rows.items():
        if ".experts." in name:
            unseen = int(name.split(".experts.")[1][0]) >= 2
            assert (row.algorithm, row.tokens is None) == (("rtn", True) if unseen else ("gptq", False)), name
    assert sum(note.startswith("unseen: ") for note in receipt.notes) == 1
    (note,) = [note for note in receipt.notes if note.startswith("unseen: ")]
    assert "experts.2" in note and note.endswith("met no token and is rounded to nearest (and 11 more)")


def test_few_tokens_are_noted_and_an_error_when_strict(llama, tmp_path):
    few = replace(asked(), tokens=tokens_of(windows=2))
    (note,) = [n for n in quantize(llama, tmp_path / "n", few).notes if n.startswith("few tokens: ")]
    assert "64 tokens seen, 256 are needed" in note and note.endswith("(and 13 more)")
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.\w_proj\.weight: 64 tokens seen, 256"):
        quantize(llama, tmp_path / "s", replace(few, strict_calibration=True))
    assert not (tmp_path / "s/model.safetensors").exists()
    quantize(llama, tmp_path / "e", replace(asked(strict_calibration=True), tokens=tokens_of(windows=12)))


# ---- what is refused, and what is kept ---------------------------------------------------------------


def blocks_of(out: Path) -> list[str]:
    return sorted(path.name for path in out.with_name(f"{out.name}.blocks").glob("block-*.json"))


def test_a_weight_that_is_not_finite_is_named_and_the_blocks_before_it_are_kept(llama, tmp_path):
    broken = shutil.copytree(llama, tmp_path / "m")
    change_weights(broken, {DOWN: lambda w: w.index_fill_(0, torch.tensor([3]), float("nan"))})
    out = tmp_path / "m.gguf"
    with pytest.raises(FewbitsError) as caught:
        quantize(broken, out, asked("q4_0"))
    assert DOWN in str(caught.value) and "NaN or infinite" in str(caught.value)
    assert blocks_of(out) == ["block-0000.json"] and not out.exists()
    shutil.copy(llama / "model.safetensors", broken / "model.safetensors")
    with pytest.raises(FewbitsError, match=r"another run|other input"):  # a repaired model is another input
        quantize(broken, out, asked("q4_0"))
    quantize(broken, out, asked("q4_0", overwrite=True))
    quantize(broken, tmp_path / "fresh.gguf", asked("q4_0"))
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def test_an_error_that_explodes_names_the_weight_and_the_run_goes_on_from_there(llama, tmp_path, monkeypatch):
    real = job_module.measured
    left = [9]  # of the 14 weights; the tenth is broken

    def breaking(w, q, spec, stats, keep):
        left[0] -= 1
        record = real(w, q, spec, stats, keep)
        error = record.output if left[0] >= 0 else (1e4 * record.output[1], record.output[1])
        return replace(record, output=error)

    monkeypatch.setattr(job_module, "measured", breaking)
    out = tmp_path / "m.gguf"
    with pytest.raises(
        CalibrationError, match=r"layers\.1\.\S+: its output error is \d+\S* times its output"
    ):
        quantize(llama, out, asked("q4_0"))
    assert blocks_of(out) == ["block-0000.json"]
    monkeypatch.setattr(job_module, "measured", real)
    quantize(llama, out, asked("q4_0"))
    quantize(llama, tmp_path / "fresh.gguf", asked("q4_0"))
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def test_another_text_never_continues_a_run(llama, tmp_path, monkeypatch):
    out = tmp_path / "m.gguf"
    interrupt_second_block(llama, out, monkeypatch)
    for other in (replace(asked("q4_0"), tokens=tokens_of(seed=1)), asked("q4_0", Method("gptq"))):
        with pytest.raises(FewbitsError, match=r"another run|other input"):
            quantize(llama, out, other)
    quantize(llama, out, replace(asked("q4_0", overwrite=True), tokens=tokens_of(seed=1)))
    quantize(llama, tmp_path / "fresh.gguf", replace(asked("q4_0"), tokens=tokens_of(seed=1)))
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def test_a_damaged_block_is_told_and_without_it_the_run_begins_again(llama, tmp_path, monkeypatch):
    out = tmp_path / "m.gguf"
    interrupt_second_block(llama, out, monkeypatch)
    planes = tmp_path / "m.gguf.blocks/block-0000.safetensors"
    planes.write_bytes(planes.read_bytes()[:-5])
    with pytest.raises(
        FewbitsError, match=r"block-0000\.safetensors: has changed since it was written; delete"
    ):
        quantize(llama, out, asked("q4_0"))
    shutil.rmtree(planes.parent)
    quantize(llama, out, asked("q4_0"))
    quantize(llama, tmp_path / "fresh.gguf", asked("q4_0"))
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


def interrupt_second_block(model: Path, out: Path, monkeypatch) -> None:
    """Stop a run in the middle of its second block, as a user does."""

    def stop(what: str, _done: int, _total: int) -> None:
        if what.startswith("block 2/2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, asked("q4_0"), stop)
    assert blocks_of(out) == ["block-0000.json"]


# ---- a model that cannot be run ----------------------------------------------------------------------


def strange(model: Path) -> None:
    """Of an architecture that nobody knows."""
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["StrangeForCausalLM"], "model_type": "strange"}
    (model / "config.json").write_text(json.dumps(config))


def mute(model: Path) -> None:
    """Without a tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()


BROKEN = pytest.mark.parametrize(("make", "fault"), [(mute, "tokenizer"), (strange, "strange")])


@BROKEN
def test_by_default_a_model_that_cannot_be_run_is_rounded_and_that_is_said(
    llama, tmp_path, capsys, make, fault
):
    model, out = shutil.copytree(llama, tmp_path / "model"), tmp_path / "n"
    make(model)
    assert main(["quantize", str(model), "--to", "int4_g32", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "not calibrated, rounded to nearest instead: " in said and fault in said
    told = Receipt.from_json((out / "receipt.json").read_text())
    assert any(note.startswith("not calibrated, rounded to nearest instead: ") for note in told.notes)
    assert rows_of(told)[Q].algorithm == "rtn" and not told.calibration


@BROKEN
@pytest.mark.parametrize("how", [("--effort", "good"), ("--method", "gptq"), ("--awq",)])
def test_what_was_asked_for_by_name_is_an_error_instead(llama, tmp_path, capsys, make, fault, how):
    model = shutil.copytree(llama, tmp_path / "model")
    make(model)
    assert main(["quantize", str(model), "--to", "int4_g32", "--out", str(tmp_path / "n"), *how]) == 1
    assert fault in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_warnings_of_other_things_are_not_filed_under_a_weight(llama, tmp_path, monkeypatch):
    real = job_module.chosen

    def warning(*given):
        warnings.warn("the disk is nearly full", ResourceWarning, stacklevel=1)
        warnings.warn("nearly singular", CalibrationWarning, stacklevel=1)
        return real(*given)

    monkeypatch.setattr(job_module, "chosen", warning)
    with pytest.warns(ResourceWarning, match="nearly full"):
        receipt = quantize(llama, tmp_path / "m.gguf", asked("q4_0"))
    assert not any("nearly full" in note for note in receipt.notes)
    assert any(note.endswith("nearly singular") for note in receipt.notes)
