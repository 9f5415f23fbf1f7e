"""merge: adapters of PEFT into packed and float weights, against PEFT's own sums."""

import json
import re

import pytest
import torch

from fewbits import Plan
from fewbits.adapters.transformers import load_model
from fewbits.algorithms.hessian import HessianFactor, loss
from fewbits.algorithms.onto_grid import onto_grid
from fewbits.calibrate.stats import Stats
from fewbits.calibrate.tokens import Tokens
from fewbits.cli.main import main
from fewbits.errors import CalibrationError, FileError, ModelError
from fewbits.files.adapter import LowRank, open_adapter
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from fewbits.release.publish import read_receipt
from fewbits.workflow.merge import MergeOptions, merge, shifted
from tests.adapters import load_adapter, save_adapter
from tests.packed_models import IDS, logits, planes, quantized
from tests.tiny import CORPUS, save_tiny

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "max_position_embeddings": 128}
# Few kinds of tokens: inputs are correlated, as those of a real model are.
TEXT = Tokens.of(torch.randint(3, 33, (40, 32), generator=torch.Generator().manual_seed(0)), "random")
OPTIONS = MergeOptions(tokens=TEXT)
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    """What the model writes to be judged on, where no text is given, takes a minute otherwise."""
    monkeypatch.setattr("fewbits.workflow.merge.SCORED", 64)
    monkeypatch.setattr("fewbits.workflow.merge.CONTEXT", 32)


