"""quantize_model: a float model in memory becomes what `quantize` writes; and the examples run."""

import doctest

import pytest
import torch

import fewbits
from fewbits import Plan, Rule
from fewbits.errors import ModelError, PlanError
from fewbits.runtime.packed import packed_modules
from tests.packed_models import auto, logits, planes, quantized
from tests.tiny import save_tiny, tiny_model


@pytest.mark.parametrize("to", ["nf4", "q4_k_m"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_in_place_gives_the_planes_that_quantize_writes(tmp_path, architecture, to):
    path = quantized(tmp_path, architecture, to, plan=Plan())
    model = auto(tmp_path / "float")
    assert fewbits.quantize_model(model, to) is model
    model.save_pretrained(tmp_path / "again")
    meant = {key: body for key, body in planes(path).items() if key[1]}
    assert meant and {key: body for key, body in planes(tmp_path / "again").items() if key[1]} == meant
    assert torch.equal(logits(auto(tmp_path / "again")), logits(model))


def test_rules_alone_and_a_second_time():
    model = tiny_model("LlamaForCausalLM")
    fewbits.quantize_model(model, Plan((Rule("*.up_proj", "int4_g128", "hqq"),)))
    assert {name.rpartition(".")[2] for name, _, _ in packed_modules(model)} == {"up_proj"}
    fewbits.quantize_model(model, "int8_g32", Plan((Rule("lm_head", "int8_g32"),)))
    formats = model.config.quantization_config.formats
    assert {name: len(tensors) for name, tensors in formats.items()} == {"int4_g128": 2, "int8_g32": 13}


def test_in_place_says_what_it_cannot(tmp_path):
    model = tiny_model("LlamaForCausalLM")
    with pytest.raises(PlanError, match="gptq needs calibration text"):
        fewbits.quantize_model(model, Plan((Rule("*.up_proj", "int4_g128", "gptq"),)))
    with pytest.raises(PlanError, match="matches no tensor"):
        fewbits.quantize_model(model, Plan((Rule("*.up_prj", "int4_g128"),)))
    assert not list(packed_modules(model))
    with pytest.warns(UserWarning, match="4 arrays that are no matrices"):
        fewbits.quantize_model(tiny_model("Qwen3MoeForCausalLM"), "nf4")
    from transformers import GPT2Config, GPT2LMHeadModel

    small = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=32))
    with pytest.raises(ModelError, match="belongs to a Conv1D"):
        fewbits.quantize_model(small, "int4_g32")


@pytest.mark.parametrize(
    "name",
    ["open", "quantize", "convert", "load", "quantize_model", "evaluate", "prepare_qat", "integer_only"],
)
def test_the_examples_run(tmp_path, name):
    import transformers

    tiny = save_tiny("LlamaForCausalLM", tmp_path / "float")
    names = {
        "fewbits": fewbits,
        "torch": torch,
        "transformers": transformers,
        "tiny": tiny,
        "out": tmp_path / "out",
    }
    (example,) = doctest.DocTestFinder().find(getattr(fewbits, name), name, globs=names)
    assert len(example.examples) >= 2
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
