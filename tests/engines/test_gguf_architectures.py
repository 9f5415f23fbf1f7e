"""Model types that llama.cpp's converter takes: the engine's logits on their float files are transformers'.

The models are those of `bench/architectures_gguf`, which quantizes them too.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fewbits.adapters.llamacpp import engine_logits
from fewbits.adapters.llamacpp_convert import converted_architectures
from tests.converting import convert_in_floats, converting, gguf_model
from tests.tiny import CORPUS

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not converted_architectures(), reason="`make converter` installs the converter"),
]

# Both compute in f32 with sums in another order: 2e-7 to 2e-6 of the logits' norm measured, bloom 1.3e-5.
# ggml looks GELU up in a table of f16 values, whose spacing is 2^-11 = 4.9e-4 of a value.
BOUND, BOUND_TABLE = 3e-5, 1e-3
# fmt: off
TYPES = [
    "afmoe", "apertus", "arcee", "bloom", "cohere", "cohere2", "cohere2_moe", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon_h1", "gemma", "glm",
    "glm4", "glm4_moe", "gpt_oss", "granite", "granite_swa", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "hrm_text", "hunyuan_v1_dense", "hy_v3", "jais2", "jamba",
    "laguna", "lfm2", "lfm2_moe", "llama4_text", "mamba", "mamba2",
    "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2",
    "ministral3", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmoe", "qwen2_moe", "qwen3_5_text",
    "qwen3_5_moe_text", "qwen3_next", "sarvam_mla", "seed_oss", "smollm3", "solar_open", "stablelm", "youtu",
]
GELU = ["falcon", "gemma2", "gemma4_text", "gpt2", "gpt_bigcode", "gpt_neox", "phi", "starcoder2"]
# fmt: on


@pytest.fixture(scope="module", autouse=True)
def converter() -> Iterator[None]:
    with converting():
        yield


@pytest.mark.parametrize("model_type", [*TYPES, *GELU])
def test_the_float_file_is_the_model_in_the_engine(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = gguf_model(model_type)
    model.save_pretrained(tmp_path / "model")
    convert_in_floats(model_type, tmp_path / "model", tmp_path / "float.gguf")
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")(CORPUS)["input_ids"][:48]
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        ours = loaded(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    theirs = engine_logits(tmp_path / "float.gguf", ids)
    assert theirs.shape == ours.shape
    assert (ours - theirs).norm() / ours.norm() < (BOUND_TABLE if model_type in GELU else BOUND)