def grouped(path, group):
    """Make A of a saved adapter constant in groups of columns."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "adapter_model.safetensors")
    for name, value in tensors.items():
        if "lora_A" in name:
            tensors[name] = value[:, ::group].repeat_interleave(group, 1)[:, : value.shape[1]].contiguous()
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    return path


def unmerged_logits(path, adapter):
    return logits(load_adapter(load_model(open_checkpoint(path)), adapter))


# ---- float models --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float_model_becomes_what_peft_merges(tmp_path, dtype):
    base = save_tiny("LlamaForCausalLM", tmp_path / "base", **SMALL)
    if dtype == torch.bfloat16:
        load_model(open_checkpoint(base)).to(dtype).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter")
    receipt = merge(open_checkpoint(base), open_adapter(adapter), tmp_path / "out", OPTIONS)
    theirs = load_adapter(load_model(open_checkpoint(base)), adapter).merge_and_unload().state_dict()
    ours = {name: t.load() for name, t in open_checkpoint(tmp_path / "out").tensors.items()}
    before = {name: t.load() for name, t in open_checkpoint(base).tensors.items()}
    for name, value in ours.items():
        assert value.dtype == before[name].dtype == dtype
        torch.testing.assert_close(
            value, theirs[name].to(dtype), rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6
        )
        assert "_proj" in name or torch.equal(value, before[name])
    assert receipt.merged["weights"] == {"float": 7} and "kl_rounded" not in receipt.merged


# ---- packed models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "file", "group"),
    [
        ("q4_1", "native", 32),
        ("q5_1", "gguf", 32),
        ("int4_g32_asym_float", "mlx", 64),
        ("int3_g32_asym_float_f32", "native", 32),
    ],
)
def test_a_group_adapter_is_merged_exactly_into_float_offsets(tmp_path, to, file, group):
    base = quantized(tmp_path, to=to, plan=Plan(), file=file, **SMALL)
    adapter = grouped(save_adapter(base, tmp_path / "adapter"), group)
    out = tmp_path / ("out.gguf" if file == "gguf" else "out")
    receipt = merge(open_checkpoint(base), open_adapter(adapter), out, OPTIONS)
    assert receipt.merged["weights"] == {"exact": 7}
    assert open_checkpoint(out).file_type is open_checkpoint(base).file_type
    wanted, plain = unmerged_logits(base, adapter), logits(load_model(open_checkpoint(base)))
    off = (logits(load_model(open_checkpoint(out))) - wanted).norm() / (plain - wanted).norm()
    assert off < (1e-4 if to.endswith("f32") else 2e-2)  # offsets are rounded to f16: 2^-11 of each
    assert receipt.merged["kl"] < 1e-3 * receipt.merged["kl_rounded"]
    changed = {key for key, body in planes(out).items() if body != planes(base)[key]}
    assert len(changed) == 7 and {plane for _, plane in changed} <= {"minimum", "blocks"}


@pytest.mark.parametrize("to", ["int4_g32", "nf4"])
def test_gptq_keeps_more_of_an_adapter_than_rounding(tmp_path, to):
    """Scales and all other tensors stay; the KL divergences are those of the files, by transformers."""
    base = quantized(tmp_path, to=to, plan=Plan(), **SMALL)
    adapter = save_adapter(base, tmp_path / "adapter", size=0.1)
    receipts = {}
    for way, options in (("gptq", OPTIONS), ("nearest", MergeOptions())):
        receipts[way] = merge(open_checkpoint(base), open_adapter(adapter), tmp_path / way, options)
        assert receipts[way].merged["weights"] == {way: 7}
        changed = {key for key, body in planes(tmp_path / way).items() if body != planes(base)[key]}
        assert changed and {plane for _, plane in changed} <= {"codes", "blocks"}
        assert all("_proj" in name for name, _ in changed)
    told, windows = receipts["gptq"].merged, TEXT.windows[-8:]
    with torch.no_grad():
        peft = load_adapter(load_model(open_checkpoint(base)), adapter)
        p = peft(windows).logits[:, 16:-1].double().log_softmax(-1)
        for way, name in (("gptq", "kl"), ("nearest", "kl_rounded")):
            q = load_model(open_checkpoint(tmp_path / way))(windows).logits[:, 16:-1].double().log_softmax(-1)
            assert told[name] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert told["kl"] < 0.8 * told["kl_rounded"] and told["tokens"] == 8 * 15


def test_other_file_types_keep_what_is_theirs(tmp_path):
    base = quantized(tmp_path, to="int4_g32", plan=Plan(), file="gptq", **SMALL)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["up_proj"])
    merge(open_checkpoint(base), open_adapter(adapter), tmp_path / "out", MergeOptions())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    )
    with pytest.raises(ModelError, match=r"is one file: name a \.gguf file"):
        gguf = quantized(tmp_path / "g", to="q4_0", plan=Plan(), file="gguf", **SMALL)
        merge(open_checkpoint(gguf), open_adapter(adapter), tmp_path / "directory")


@pytest.mark.parametrize(
    "to", ["q4_0", "q4_k", "nf4_dq", "int4_g32_asym", "int4_g32_actorder", "iq4_xs", "iq3_s", "int4_tensor"]
)
def test_no_row_loses_more_than_by_rounding(to):
    """On any grid, whose parameters stay: the loss is the output's squared error, computed from inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    form = FORMATS.get(to)
    w = torch.randn(24, 256, generator=generator)
    q = (
        form.arranged(form.ordered.encode(w), torch.randperm(256, generator=generator))
        if form.ordered
        else form.encode(w)
    )
    moved = q.decode() + 0.05 * torch.randn(24, 2, generator=generator) @ torch.randn(
        2, 256, generator=generator
    )
    stats = Stats.of(x)
    found, nearest = onto_grid(moved, q, stats), onto_grid(moved, q)
    H = HessianFactor.of(stats).hessian
    lost = [loss(each.decode(), moved, H) for each in (found, nearest)]
    assert bool((lost[0] <= lost[1]).all()) or to == "nf4_dq"
    assert lost[0].sum() < 0.9 * lost[1].sum()
    error = [((each.decode() - moved) @ x.T).square().sum() for each in (found, nearest, q)]
    assert error[0] < 0.95 * error[1] and error[0] < error[2]
    grids = [form.unpack(each)[0] for each in (found, q)]
    assert all(torch.equal(grids[0].parameters()[key], part) for key, part in grids[1].parameters().items())


def test_what_is_not_constant_in_groups_is_not_shifted():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 4, generator=generator).repeat_interleave(64, 1)
    added = LowRank(a, torch.randn(24, 2, generator=generator), 0.5)
    for to in ("q4_1", "int4_g64_asym_float"):
        q = FORMATS.get(to).encode(torch.randn(24, 256, generator=generator))
        torch.testing.assert_close(
            shifted(q, added).decode(), q.decode() + added.product(), rtol=1e-2, atol=4e-3
        )  # f16 offsets of up to 4
        ragged = added.a.clone()
        ragged[0, 5] += 0.01
        assert shifted(q, LowRank(ragged, added.b, 0.5)) is None
    for to in ("q4_0", "q4_k", "nf4_dq", "int4_g64_asym", "int4_g128_asym_float"):
        q = FORMATS.get(to).encode(torch.randn(24, 256, generator=generator))
        assert shifted(q, added) is None


