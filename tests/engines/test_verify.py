"""verify() in the real engines: a right file is `same`, a wrong one is not."""

from dataclasses import replace

import pytest
import torch

import fewbits.release.verify as verify_module
from fewbits import Plan, Rule
from fewbits.dtypes import DTYPES
from fewbits.engines import ENGINES
from fewbits.errors import ModelError
from fewbits.files.open import FILE_TYPES, open_checkpoint
from fewbits.release.reference import divergence
from fewbits.release.verify import NEW, Decoded, Outcome, compared, engines_of, verify
from fewbits.runtime.runner import Blockwise, Whole
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("verify") / "model")


def blocks(format):
    return Plan((Rule("model.layers.*_proj", format),))


@pytest.mark.engine
def test_a_right_file_is_the_same(model, tmp_path):
    out = tmp_path / "m.gguf"
    quantize(model, out, Request(plan=blocks("q4_0"), file="gguf"))
    outcome = verify(out)
    assert outcome.verdict == "same" and outcome.version and outcome.kl < 0.01 and outcome.greedy >= 6


@pytest.mark.engine
def test_another_meaning_of_the_bytes_differs(model, tmp_path, monkeypatch):
    """Zero points off by one, as when versions of a layout are confused: here on our side."""
    out = tmp_path / "m.gguf"
    quantize(model, out, Request(plan=blocks("q4_0"), file="gguf"))
    real = verify_module.open_checkpoint

    def off_by_one(path):
        checkpoint = real(path)
        tensors = {name: shifted(tensor) for name, tensor in checkpoint.tensors.items()}
        return replace(checkpoint, tensors=tensors)

    monkeypatch.setattr(verify_module, "open_checkpoint", off_by_one)
    outcome = verify(out)
    assert outcome.verdict == "differs" and outcome.kl > 10 * ENGINES["llama.cpp"].tolerance
    assert "activations rounded as llama.cpp rounds them" in outcome.line()


@pytest.mark.engine
def test_what_rounded_activations_explain_is_the_same(model, tmp_path, monkeypatch):
    """A tolerance that the engine's rounding alone passes: then the comparison with that rounding decides."""
    out = tmp_path / "m.gguf"
    quantize(model, out, Request(plan=blocks("q4_k"), file="gguf"))
    plain = verify(out)
    assert plain.reason is None
    tighter = replace(ENGINES["llama.cpp"], tolerance=0.9 * plain.kl)
    monkeypatch.setitem(ENGINES, "llama.cpp", tighter)
    outcome = verify(out)
    assert outcome.verdict == "same" and "activations rounded as llama.cpp rounds them" in str(outcome.reason)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("change", [None, lambda site, x, weight: x.mul(8).round().div(8)])
def test_block_by_block_is_the_whole_model(tmp_path, architecture, change, monkeypatch):
    """With changed inputs of the blocks' weights too, which changes the logits."""
    checkpoint = open_checkpoint(save_tiny(architecture, tmp_path / "m"))
    monkeypatch.setattr(verify_module, "engine_rounding", lambda checkpoint: change)
    ids, found = list(range(5, 45)), {}
    for runner in (Whole(checkpoint), Blockwise(checkpoint)):
        ours = Decoded(checkpoint, gguf=True)
        ours.runner = runner
        found[runner.kind] = ours.logits(ids) if change is None else ours.rounded(ids)
    whole, parts = found.values()
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert change is None or divergence(ours.logits(ids), parts) > 1e-5


def test_a_large_model_goes_block_by_block_whatever_is_free(model, monkeypatch):
    checkpoint = open_checkpoint(model)
    assert Decoded(checkpoint).runner.kind == "whole, float32"
    monkeypatch.setattr(verify_module, "SMALL", 0)
    assert Decoded(checkpoint).runner.kind == "block by block"
    with pytest.raises(ModelError, match=r"0\.00 GiB of memory are free, running it needs .* block by block"):
        _ = Decoded(checkpoint, memory=2**20).runner


