"""Architectures that only llama.cpp's converter knows, in the real engine: `make converter` installs it.

Each is converted in floats, and the engine's logits compared with the model as transformers itself loads it;
then it is quantized with calibration, and the engine's logits compared with the output's values under the
model's names.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

import fewbits
from fewbits.adapters.llamacpp import engine_logits
from fewbits.adapters.llamacpp_convert import converted_architectures
from fewbits.engines import ENGINES
from fewbits.files.gguf.converted import Converted
from fewbits.files.open import open_checkpoint
from fewbits.preflight.estimate import preflight
from fewbits.workflow.request import Request
from tests.converting import converting, write_pieces
from tests.tiny import CORPUS, MODELS, bpe_tokenizer, save_tiny, spm_tokenizer

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not converted_architectures(), reason="`make converter` installs the converter"),
]

# Both compute in f32 with sums in another order: 4e-7 to 8e-6 of the logits' norm measured. ggml looks GELU
# up in a table of f16 values, whose spacing is 2^-11 = 4.9e-4 of a value.
BOUND, BOUND_TABLE = 3e-5, 1e-3
GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "n_group": 1,
           "n_shared_experts": 1, "first_k_dense_replace": 1, "topk_group": 1}  # fmt: skip
_SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ApertusForCausalLM": ("apertus", {}),
    "ArceeForCausalLM": ("arcee", {}),
    "CohereForCausalLM": ("cohere", {}),
    "Cohere2ForCausalLM": ("cohere2", {"num_hidden_layers": 4, "sliding_window": 32}),
    "FalconForCausalLM": ("falcon", {"multi_query": True, "alibi": False, "ffn_hidden_size": 1024}),
    "GPTNeoXForCausalLM": ("gpt_neox", {}),
    "GlmForCausalLM": ("glm", {"head_dim": 64}),
    "Glm4ForCausalLM": ("glm4", {"head_dim": 64}),
    "Glm4MoeForCausalLM": ("glm4_moe", {**_ROUTED, "head_dim": 64}),
    "GemmaForCausalLM": ("gemma", {"head_dim": 64}),
    "Gemma2ForCausalLM": ("gemma2", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 32}),
    "GraniteForCausalLM": ("granite", {"logits_scaling": 8.0, "residual_multiplier": 0.22}),
    "HunYuanDenseV1ForCausalLM": ("hunyuan_v1_dense", {"head_dim": 64}),
    "Lfm2ForCausalLM": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "Ministral3ForCausalLM": ("ministral3", {"head_dim": 64}),
    "NemotronForCausalLM": ("nemotron", {}),
    "OlmoForCausalLM": ("olmo", {}),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "Olmo3ForCausalLM": ("olmo3", _SLIDING),
    "OlmoeForCausalLM": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "PhiForCausalLM": ("phi", {"num_key_value_heads": 4, "intermediate_size": 1024}),
    "Qwen2MoeForCausalLM": ("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 256}),
    "SeedOssForCausalLM": ("seed_oss", {"head_dim": 64}),
    "SmolLM3ForCausalLM": ("smollm3", {}),
    "StableLmForCausalLM": ("stablelm", {}),
    "Starcoder2ForCausalLM": ("starcoder2", {}),
}  # fmt: skip
GELU = {"FalconForCausalLM", "GPTNeoXForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "PhiForCausalLM",
        "Starcoder2ForCausalLM"}  # fmt: skip
NOT_RUN = {"FalconForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM"}
"""Converted only: their blocks are not calibrated yet."""
SENTENCEPIECE = {"GemmaForCausalLM", "Gemma2ForCausalLM", "NemotronForCausalLM"}
"""Their converters read tokenizer.model."""


@pytest.fixture(scope="module", autouse=True)
def converter() -> Iterator[None]:
    with converting():
        yield


def saved(name: str, path: Path) -> Path:
    """A tiny random model of the case, and the tokenizer that its converter asks for."""
    spec = spm_tokenizer() if name in SENTENCEPIECE else bpe_tokenizer()
    size = len(spec["model"]["vocab"])
    if name.startswith("Glm"):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        spec["added_tokens"] += [
            {"id": size + i, "content": text, "special": True} | flags for i, text in enumerate(GLM)
        ]
        size += len(GLM)
    MODELS.setdefault(name, CASES[name])
    save_tiny(name, path, spec, vocab_size=size)
    if name in SENTENCEPIECE:
        write_pieces(spec, path / "tokenizer.model")
    return path


def difference(model: Path, gguf: Path) -> float:
    """Of the engine's logits from those of transformers' own loader, over their norm."""
    import transformers

    config = json.loads((model / "config.json").read_text())
    tokens = torch.randint(3, config["vocab_size"], (48,), generator=torch.Generator().manual_seed(1))
    loaded = getattr(transformers, config["architectures"][0]).from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        ours = loaded.eval()(tokens[None]).logits[0]
    theirs = engine_logits(gguf, tokens)[:, : ours.shape[1]]
    return ((ours - theirs).norm() / ours.norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_converted_and_calibrated_files_are_the_model_in_the_engine(name: str, tmp_path: Path) -> None:
    model, text, out = saved(name, tmp_path / "model"), tmp_path / "text.txt", tmp_path / "out.gguf"
    fewbits.convert(model, tmp_path / "float.gguf")
    assert difference(model, tmp_path / "float.gguf") < (BOUND_TABLE if name in GELU else BOUND)
    if name in NOT_RUN:
        return
    text.write_text(CORPUS * 4, encoding="utf-8")
    receipt = fewbits.quantize(model, out, to="q4_0", calibrate=text, tokens=512, context=64)
    if (
        name in SENTENCEPIECE and receipt.verified["verdict"] == "differs"
    ):  # its tokenizer.model has the pieces alone, and cuts text otherwise
        assert "becomes tokens" in receipt.verified["reason"] and receipt.verified["greedy"] == 8
        assert receipt.verified["kl"] < ENGINES["llama.cpp"].tolerance
    else:
        assert receipt.verified["verdict"] == "same", receipt.verified
    blocks = [row for row in receipt.tensors if row.format == "q4_0" and row.gguf_name.startswith("blk.")]
    assert len(blocks) >= 8 and {row.algorithm for row in blocks} == {"gptq"}
    assert [path.name for path in tmp_path.glob("*.converting")] == []


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off between the codes and the file: the float file and the codes are taken up again."""
    model, text = saved("Olmo2ForCausalLM", tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(CORPUS * 4, encoding="utf-8")
    asked = {"to": "q4_k_m", "calibrate": text, "tokens": 512, "context": 64, "verify": False}
    fewbits.quantize(model, tmp_path / "whole.gguf", **asked)

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Converted, "view", broken)
        fewbits.quantize(model, tmp_path / "again.gguf", **asked)
    folder = tmp_path / "again.gguf.converting"
    [floats] = folder.glob("float-*.gguf")
    before = floats.stat().st_mtime_ns
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fewbits.workflow.converted._errors", broken)
        fewbits.quantize(model, tmp_path / "again.gguf", **asked, overwrite=True)
    assert floats.stat().st_mtime_ns == before and (folder / "codes" / "receipt.json").exists()
    fewbits.quantize(model, tmp_path / "again.gguf", **asked, overwrite=True)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not folder.exists()


def test_plan_tells_the_size_and_the_engine_of_such_a_file(tmp_path: Path) -> None:
    model, out = saved("Olmo2ForCausalLM", tmp_path / "model"), tmp_path / "out.gguf"
    told = preflight(open_checkpoint(model), Request(to="q4_k_m", file="gguf"))
    fewbits.quantize(model, out, to="q4_k_m", effort="fast", verify=False)
    [engine] = [each for each in told.engines if each.engine == "llama.cpp"]
    assert told.file == "gguf" and engine.loads
    weights = sum(tensor.n_bytes for tensor in GGUFReader(out).tensors)
    assert sum(part.nbytes for part in told.parts) == pytest.approx(weights, rel=0.02)
    fewbits.convert(model, tmp_path / "float.gguf")
    floats = sum(tensor.n_bytes for tensor in GGUFReader(tmp_path / "float.gguf").tensors)
    assert told.work.scratch == pytest.approx(floats, rel=0.02)
