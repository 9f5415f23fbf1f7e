"""A quantized cache: a window equals its tokens one by one, each reading what a decoder holds by then."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from fewbits.activations import CACHES, Cache, attention
from fewbits.activations.kv_cache import per_channel, per_token, quantize_dequantize
from fewbits.blocks.simulate import changed_attention
from fewbits.errors import ModelError
from fewbits.evaluation import Settings, Simulation, Text, evaluate
from fewbits.files.open import open_checkpoint
from tests.tiny import save_tiny, tiny_model

SCHEMES = [
    Cache("plain", 4, 8),
    Cache("late", 4, 8, residual=5),
    Cache("channels", 2, 4, keys_per_channel=True),
    Cache("kivi", 2, 4, keys_per_channel=True, residual=6),
]


def tensors(t, heads=4, shared=2, d=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, h, t, d, generator=generator) for h in (heads, shared, shared)]


def decoded(cache, query, key, value):
    """Token by token with a cache that is written as tokens come: the plainest reading of the docstring."""
    old_keys, old_values, out = [], [], []
    keys, values = [], []  # still in float
    for i in range(query.shape[2]):
        keys.append(key[:, :, i])
        values.append(value[:, :, i])
        while len(values) > cache.residual:
            old_values.append(per_token(values.pop(0), cache.bits, cache.group))
        if cache.keys_per_channel:
            while len(keys) >= cache.residual + cache.group:
                group = torch.stack(keys[: cache.group], -1)  # (1, h, d, group)
                old_keys += list(quantize_dequantize(group, cache.bits).unbind(-1))
                del keys[: cache.group]
        else:
            while len(keys) > cache.residual:
                old_keys.append(per_token(keys.pop(0), cache.bits, cache.group))
        k, v = (torch.stack(parts, 2) for parts in (old_keys + keys, old_values + values))
        q = query[:, :, i : i + 1]
        out.append(scaled_dot_product_attention(q, k, v, enable_gqa=True))
    return torch.cat(out, 2)


@pytest.mark.parametrize("cache", SCHEMES, ids=lambda cache: cache.name)
@settings(max_examples=15)
@given(t=st.integers(1, 30), seed=st.integers(0, 100))
def test_a_window_equals_decoding_token_by_token(cache, t, seed):
    query, key, value = tensors(t, seed=seed)
    expected = decoded(cache, query, key, value)
    found = attention(cache)(query, key, value, is_causal=True, enable_gqa=True)
    mask = torch.ones(t, t, dtype=torch.bool).tril()
    masked = attention(cache)(query, key, value, attn_mask=mask, enable_gqa=True)
    for out in (found, masked):  # f32 sums of values near 1, in another order
        assert torch.allclose(out, expected, atol=1e-5)
    last = attention(cache)(query[:, :, -1:], key, value, enable_gqa=True)
    assert torch.allclose(last, expected[:, :, -1:], atol=1e-5)


@pytest.mark.parametrize("cache", SCHEMES[1:], ids=lambda cache: cache.name)
def test_pieces_of_queries_and_a_scale_change_nothing_else(cache, monkeypatch):
    query, key, value = tensors(21)
    given = {"is_causal": True, "enable_gqa": True, "scale": 0.2}
    whole = attention(cache)(query, key, value, **given)
    monkeypatch.setattr("fewbits.activations.kv_cache.QUERIES_AT_ONCE", 4)
    assert torch.allclose(attention(cache)(query, key, value, **given), whole, atol=1e-6)  # f32 products
    default = attention(cache)(query, key, value, is_causal=True, enable_gqa=True)
    assert not torch.allclose(default, whole, atol=1e-3)


def test_what_is_younger_than_the_window_is_read_in_float():
    query, key, value = tensors(100)
    given = {"is_causal": True, "enable_gqa": True}
    found = attention(CACHES.get("int2"))(query, key, value, **given)
    expected = scaled_dot_product_attention(query, key, value, **given)
    assert torch.allclose(found, expected, atol=1e-5)  # 100 < 128 newest; f32 sums in another order


@given(bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 100), shift=st.floats(-9, 9))
def test_stored_values_are_off_by_half_a_step(bits, seed, shift):
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) + shift
    scale = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    error = (quantize_dequantize(x, bits) - x).abs().amax(-1)
    # f16 rounds the offset by 2^-11 of itself, and scale by as much for each of its 2^bits - 1 multiples
    slack = (x.abs().amax(-1) + (x.amax(-1) - x.amin(-1))) * 2.0**-11
    assert bool((error <= scale / 2 + slack + 1e-6).all())


def test_groups_lie_as_drawn_and_an_incomplete_one_stays_float():
    x = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(0))
    stored = per_channel(x, 2, 4)
    assert torch.equal(stored[:, 8:], x[:, 8:]) and not torch.equal(stored[:, :8], x[:, :8])
    assert torch.equal(stored[:, 4:8, 3], quantize_dequantize(x[:, 4:8, 3], 2))
    assert torch.equal(per_channel(x[:, :3], 2, 4), x[:, :3])
    wide = per_token(x, 2, 4)  # 6 channels in groups of gcd(4, 6) = 2
    assert torch.equal(wide[..., 2:4], quantize_dequantize(x[..., 2:4], 2))


def test_bits_are_counted_and_constants_are_kept():
    assert [CACHES.get(name).bits_per_number(64) for name in ("int8", "int4", "int2")] == [8.5, 5.0, 3.0]
    same = torch.full((2, 8), 0.75)
    assert torch.equal(quantize_dequantize(same, 2), same)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e8])
def test_what_f16_cannot_hold_is_refused(bad):
    with pytest.raises(ModelError, match="65504"):
        quantize_dequantize(torch.tensor([[bad, 1.0]]), 8)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM"])
def test_a_model_reads_its_cache_and_nothing_stays_behind(name):
    model = tiny_model(name)
    tokens = torch.randint(3, 560, (1, 40), generator=torch.Generator().manual_seed(0))

    def forward():
        with torch.inference_mode():
            return model(input_ids=tokens, use_cache=False).logits

    before = forward()
    exact = Cache("exact", 16, 8, residual=10**6)  # everything is younger
    with changed_attention(model, attention(exact)):
        same = forward()
    assert torch.allclose(same, before, atol=1e-4 * float(before.abs().max()))  # f32, another order of sums
    costs = []
    for cache in (Cache("b8", 8, 32), Cache("b4", 4, 32), Cache("b2", 2, 32)):
        with changed_attention(model, attention(cache)):
            costs.append(float((forward() - before).square().mean()))
    assert 0 < costs[0] < costs[1] < costs[2]
    assert torch.equal(forward(), before)


def test_evaluate_reports_the_cache(tmp_path):
    reference = open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path / "reference"))
    text = Text(torch.randint(600, (2 * 200,), generator=torch.Generator().manual_seed(0)), "random tokens")
    costs = {}
    calibration = torch.randint(600, (2, 64), generator=torch.Generator().manual_seed(1))
    for name in CACHES:
        limits = Settings(
            context=200,
            prompts=1,
            prompt_tokens=4,
            new_tokens=3,
            simulation=Simulation(cache=name, calibration=calibration),
        )
        found = evaluate(reference, [reference], text, limits)
        quantized = found.quantized_models[0]
        costs[name] = quantized.fidelity.kl.value
        bits = CACHES.get(name).bits_per_number(64)
        assert (quantized.simulated.cache, quantized.simulated.cache_bits) == (name, bits)
        assert f"ran with cache {name} ({bits:g} bits a number)." in found.table()
    assert 0 < costs["int8"] < costs["int4"] and costs["int8"] < costs["int2"]
    assert costs["int8"] < costs["fp8"] < costs["int4"]
