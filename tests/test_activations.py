"""Quantized activations: schemes by their definition, observers by their promises, models by their sites."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from fewbits.activations import (
    OBSERVERS,
    SCHEMES,
    Activations,
    Histogram,
    Quantizer,
    Scheme,
    calibrate,
    parse,
    quantize_dequantize,
    sensitive,
)
from fewbits.activations.mixed import measure, observe
from fewbits.activations.observers import HALF, divergence, percentile, squared_error
from fewbits.activations.quantizers import fit, quantize
from fewbits.blocks.simulate import changed_attention, changed_inputs
from fewbits.errors import CalibrationError, ModelError, PlanError
from fewbits.evaluation import Settings, Simulation, Text, evaluate
from fewbits.files.open import open_checkpoint
from tests.tiny import save_tiny, tiny_model

INTEGERS = [name for name in SCHEMES if "fp8" not in name]
STATIC = [name for name in SCHEMES if "static" in name]


def normal(*shape, seed=0, tail=0.0):
    """Gaussian, with `tail` of the values 40 times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < tail, 40 * x, x)


# ---- schemes ----


@pytest.mark.parametrize("name", list(SCHEMES))
def test_codes_lie_in_range_and_values_are_stable(name):
    scheme, x = parse(name), normal(7, 33, tail=0.05) + 0.7
    affine = fit(x, scheme)
    codes = quantize(x, scheme, affine)
    assert float(codes.min()) >= scheme.smallest and float(codes.max()) <= scheme.largest
    once = quantize_dequantize(x, scheme, affine)
    again = quantize_dequantize(once, scheme, affine)
    # what was representable stays so; (code - zero) * scale / scale is within an ulp of the code
    assert torch.equal(quantize(once, scheme, affine), codes) and torch.equal(once, again)


@pytest.mark.parametrize("name", INTEGERS)
@given(seed=st.integers(0, 1000), shift=st.floats(-5, 5), size=st.sampled_from([1e-6, 1.0, 1e6]))
def test_an_integer_scheme_is_off_by_half_a_step_at_most(name, seed, shift, size):
    scheme, x = parse(name), (normal(3, 17, seed=seed) + shift) * size
    affine = fit(x, scheme)
    error = (quantize_dequantize(x, scheme, affine) - x).abs()
    # an asymmetric zero point is rounded too: the edge may be cut by half a step more
    steps = 0.5 if scheme.symmetric else 1.0
    assert bool((error <= affine.scale * steps * (1 + 1e-4)).all())  # 1e-4: f32 quotients of up to 255


def test_dynamic_rows_stand_alone_and_static_ones_share_a_step():
    x = torch.cat([normal(4, 32), 100 * normal(4, 32, seed=1)])
    scheme = parse("int8_dynamic")
    together = quantize_dequantize(x, scheme)
    assert torch.equal(together, torch.cat([quantize_dequantize(row[None], scheme) for row in x]))
    fixed = scheme.affine(x.min(), x.max())
    shared = quantize_dequantize(x, parse("int8_static"), fixed)
    assert float((shared - x)[:4].square().mean()) > 100 * float((together - x)[:4].square().mean())


def test_worked_by_hand():
    x = torch.tensor([[-127.0, 0.4, 0.5, 1.5, 63.6]])
    assert quantize_dequantize(x, parse("int8_dynamic")).tolist() == [[-127.0, 0.0, 0.0, 2.0, 64.0]]
    x = torch.tensor([[0.0, 255.0, 3.4]])
    assert quantize_dequantize(x, parse("int8_asymmetric_dynamic")).tolist() == [[0.0, 255.0, 3.0]]
    x = torch.tensor([[448.0, 17.0, 1.0]])  # between 16 and 18 the even code is 16
    assert quantize_dequantize(x, parse("fp8_dynamic")).tolist() == [[448.0, 16.0, 1.0]]