# ---- the command, and what is refused ------------------------------------------------------------


def test_the_command_writes_the_receipt(tmp_path, capsys):
    base = quantized(tmp_path, to="q4_0", plan=Plan(), **SMALL)
    adapter = save_adapter(base, tmp_path / "adapter", use_rslora=True)
    text = tmp_path / "text.txt"
    text.write_text(CORPUS * 4, encoding="utf-8")
    asked = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--no-verify"]
    assert main([*asked, "--calibrate", str(text), "--tokens", "1024", "--context", "32"]) == 0
    said, told = capsys.readouterr().out, read_receipt(tmp_path / "out")
    assert "7 gptq weights): KL divergence from the unmerged model" in said and "rounded to nearest" in said
    assert told.merged["kl"] < told.merged["kl_rounded"] and told.calibration["windows"] == 24
    assert {row.algorithm for row in told.tensors if "_proj" in row.name} == {"merged (gptq)"}
    assert (tmp_path / "out" / "README.md").exists()
    assert main([*asked, "--calibrate", str(text), "--tokens", "1024", "--context", "32"]) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"hidden_size": 128},
            r"is not of .*other; give the model that it was trained on.*adds \(64, 128\) to "
            r"model.layers.0.mlp.down_proj.weight, which is \(128, 128\)",
        ),
        ({"num_hidden_layers": 1}, r"adds to model.layers.1.*which the model does not have"),
    ],
)
def test_an_adapter_of_another_model_is_refused(tmp_path, given, said):
    base = save_tiny("LlamaForCausalLM", tmp_path / "base", **SMALL | {"num_hidden_layers": 2})
    other = save_tiny("LlamaForCausalLM", tmp_path / "other", **SMALL | given)
    adapter = save_adapter(base, tmp_path / "adapter")
    with pytest.raises(ModelError, match=f"(?s){said}"):
        merge(open_checkpoint(other), open_adapter(adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_model_of_the_same_shape_is_refused(tmp_path, capsys):
    base = save_tiny("LlamaForCausalLM", tmp_path / "base", **SMALL)
    other = save_tiny("LlamaForCausalLM", tmp_path / "other", seed=1, **SMALL)
    adapter = save_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    with pytest.raises(ModelError, match=r"(?s)is not of .*other; it was trained on .*base, whose .*another"):
        merge(open_checkpoint(other), open_adapter(adapter), tmp_path / "out", OPTIONS)
    asked = ["convert", str(adapter), str(tmp_path / "out.gguf"), "--base"]
    assert main([*asked, str(other)]) == 1 and "another model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.gguf").exists()

    packed = quantized(tmp_path, to="q4_0", plan=Plan(), **SMALL)  # of the same float model
    assert main([*asked, str(packed)]) == 0 and not capsys.readouterr().err
    (base / "config.json").write_text("{")
    assert main([*asked, str(packed), "--overwrite"]) == 0
    assert re.search(r"which is not compared: .*config\.json", capsys.readouterr().err)
    base.rename(tmp_path / "gone")
    assert main([*asked, str(other), "--overwrite"]) == 0
    assert "which is not here to be compared" in capsys.readouterr().err


def test_too_little_text_and_what_is_in_the_way(tmp_path):
    base = quantized(tmp_path, to="q4_0", plan=Plan(), **SMALL)
    adapter = open_adapter(save_adapter(base, tmp_path / "adapter", target_modules=["up_proj"]))
    few = MergeOptions(tokens=Tokens.of(TEXT.windows[:8], "random"))
    with pytest.raises(CalibrationError, match=r"8 windows, more than 8 are needed.*--tokens"):
        merge(open_checkpoint(base), adapter, tmp_path / "out", few)
    with pytest.raises(FileError, match="is the input itself"):
        merge(open_checkpoint(base), adapter, base, OPTIONS)
    assert not (tmp_path / "out").exists() and torch.equal(
        logits(load_model(open_checkpoint(base)), IDS), logits(load_model(open_checkpoint(base)), IDS)
    )
