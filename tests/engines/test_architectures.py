"""Every architecture and rotary kind in the real engine: same logits as transformers, same token ids."""

import os
from pathlib import Path

import pytest
import torch

from fewbits.adapters.llamacpp import engine_logits, engine_quantize, engine_tokenize
from fewbits.adapters.transformers import load_model
from fewbits.errors import KernelError
from fewbits.files.open import open_checkpoint
from fewbits.model.pretokenizers import pretokenizers
from tests.tiny import MODELS, TEXTS, VOCAB, bpe_tokenizer, save_tiny, spm_tokenizer, write_float_gguf

pytestmark = pytest.mark.engine

# Both compute in f32 with sums in another order. Measured over these cases: 1.4e-6 to 3.2e-6 of the
# logits' norm; the bound leaves a factor of 10. gemma3 is 2.2e-4: ggml looks GELU up in a table of f16
# values, whose spacing is 2^-11 = 4.9e-4 of a value.
BOUND = 3e-5
BOUND_GELU_TABLE = 1e-3

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
         "short_factor": [1.0 + i / 64 for i in range(32)],
         "long_factor": [1.0 + i / 4 for i in range(32)]}  # fmt: skip
VARIANTS = {
    "llama3": ("LlamaForCausalLM", {"rope_parameters": _LLAMA3, "max_position_embeddings": 16384}),
    "llama-linear": ("LlamaForCausalLM", {"rope_parameters": _LINEAR}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2ForCausalLM", {"rope_parameters": _YARN}),
    "qwen3-yarn-attention": ("Qwen3ForCausalLM", {"rope_parameters": _YARN | {"attention_factor": 1.5}}),
    "phi3-long": (
        "Phi3ForCausalLM",
        {"rope_parameters": _LONG, "original_max_position_embeddings": 64, "max_position_embeddings": 512},
    ),
    "phi3-partial": (
        "Phi3ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "gemma3-linear": (
        "Gemma3ForCausalLM",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ),
}
CASES = {name: (name, {}) for name in MODELS} | VARIANTS


@pytest.mark.parametrize("case", CASES)
def test_engine_agrees(case: str, tmp_path: Path) -> None:
    name, given = CASES[case]
    source = open_checkpoint(save_tiny(name, tmp_path / "source", **given))
    path = write_float_gguf(source, tmp_path / "model.gguf")
    # longer than gemma3's window of 8 and than phi3-long's original context of 64
    tokens = torch.randint(3, VOCAB, (80,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = load_model(source)(tokens[None]).logits[0]
    theirs = engine_logits(path, tokens)
    error = ((ours - theirs).norm() / ours.norm()).item()
    if measured := os.environ.get("FEWBITS_MEASURE"):
        with open(measured, "a") as log:
            log.write(f"{case} {error:.2e}\n")
    assert error < (BOUND_GELU_TABLE if name.startswith("Gemma3") else BOUND)


@pytest.mark.parametrize("pre", [*(row.names[0] for row in pretokenizers()), "spm", "spm-no-space"])
def test_engine_cuts_text_alike(pre: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    spec = spm_tokenizer(add_space=pre == "spm") if pre.startswith("spm") else bpe_tokenizer(pre)
    directory = save_tiny("LlamaForCausalLM", tmp_path / "source", spec, num_hidden_layers=1)
    path = write_float_gguf(open_checkpoint(directory), tmp_path / "model.gguf")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in (*TEXTS, "<s>special</s> tokens<s> inside"):
        for special in (False, True):
            wanted = tokenizer.encode(text, add_special_tokens=special).ids
            assert engine_tokenize(path, text, add_special=special, parse_special=True) == wanted


def _int8_activations(_module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """What the engine does to the input of a Q8_0 weight: int8 codes and an f16 scale for every 32."""
    blocks = inputs[0].unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * (127 / largest)).round()
    return ((codes * (largest / 127).half().float()).flatten(-2),)


def test_engine_differs_by_its_int8_activations_and_nothing_else(tmp_path: Path) -> None:
    """A file made by llama.cpp opens here, and our forward with the engine's rounding is the engine's.

    Single tokens: one value that falls on the other side of a rounding boundary (f32 sums in another
    order) decorrelates all that follows, so most tokens agree exactly and the median is compared.
    """
    source = open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path / "source"))
    path = tmp_path / "q8_0.gguf"
    engine_quantize(write_float_gguf(source, tmp_path / "model.gguf"), path, ftype=7)  # MOSTLY_Q8_0
    quantized = open_checkpoint(path)
    assert {tensor.dtype for tensor in quantized.tensors.values()} == {"q8_0", "f32"}
    model = load_model(quantized)
    tokens = torch.arange(10, 17)
    theirs = torch.cat([engine_logits(path, [token]) for token in tokens])
    with torch.no_grad():
        plain = model(tokens[:, None]).logits[:, 0]
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(_int8_activations)
        rounded = model(tokens[:, None]).logits[:, 0]
    assert ((rounded - theirs).norm(dim=1) / theirs.norm(dim=1)).median() < BOUND
    # A code is off by at most half a step, 1/254 of its block's largest value: 0.5% of a block's norm
    # where values are normal. Two layers of seven products, and what they amplify: measured 1.6 to 2.0%.
    assert ((plain - theirs).norm(dim=1) / theirs.norm(dim=1)).max() < 0.05


def test_a_file_the_engine_refuses_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(KernelError, match=r"cannot load .*x\.gguf: .*\w"):
        engine_logits(tmp_path / "x.gguf", [1, 2])