@pytest.mark.parametrize("name", list(SCHEMES))
def test_zeros_stay_zero_and_what_is_not_finite_stays_visible(name):
    scheme = parse(name)
    zeros = torch.zeros(2, 8)
    assert torch.equal(quantize_dequantize(zeros, scheme, fit(zeros, scheme)), zeros)
    for bad in (float("nan"), float("inf")):
        x = torch.tensor([[1.0, bad, 2.0]])
        assert bool(quantize_dequantize(x, scheme, fit(x, scheme)).isnan().any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_the_activation_is_kept(dtype):
    assert quantize_dequantize(normal(2, 8).to(dtype), parse("int8_dynamic")).dtype == dtype


def test_unknown_names_list_the_known_and_a_static_scheme_asks_for_its_step():
    with pytest.raises(PlanError, match="int8_dynamic"):
        parse("int8")
    with pytest.raises(PlanError, match="percentile"):
        Histogram.of(normal(9)).affine(parse("int8_static"), "best")
    with pytest.raises(CalibrationError, match="int8_static needs a scale"):
        quantize_dequantize(normal(2, 2), parse("int8_static"))


# ---- observers ----


def same(a, b):
    return (a.count, a.low, a.high, a.exponent) == (b.count, b.low, b.high, b.exponent) and torch.equal(
        a.bins, b.bins
    )


@settings(max_examples=40)
@example([[0.0], [0.25]])
@given(st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=6), min_size=1, max_size=4))
def test_merged_histograms_are_the_histogram_of_the_whole(batches):
    parts = [Histogram.of(torch.tensor(batch)) for batch in batches]
    whole = Histogram.of(torch.tensor([value for batch in batches for value in batch]))
    forth, back = parts[0], parts[-1]
    for part in parts[1:]:
        forth = forth + part
    for part in reversed(parts[:-1]):
        back = back + part
    assert same(forth, whole) and same(back, whole)
    assert int(whole.bins.sum()) == whole.count


def test_bins_hold_what_their_edges_say():
    seen = Histogram.of(torch.tensor([-1.0, -0.001, 0.0, 0.5, 1.0]))
    assert (seen.exponent, seen.width) == (1, 2 / HALF)  # 1.0 is not below 2^0
    assert seen.bins.nonzero().flatten().tolist() == [HALF // 2, HALF - 5, HALF, HALF * 5 // 4, HALF * 3 // 2]


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("tail", [0.0, 0.001])
def test_mse_is_no_worse_than_minmax(name, tail):
    scheme, x = parse(name), normal(20000, tail=tail)
    seen = Histogram.of(x)
    costs = {rule: squared_error(seen, scheme, *seen.range(scheme, rule)) for rule in OBSERVERS}
    assert costs["mse"] == min(costs["mse"], costs["minmax"])
    error = {
        rule: float((quantize_dequantize(x, scheme, seen.affine(scheme, rule)) - x).square().mean()) ** 0.5
        for rule in OBSERVERS
    }
    # The distance to the nearest code changes by no more than its argument, and a value lies within half
    # a bin of its bin's centre: so each root mean square is known to half a bin.
    assert error["mse"] <= error["minmax"] + seen.width


def test_entropy_clips_a_heavy_tail():
    seen, scheme = Histogram.of(normal(50000, tail=0.0005)), parse("int8_static")
    low, high = seen.range(scheme, "entropy")
    assert high < 0.7 * seen.high and low > 0.7 * seen.low


def test_mse_clips_a_gaussian_where_theory_does():
    """4 bits: at 2.55 standard deviations (Banner et al., arXiv 1810.05723, for 16 levels; here 15, and
    the ranges tried lie 4% apart)."""
    seen = Histogram.of(normal(50000))
    low, high = seen.range(Scheme("int4_static", bits=4, dynamic=False), "mse")
    assert 2.55 * 0.93 < max(-low, high) < 2.55 * 1.07 < seen.high


def test_entropy_costs_no_more_than_minmax_and_a_full_range_of_codes_costs_nothing():
    seen, scheme = Histogram.of(normal(20000, tail=0.001)), parse("int8_static")
    assert divergence(seen, scheme, *seen.range(scheme, "entropy")) <= divergence(
        seen, scheme, seen.low, seen.high
    )
    few = Histogram.of(torch.arange(-127.0, 128.0))  # each value its own code: the codes tell all
    assert divergence(few, scheme, few.low, few.high) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["int8_static", "int8_asymmetric_static"])
