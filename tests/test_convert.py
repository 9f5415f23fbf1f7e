"""convert(): the same numbers through every door that has them, and a refusal at the others."""

import json

import pytest
import torch

from fewbits import Plan, Rule
from fewbits.errors import FewbitsError
from fewbits.files.open import open_checkpoint
from fewbits.qtensor import QTensor
from fewbits.workflow.request import Request
from fewbits.workflow.run import convert
from fewbits.workflow.run import run as quantize
from tests.tiny import save_tiny

# Where int4 goes without a change, and what it is called there.
CHAINS = {
    "int4_g32": ["gptq", "gptq_v2", "gguf", "gptq", "native"],
    "int4_g64": ["gptq", "gguf", "native"],
    "q4_0": ["gptq", "native", "gguf"],
    "q8_0": ["gptq", "gguf"],
    "int4_g32_asym": ["gptq_v2", "native"],
    "int3_g64": ["gptq", "gptq_v2"],
}


def blocks(format):
    return Plan((Rule("model.layers.*_proj", format),))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("convert") / "model")


def values(path):
    """FloatEntry weights by name."""
    found = {}
    for name, tensor in open_checkpoint(path).tensors.items():
        value = tensor.load()
        found[name] = value.decode() if isinstance(value, QTensor) else value.float()
    return found


@pytest.mark.parametrize("format", CHAINS)
def test_not_a_value_changes(model, tmp_path, format):
    first = tmp_path / "first"
    quantize(model, first, Request(plan=blocks(format), file="native"))
    wanted, here = values(first), first
    for i, file in enumerate(CHAINS[format]):
        there = tmp_path / f"{i}-{file}"
        receipt = convert(here, there, file)
        assert {row.relative_error for row in receipt.tensors} <= {None, 0.0}
        found = values(there)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], w) for name, w in wanted.items())
        here = there


def test_what_cannot_be_exact_is_refused_and_told_when_asked_for(model, tmp_path):
    quantize(model, tmp_path / "k", Request("nf4", file="native"))
    with pytest.raises(FewbitsError, match="the nearest supported format is int4_g32"):
        convert(tmp_path / "k", tmp_path / "g", "gptq")
    assert not (tmp_path / "g").exists()
    receipt = convert(tmp_path / "k", tmp_path / "g", "gptq", requantize=True)
    again = [row for row in receipt.tensors if row.relative_error]
    assert again and all("from nf4" in row.reason and row.relative_error < 0.2 for row in again)


def test_a_base_without_zero_points_is_refused_before_anything_is_written(model, tmp_path):
    quantize(model, tmp_path / "m.gguf", Request(plan=blocks("q4_1"), file="gguf"))
    with pytest.raises(FewbitsError, match="q4_1"):
        convert(tmp_path / "m.gguf", tmp_path / "g", "gptq_v2")
    assert not (tmp_path / "g").exists()


def test_quantization_config_is_the_output_s_own(model, tmp_path):
    """config.json says how the weights lie there, and a copy in another layout how they lie in the copy."""
    quantize(model, tmp_path / "g", Request("int4_g32", file="gptq"))
    config = json.loads((tmp_path / "g/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    convert(tmp_path / "g", tmp_path / "n", "native")
    config = json.loads((tmp_path / "n/config.json").read_text())
    assert set(config["quantization_config"]) == {"quant_method", "version", "formats"}
    assert config["quantization_config"]["quant_method"] == "fewbits"


def test_a_quantized_table_has_no_place_beside_linear_weights(model, tmp_path):
    quantize(model, tmp_path / "m.gguf", Request("q4_0", file="gguf"))
    with pytest.raises(FewbitsError, match=r"embed_tokens.*requantize"):
        convert(tmp_path / "m.gguf", tmp_path / "g", "gptq")


def test_a_file_type_of_floats_gets_them_decoded(model, tmp_path):
    """The values decoded, in the model's float type: f32 here, so exactly."""
    quantize(model, tmp_path / "n", Request(plan=blocks("q4_0")))
    convert(tmp_path / "n", tmp_path / "f", "huggingface")
    wanted, found = values(tmp_path / "n"), values(tmp_path / "f")
    assert all(torch.equal(found[name], w) for name, w in wanted.items())
    assert not any(tensor.quantized for tensor in open_checkpoint(tmp_path / "f").tensors.values())
