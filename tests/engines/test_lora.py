"""Adapters in llama.cpp: the logits of transformers and PEFT."""

import pytest
import torch

from fewbits.adapters.transformers import load_model
from fewbits.files.adapter import open_adapter
from fewbits.files.gguf.adapter import write_adapter
from fewbits.files.open import open_checkpoint
from fewbits.workflow.request import Request
from fewbits.workflow.run import run
from tests.adapters import load_adapter, save_adapter
from tests.tiny import VOCAB, save_tiny, write_float_gguf

pytestmark = pytest.mark.engine
IDS = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(1))


def engine_logits(model, adapter=None):
    """By llama-cpp-python's own class, cache in f32."""
    from llama_cpp import Llama

    engine = Llama(
        str(model), lora_path=adapter and str(adapter), n_ctx=64, logits_all=True, type_k=0, type_v=0,
        n_threads=1, verbose=False,
    )  # fmt: skip
    engine.eval(IDS.tolist())
    found = torch.from_numpy(engine.scores[: len(IDS)].copy())
    engine.close()
    return found


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("LlamaForCausalLM", None),
        ("Qwen2ForCausalLM", None),
        ("Phi3ForCausalLM", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_llama_cpp_adds_what_peft_adds(tmp_path, name, targets, rslora):
    """In f32; q8_0 below. Without the adapter the engine is far off."""
    base = save_tiny(name, tmp_path / "base")
    more = {"target_modules": targets} if targets else {}
    adapter = save_adapter(base, tmp_path / "adapter", use_rslora=rslora, **more)
    write_float_gguf(open_checkpoint(base), tmp_path / "base.gguf")
    write_adapter(open_adapter(adapter), open_checkpoint(base), tmp_path / "adapter.gguf")
    with torch.no_grad():
        wanted = load_adapter(load_model(open_checkpoint(base)), adapter)(IDS[None]).logits[0]
    found = engine_logits(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert (found - wanted).norm() < 3e-5 * wanted.norm()
    assert (engine_logits(tmp_path / "base.gguf") - wanted).norm() > 0.05 * wanted.norm()


def test_over_a_quantized_file(tmp_path):
    """llama.cpp rounds activations to 8 bits: about as far off as without an adapter."""
    run(save_tiny("LlamaForCausalLM", tmp_path / "base"), tmp_path / "base.gguf", Request("q8_0"))
    base = open_checkpoint(tmp_path / "base.gguf")
    adapter = save_adapter(tmp_path / "base.gguf", tmp_path / "adapter")
    write_adapter(open_adapter(adapter), base, tmp_path / "adapter.gguf")
    with torch.no_grad():
        plain = load_model(base)(IDS[None]).logits[0]
        wanted = load_adapter(load_model(base), adapter)(IDS[None]).logits[0]
    without = engine_logits(tmp_path / "base.gguf")
    found = engine_logits(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    rounding, left, added = (
        ((ours - theirs).norm() / theirs.norm()).item()
        for ours, theirs in ((without, plain), (found, wanted), (without, wanted))
    )
    assert left < 2 * rounding < added / 3, (left, rounding, added)