@given(keep=st.sampled_from([0.5, 0.9, 0.99, 0.9999, 1.0]), seed=st.integers(0, 50))
def test_percentile_keeps_its_part_and_no_bin_more(name, keep, seed):
    scheme, x = parse(name), normal(3000, seed=seed, tail=0.01).double() + 0.3
    seen = Histogram.of(x)
    low, high = percentile(seen, scheme, keep)
    inside = int(((x >= low) & (x <= high)).sum())
    assert inside >= keep * 3000 - 1e-6
    if scheme.symmetric:
        narrower = high - 1.001 * seen.width
        assert int((x.abs() < narrower).sum()) < keep * 3000
    else:
        assert int((x < high - 1.001 * seen.width).sum()) < (1 + keep) / 2 * 3000
        assert int((x > low + 1.001 * seen.width).sum()) < (1 + keep) / 2 * 3000


def test_an_observer_refuses_what_is_not_finite_and_an_empty_one_has_no_range():
    with pytest.raises(CalibrationError, match="1 of 3"):
        Histogram.of(torch.tensor([1.0, float("nan"), 2.0]))
    with pytest.raises(CalibrationError, match="no activation was observed"):
        Histogram.of(torch.zeros(0)).affine(parse("int8_static"), "mse")
    with pytest.raises(CalibrationError, match="keep is 2"):
        percentile(Histogram.of(normal(5)), parse("int8_static"), 2)


# ---- models ----

TOKENS = torch.randint(3, 560, (2, 16), generator=torch.Generator().manual_seed(0))


def forward(model, tokens=TOKENS):
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_every_weight_of_the_blocks_is_reached_and_routers_and_output_stay_float(name):
    model = tiny_model(name)
    expected = {key for key, w in model.named_parameters() if w.ndim >= 2 and ".layers." in key}
    before, seen = forward(model), []

    def record(site, x, weight):
        seen.append((site, x.shape[-1] == weight.shape[-1]))
        return x

    with changed_inputs(model, record) as reached:
        unchanged = forward(model)
    assert {site for site, _ in seen} == reached == expected and all(fits for _, fits in seen)
    # the experts' grouped product and their loop add in another order
    assert torch.allclose(unchanged, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    activations = Activations(parse("int8_dynamic"))
    assert {site for site in expected if not activations.quantizes(site)} == {
        site for site in expected if site.endswith("mlp.gate.weight")
    }
    with changed_inputs(model, activations.change):
        quantized = forward(model)
    assert not torch.equal(quantized, unchanged)
    assert torch.equal(forward(model), before)  # nothing stays behind


def test_quantized_inputs_are_what_replacing_each_linear_by_hand_gives():
    model, scheme = tiny_model("LlamaForCausalLM"), parse("int8_dynamic")
    with changed_inputs(model, Activations(scheme).change):
        found = forward(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.forward = lambda x, m=module: linear(quantize_dequantize(x, scheme), m.weight, m.bias)
    assert torch.equal(found, forward(model))


def test_static_ranges_come_from_what_was_seen_and_sites_that_lose_too_much_stay_float():
    model = tiny_model("LlamaForCausalLM")
    seen = observe(model, TOKENS)
    assert all(histogram.count for histogram in seen.values()) and len(seen) == 14
    found = calibrate(model, TOKENS, parse("int8_static"), "minmax", limit_db=0)
    assert found.left == () and set(found.quantizers) == set(seen)
    site = "model.layers.0.mlp.down_proj.weight"
    largest = max(-seen[site].low, seen[site].high)
    assert float(found.quantizers[site].affine.scale) == pytest.approx(largest / 127, rel=1e-6)  # f32
    worst = min(found.sqnr, key=found.sqnr.get)
    limit = found.sqnr[worst] + 1e-3
    assert calibrate(model, TOKENS, parse("int8_static"), "minmax", limit).left == (worst,)
    assert sensitive({"a": 30.0, "b": 40.0, "c": float("nan"), "d": float("inf")}, 35) == ["a", "c"]


def test_sqnr_is_the_mean_of_what_each_token_loses():
    model = tiny_model("LlamaForCausalLM")
    x, site = {}, "model.layers.1.self_attn.v_proj.weight"

    def record(name, value, weight):
        x.setdefault(name, []).append((value, weight))
        return value

    with changed_inputs(model, record), torch.inference_mode():
        for window in TOKENS:
            model(input_ids=window[None], use_cache=False)
    ratios = []
    with torch.inference_mode():
        for value, weight in x[site]:
            error = quantize_dequantize(value, parse("int4_dynamic")) - value
            ratios.append(linear(error, weight).norm(dim=-1) / linear(value, weight).norm(dim=-1))
    expected = -10 * float(torch.cat(ratios).square().mean().log10())
    assert measure(model, TOKENS, Activations(parse("int4_dynamic")))[site] == pytest.approx(
        expected, abs=1e-4
    )


def test_more_bits_lose_less_and_a_model_out_of_reach_is_refused():
    model = tiny_model("LlamaForCausalLM")
    eight, four = (measure(model, TOKENS, Activations(parse(f"int{bits}_dynamic"))) for bits in (8, 4))
    assert all(eight[site] > four[site] + 15 for site in eight)  # 4 bits are 24 dB
    plain = torch.nn.Sequential(torch.nn.ReLU())
    with (
        pytest.raises(ModelError, match="no weight of its blocks"),
        changed_inputs(plain, Quantizer(parse("int8_dynamic"))),
    ):
        plain(torch.ones(2))
    with pytest.raises(ModelError, match="scaled_dot_product_attention"), changed_attention(plain, max):
        plain(torch.ones(2))
    with pytest.raises(CalibrationError, match="at least 1"):
        calibrate(model, TOKENS[:0], parse("int8_static"))


# ---- evaluate ----


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("model") / "reference"))


