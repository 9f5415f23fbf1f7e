"""Rotary parameters: one normal form for configs of all ages, and the way through GGUF keys and back."""

from typing import Any

import pytest
import torch

from fewbits.errors import ModelError
from fewbits.model.rope import llama3_factors, rope_factors, rope_from_keys, rope_keys, rope_parameters

BASE: dict[str, Any] = {"head_dim": 8, "max_position_embeddings": 1024, "rope_theta": 10000.0}
ALL = ("linear", "yarn", "llama3", "longrope")
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 8.0, 9.0],
        "original_max_position_embeddings": 256}  # fmt: skip
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "llama3": LLAMA3,
    "longrope": LONG,
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
}


def _config(kind: str) -> dict[str, Any]:
    return BASE | {"rope_parameters": {"rope_theta": 20000.0} | KINDS[kind]}


def _frequencies(config: dict[str, Any], seq_len: int) -> tuple[torch.Tensor, float]:
    """transformers' own, from a config."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=4, **config))
    rotary(torch.zeros(1), torch.arange(seq_len)[None])  # longrope chooses its list by the positions
    return rotary.inv_freq, rotary.attention_scaling


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "partial"])
@pytest.mark.parametrize("length", [100, 1000])
def test_same_frequencies_after_a_trip_through_gguf(kind: str, length: int) -> None:
    config = _config(kind)
    back = rope_from_keys(rope_keys(config, ALL), rope_factors(config, ALL), config)
    ours, scale = _frequencies(BASE | {"rope_parameters": back}, length)
    theirs, wanted = _frequencies(config, length)
    assert torch.equal(ours, theirs)
    assert scale == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3", "partial"])
def test_parameters_come_back_as_they_were(kind: str) -> None:
    config = _config(kind)
    assert (
        rope_from_keys(rope_keys(config, ALL), rope_factors(config, ALL), config) == config["rope_parameters"]
    )


def test_other_frequency_factors_keep_their_values() -> None:
    odd = (1.0, 1.25, 3.0, 7.0)
    back = rope_from_keys({"rope.freq_base": 10000.0}, {"freqs": odd}, BASE)
    assert rope_factors(BASE | {"rope_parameters": back}, ALL) == {"freqs": odd}
    assert "rope.scaling.type" not in rope_keys(BASE | {"rope_parameters": back}, ALL)


def test_llama3_factors_are_those_of_transformers() -> None:
    config = _config("llama3")
    scaled, _ = _frequencies(config, 10)
    plain = 1.0 / 20000.0 ** (torch.arange(0, 8, 2).float() / 8)
    factors = torch.tensor(llama3_factors(config["rope_parameters"], 8))
    assert torch.allclose(plain / factors, scaled, rtol=4e-7, atol=0)  # a few roundings of 2^-24 each


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_scaling": None}, {"rope_type": "default"}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_scaling": {"rope_type": "llama3"} | LLAMA3}, LLAMA3),
        ({"rope_scaling": LONG | {"rope_type": None, "type": "su"}}, LONG),
    ],
)
def test_older_configs_mean_the_same(old: dict, new: dict) -> None:
    full, sliding = rope_parameters(BASE | old)
    assert full == {"rope_theta": 10000.0} | new and sliding is None


def test_gemma3_of_both_ages() -> None:
    old = BASE | {"rope_theta": 1e6, "rope_local_base_freq": 10000.0}
    full, sliding = rope_parameters(old)
    assert rope_parameters({"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}) == (
        full,
        sliding,
    )
    assert rope_keys(old, ("linear",))["rope.freq_base_swa"] == 10000.0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16},
    ],
)
def test_what_llama_cpp_cannot_turn_is_refused(rope: dict) -> None:
    with pytest.raises(ModelError, match="native directory"):
        rope_keys(BASE | {"rope_parameters": rope | {"rope_theta": 1e4}}, ("linear", "yarn"))


def test_a_list_of_factors_has_one_for_each_pair() -> None:
    rope = LONG | {"rope_theta": 1e4, "long_factor": [1.0]}
    with pytest.raises(ModelError, match="long_factor has 1"):
        rope_factors(BASE | {"rope_parameters": rope}, ALL)
