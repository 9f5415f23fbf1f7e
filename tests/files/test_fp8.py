"""fp8 directories, as DeepSeek-V3 has them: what they decode to, what is refused, where they go."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.errors import FileError, FormatError
from fewbits.files.directory import FILE_TYPES
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from fewbits.workflow.request import Request
from fewbits.workflow.run import convert
from fewbits.workflow.run import run as quantize
from tests.files.directories import random_qtensor, write_directory
from tests.tiny import save_tiny

UP = "model.layers.0.mlp.up_proj"
SETTINGS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def directory(path, tensors, settings=SETTINGS):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": settings}))
    return path


def weight(n=200, k=300, dtype=torch.float32):
    """Its last blocks are not whole, as those of DeepSeek-V3's kv_a_proj are not."""
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(n, k, generator=generator) * 50).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // 128), -(-k // 128), generator=generator).to(dtype) + 0.01
    return {f"{UP}.weight": codes, f"{UP}.weight_scale_inv": scale}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factor_of_a_block_multiplies(tmp_path, dtype):
    given = weight(dtype=dtype)
    found = open_checkpoint(directory(tmp_path / "m", given)).tensors[f"{UP}.weight"]
    codes, scale = given.values()
    factors = scale.float().repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert torch.equal(found.load().decode(), codes.float() * factors)
    assert found.quantized and found.dtype.startswith("fp8_e4m3_block128")


def test_whole_blocks_are_written_and_what_stays_in_float_is_named(tmp_path):
    q = random_qtensor(FORMATS.get("fp8_e4m3_block128"), 128, 256)
    router = torch.randn(4, 256).bfloat16()
    given = {f"{UP}.weight": q, "model.layers.0.mlp.gate.weight": router, "model.norm.weight": router[0]}
    path = write_directory(tmp_path / "m", "fp8", given)
    said = json.loads((path / "config.json").read_text())["quantization_config"]
    assert said["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.gate"]
    said.pop("modules_to_not_convert")
    assert said == {**SETTINGS, "fmt": "e4m3"}
    with pytest.raises(FormatError, match="130 x 256 is not in whole blocks of 128 x 128"):
        FILE_TYPES.get("fp8").arrays(f"{UP}.weight", q.format, (130, 256))


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"weight_block_size": None}, {}, "weight_block_size None"),
        ({"weight_block_size": [64, 64]}, {}, r"weight_block_size \[64, 64\]"),
        ({"scale_fmt": "ue8m0"}, {}, "scale_fmt 'ue8m0'"),
        ({"expert_dtype": "fp4"}, {}, "expert_dtype 'fp4'"),
        ({}, {f"{UP}.weight_scale_inv": torch.ones(2, 2)}, r"plane 'weight_scale_inv' is F32 \(2, 2\)"),
        ({}, {f"{UP}.weight_scale_inv": torch.ones(2, 3, dtype=torch.uint8)}, "scales in U8"),
        ({}, {f"{UP}.weight_scale_inv": None}, "plane 'weight_scale_inv' is missing"),
    ],
)
def test_what_contradicts_is_told(tmp_path, changes, tensors, message):
    given = {key: value for key, value in (weight() | tensors).items() if value is not None}
    with pytest.raises(FileError, match=message):
        open_checkpoint(directory(tmp_path / "m", given, SETTINGS | changes))


def test_it_goes_to_compressed_tensors_and_back_and_the_inputs_are_told(tmp_path):
    source = save_tiny("LlamaForCausalLM", tmp_path / "source")
    quantize(source, tmp_path / "a", Request(to="fp8_e4m3_block128", file="fp8"))
    receipt = convert(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    assert any("inputs of weights in fp8 (dynamic): not kept" in note for note in receipt.notes)
    convert(tmp_path / "b", tmp_path / "c", "fp8")
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in "ac")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(value.view(torch.uint8), after[key].view(torch.uint8)) for key, value in before.items()
    )
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "c" / "config.json").read_bytes()


@pytest.mark.engine
def test_transformers_computes_what_we_decode(tmp_path):
    """On a CPU it decodes to bf16, and multiplies in that."""
    from fewbits.release.verify import verify

    source = save_tiny("LlamaForCausalLM", tmp_path / "source")
    quantize(source, tmp_path / "a", Request(to="fp8_e4m3_block128", file="fp8"))
    outcome = verify(tmp_path / "a")
    assert (outcome.engine, outcome.verdict) == ("transformers+accelerate", "same"), outcome.line()