def test_quantized_models_run_quantized_and_say_so_while_the_reference_stays_float(reference):
    text = Text(TOKENS.flatten().repeat(4), "random tokens")
    limits = {"context": 32, "prompts": 1, "prompt_tokens": 4, "new_tokens": 4}
    plain = evaluate(reference, [reference], text, Settings(**limits))
    with_eight = Simulation("int8_dynamic", calibration=TOKENS, limit_db=0)
    costs = []
    for simulation in (with_eight, Simulation("int4_dynamic")):
        found = evaluate(reference, [reference], text, Settings(**limits, simulation=simulation))
        assert found.reference.perplexity == plain.reference.perplexity and found.reference.simulated is None
        assert found.quantized_models[0].simulated.sites == 14
        assert f"ran with activations {simulation.activations} at 14 sites" in found.table()
        assert f'"activations": "{simulation.activations}"' in found.to_json()
        costs.append(found.quantized_models[0].fidelity.kl.value)
    assert 0 < costs[0] < costs[1]
    assert plain.quantized_models[0].simulated is None and "ran with" not in plain.table()


def test_a_site_left_in_float_is_named_and_all_left_is_parity(reference):
    text = Text(TOKENS.flatten().repeat(4), "random tokens")
    simulation = Simulation("int8_static", calibration=TOKENS, limit_db=1000)
    found = evaluate(reference, [reference], text, Settings(context=32, prompts=0, simulation=simulation))
    assert found.quantized_models[0].fidelity.kl == (0.0, 0.0)
    assert (
        found.quantized_models[0].simulated.sites == 0 and len(found.quantized_models[0].simulated.left) == 14
    )
    assert "14 left in float (model.layers.0.self_attn.q_proj.weight" in found.table()


def test_bad_simulations_are_refused_before_anything_runs(reference):
    text = Text(TOKENS.flatten().repeat(4), "random tokens")
    with pytest.raises(PlanError, match=r"did you mean int8_dynamic.*known: "):
        Simulation("int8_dynamics")
    with pytest.raises(PlanError, match="known: fp8, int2, int4, int8"):
        Simulation(cache="int3")
    for simulation, said in (
        (Simulation("int8_static"), "int8_static has a fixed range"),
        (Simulation("int8_dynamic", calibration=TOKENS + 10**6), "vocabulary of 600"),
        (Simulation("int8_dynamic", calibration=TOKENS[:0]), r"\(0, 16\)"),
    ):
        with pytest.raises(CalibrationError, match=said):
            evaluate(reference, [reference], text, Settings(context=32, simulation=simulation))