def test_every_file_type_names_engines_that_exist_and_their_short_names_match(model):
    assert {name for _, each in FILE_TYPES.items() for name in each.engines} == set(ENGINES)
    assert [each.name for each in engines_of(open_checkpoint(model), "Transformers")] == ["transformers"]
    out = model.parent / "short"
    quantize(model, out, Request(to="int4_g32", file="gptq", overwrite=True))
    assert [each.name for each in engines_of(open_checkpoint(out), "transformers")] == [
        "transformers+gptqmodel"
    ]


def test_tolerances_follow_file_types_and_formats(model):
    out = model.parent / "mx"
    quantize(model, out, Request(to="mxfp4", file="compressed-tensors", overwrite=True))
    engine, other = ENGINES["transformers+compressed-tensors"], open_checkpoint(model)
    assert engine.tolerance_of(open_checkpoint(out)) == 0.01 and engine.tolerance_of(other) == 1e-5


def shifted(tensor):
    """The same tensor with every code one step off."""
    if not tensor.quantized:
        return tensor
    q = tensor.load()
    grid, codes = q.format.unpack(q)
    moved = grid.value(codes) + grid.groups(codes.shape[0])[0].abs().repeat_interleave(grid.group, 1)
    return replace(tensor, kind=DTYPES["f32"], load=lambda: moved)


@pytest.mark.engine
def test_limits_end_the_engine(model, tmp_path):
    out = tmp_path / "m.gguf"
    quantize(model, out, Request(plan=blocks("q8_0"), file="gguf"))
    assert "more than 0 s" in str(verify(out, seconds=0).reason)
    late = verify(out, memory=2**20)
    assert late.verdict == "failed" and "GiB of memory" in str(late.reason)


@pytest.mark.engine
def test_floats_in_transformers(model):
    outcome = verify(model)
    assert outcome.verdict == "same" and outcome.largest < 1e-3


def test_an_engine_that_is_not_there_is_named(model, tmp_path, monkeypatch):
    out = tmp_path / "m"
    quantize(model, out, Request(plan=blocks("int4_g32"), file="gptq"))
    monkeypatch.setenv("FEWBITS_GPTQMODEL", str(tmp_path / "nowhere"))
    monkeypatch.setattr("fewbits.engines.installed", lambda name: None)
    outcome = verify(out)
    assert outcome.verdict == "not checked" and "make gptqmodel" in outcome.line()


@pytest.mark.parametrize("wrong", [False, True])
def test_logits_decide(wrong):
    ours = torch.randn(5 + NEW, 40, generator=torch.Generator().manual_seed(0)) * 4
    theirs = ours[:5].flip(1) if wrong else ours[:5] + 0.01
    found = {"logits": theirs.numpy(), "new": ours[4:-1].argmax(1).numpy(), "version": "1"}
    outcome = compared("an engine", found, ours, 1e-4, 1.0)
    assert outcome.verdict == ("differs" if wrong else "same") and outcome.greedy == NEW


@pytest.mark.parametrize("gap", [0.015, 0.03])
def test_a_token_that_is_no_near_tie_decides(gap):
    """As where a prompt is right and the cache behind it is not: 2 x 0.01 is what the logits are off by."""
    ours = torch.randn(5 + NEW, 40, generator=torch.Generator().manual_seed(0))
    ours[5:] = 0
    ours[4 + 3, 3] = gap
    new = [int(ours[4].argmax()), 1, 2, 7, 9, 9, 9, 9]
    found = {"logits": (ours[:5] + 0.01).numpy(), "new": new, "version": "1"}
    outcome = compared("an engine", found, ours, 1e-4, 1.0)
    assert outcome.verdict == ("same" if gap < 0.02 else "differs") and outcome.greedy == 3
    assert ("token 7 instead of 3 in place 4" in outcome.line()) == (gap > 0.02)


def test_every_engine_says_how_to_get_it():
    assert all(engine.install and engine.packages for engine in ENGINES.values())
    assert "pip install" in Outcome("x", "not checked", reason="y is not installed (pip install y)").line()


def test_logits_of_another_shape_differ():
    found = {"logits": torch.zeros(5, 3).numpy(), "new": [1], "version": "1"}
    outcome = compared("an engine", found, torch.zeros(6, 40), 1e-4, 1.0)
    assert outcome.verdict == "differs" and "(5, 3), the file's are (5, 40)" in outcome.line()
