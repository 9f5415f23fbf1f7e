"""Architectures: the tensor map, what it refuses, and the order of rotated rows."""

import pytest
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
from hypothesis import given
from hypothesis import strategies as st

from fewbits.errors import ModelError
from fewbits.model.archs import (
    _architecture,
    architecture,
    architectures,
    engine_notes,
    every_name,
    gguf_entries,
    require_architecture,
    rope_rows,
    rope_rows_back,
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 100,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


@given(st.integers(1, 8), st.integers(1, 16))
def test_rope_rows_is_a_permutation_within_each_head(heads: int, half: int) -> None:
    n = heads * 2 * half
    order, back = rope_rows(n, heads), rope_rows_back(n, heads)
    assert torch.equal(order[back], torch.arange(n))
    assert torch.equal(order // (2 * half), torch.arange(n) // (2 * half))
    # pair i of a head, neighbours in GGUF, are rows i and i + d/2 in transformers
    pairs = order.view(heads, half, 2)
    assert torch.equal(pairs[..., 1] - pairs[..., 0], torch.full((heads, half), half))


def test_rope_rows_example() -> None:
    assert rope_rows(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    with pytest.raises(ModelError, match="9 rows cannot be cut into 2 heads"):
        rope_rows(9, 2)


@pytest.mark.parametrize("name", architectures())
def test_the_map_reaches_every_tensor_of_the_architecture_once(name: str) -> None:
    config = CONFIG | {"architectures": [name], "tie_word_embeddings": False}
    arch = architecture(config)
    assert arch is not None and arch.name == name
    names = [n for n in every_name(arch, config) if n.endswith("weight")]
    entries = gguf_entries(arch, config, names)
    sources = [source for entry in entries for source in entry.sources]
    assert sorted(sources) == sorted(names) and len(set(sources)) == len(sources)
    assert len({entry.name for entry in entries}) == len(entries)
    kind = next(kind for kind, gguf in MODEL_ARCH_NAMES.items() if gguf == arch.gguf)
    known = {TENSOR_NAMES[t] for t in MODEL_TENSORS[MODEL_ARCH(kind)]}
    assert {e.name.replace("blk.0", "blk.{bid}").replace("blk.1", "blk.{bid}")[: -len(".weight")]
            for e in entries} <= known  # fmt: skip
    assert entries[0].name == "token_embd.weight" and entries[-1].name == "output.weight"


def test_a_tied_output_is_dropped_and_buffers_are_ignored() -> None:
    arch = require_architecture(CONFIG)
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    tied = gguf_entries(arch, CONFIG | {"tie_word_embeddings": True}, names)
    assert [entry.name for entry in tied] == ["token_embd.weight"]
    loose = gguf_entries(arch, CONFIG | {"tie_word_embeddings": False}, names)
    assert [entry.name for entry in loose] == ["token_embd.weight", "output.weight"]


def test_an_architecture_may_have_no_output_matrix() -> None:
    common = {"keys": [], "ends": ["model.embed_tokens.weight", "lm_head.weight"]}
    row = {"gguf": "x", "model_type": "x", "blocks": [], "rope": []}
    ends = ["model.embed_tokens.weight"]
    assert _architecture("x", row, common).ends == (*ends, "lm_head.weight")
    assert every_name(_architecture("x", row | {"ends": ends}, common), {"num_hidden_layers": 0}) == ends


def test_every_unmapped_name_is_listed() -> None:
    with pytest.raises(ModelError) as error:
        gguf_entries(
            require_architecture(CONFIG), CONFIG, ["model.layers.0.odd.weight", "model.layers.1.even.weight"]
        )
    assert "odd" in str(error.value) and "even" in str(error.value)


def test_a_missing_expert_is_named() -> None:
    config = CONFIG | {"architectures": ["MixtralForCausalLM"]}
    arch = require_architecture(config)
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight" for e in (0, 2)]
    with pytest.raises(ModelError, match=r"experts \[0, 2\] are there, 0 to 2 are needed"):
        gguf_entries(arch, config, names)


def test_an_unknown_architecture_names_what_is_missing_and_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"BloomForCausalLM: .*missing from archs\.toml.*native directory"):
        require_architecture({"architectures": ["BloomForCausalLM"]})
    assert architecture({}) is None


@pytest.mark.parametrize(
    ("name", "given", "fault"),
    [
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("LlamaForCausalLM", {"vocab_size": None}, "vocab_size is missing"),
        ("Qwen2ForCausalLM", {"head_dim": 32}, "heads x head_dim = 128"),
        ("Qwen3MoeForCausalLM", {}, "norm_topk_prob is False"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar is 99"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, given: dict, fault: str) -> None:
    with pytest.raises(ModelError, match=fault):
        require_architecture(CONFIG | {"architectures": [name]} | given)


def test_a_window_that_the_engine_ignores_is_noted() -> None:
    config = CONFIG | {"architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    arch = require_architecture(config)
    assert engine_notes(arch, config) == ["sliding_window = 4096: llama.cpp attends to the whole context"]
    assert engine_notes(arch, config | {"sliding_window": None}) == []
