"""The mathematics behind the algorithms: blocked updates, the factor, error feedback, descent, the target."""

import pytest
import torch

from fewbits.algorithms import ALGORITHMS, CalibrationWarning, descend, gptq, hqq, weighted
from fewbits.algorithms.blocked import blocked_update
from fewbits.algorithms.descent import join_parts, solve_scales, split_columns
from fewbits.algorithms.gptq import FITS, column_order, feed_back
from fewbits.algorithms.hessian import HessianFactor, loss
from fewbits.calibrate.stats import Stats
from fewbits.errors import CalibrationError, PlanError
from fewbits.formats import FORMATS
from fewbits.formats.grids import AffineGrid
from tests.contracts.algorithm_contract import output_error, same, sample

SHARED_ROWS = ["int8_tensor", "fp8_e4m3_block128", "nf4_dq", "nvfp4", "kmeans3_tensor"]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Blocked updates


@pytest.mark.parametrize("unit", [1, 2, 3, 12])
def test_a_blocked_update_is_the_plain_loop(unit):
    """In f64; the products of matrices sum in another order."""
    start, coupling = random(12, 5), random(12, 12, seed=1)
    expected, last = start.clone(), torch.zeros(12, 5, dtype=torch.float64)
    for j in range(0, 12, unit):
        last[j : j + unit] = torch.sin(expected[j : j + unit])
        expected[j + unit :] -= coupling[j : j + unit, j + unit :].T @ last[j : j + unit]
    state, moves, seen = start.clone(), torch.zeros_like(start), []

    def quantize(begin, end):
        seen.append((begin, end))
        moves[begin:end] = torch.sin(state[begin:end])

    blocked_update(state, coupling, moves, quantize, unit)
    assert seen == [(j, j + unit) for j in range(0, 12, unit)]
    torch.testing.assert_close(moves, last, rtol=1e-12, atol=1e-12)


# The Hessian and its factor


def test_the_factor_is_that_of_the_inverse():
    """In f32: the inverse of a matrix of condition c is known to about c * 2^-24; c < 1e4 here."""
    _, stats = sample(1, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    hessian_factor = HessianFactor.of(stats, 0.01, order)
    hessian = hessian_factor.hessian[order][:, order].double()
    assert torch.linalg.cond(hessian) < 1e4
    factor = hessian_factor.factor.double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ hessian, torch.eye(40).double(), rtol=0, atol=1e4 * 2**-24)


def test_one_factor_serves_all_weights_of_an_input():
    w, stats = sample(4, 64)
    first = HessianFactor.of(stats)
    assert HessianFactor.of(stats) is first and HessianFactor.of(stats, 0.5) is not first
    again = sample(4, 64)[1]
    gptq(w, FORMATS.get("nf4"), again)
    assert same(gptq(w, FORMATS.get("q4_0"), again), gptq(w, FORMATS.get("q4_0"), stats))


def test_damping_is_raised_aloud():
    w, _ = sample(2, 64)
    stats = Stats.of(random(5, 64, dtype=torch.float32))
    with pytest.warns(CalibrationWarning, match=r"64 columns .* raised from 0 to 0.003 .* more calibration"):
        q = gptq(w, FORMATS.get("q8_0"), stats, damp=0.0)
    assert bool(q.decode().isfinite().all())


def test_a_hopeless_hessian_raises():
    w, _ = sample(2, 64)
    stats = Stats(1, torch.ones(64), torch.ones(64), -torch.eye(64))
    with pytest.raises(CalibrationError, match="not positive definite even when"):
        gptq(w, FORMATS.get("q8_0"), stats)


def test_the_gptaq_target_is_least_squares():
    """The gradient of |t x - w x~|^2 + damping |t - w|^2 vanishes at t; f32 against terms of size 1."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 40, generator=generator)
    floats = torch.randn(300, 40, generator=generator)
    stats = Stats.of(floats + 0.3 * torch.randn(300, 40, generator=generator), floats=floats)
    order = torch.randperm(40, generator=generator)
    hessian_factor = HessianFactor.of(stats, 0.01, order)
    t = hessian_factor.target(w, stats, 1.0)
    gradient = (t - w) @ hessian_factor.hessian - w @ stats.mismatch
    assert gradient.abs().max() < 1e-4
    torch.testing.assert_close(hessian_factor.target(w, stats, 0.5) - w, (t - w) / 2, rtol=0, atol=1e-6)
    assert torch.equal(hessian_factor.target(w, stats, 0.0), w)


def test_mismatch_is_corrected():
    """Against the float model's outputs, on the inputs as they have become."""
    generator = torch.Generator().manual_seed(0)
    w, _ = sample(8, 64)
    floats = torch.randn(600, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    now = floats @ (torch.eye(64) + 0.1 * torch.randn(64, 64, generator=generator))
    known, unknown = Stats.of(now, floats=floats), Stats.of(now)
    format = FORMATS.get("q4_0")
    errors = [
        float((now @ gptq(w, format, stats).decode().T - floats @ w.T).square().sum())
        for stats in (known, unknown)
    ]
    assert errors[0] < 0.5 * errors[1]


# Error feedback


def test_columns_are_ordered_by_their_weight_inside_blocks():
    diagonal = torch.tensor([1.0, 2.0, 0.0, 9.0, 4.0, 4.0])
    stats = Stats(1, diagonal, diagonal, diagonal.diag())
    assert column_order(stats, 2).tolist() == [3, 2, 4, 5, 1, 0]
    assert column_order(stats, 6).tolist() == [3, 4, 5, 1, 0, 2]


def textbook(w, factor, grid, order):
    """GPTQ as published: column by column, each update at once. `(n, k)` -> codes `(n, k)`."""
    w, codes = w[:, order].clone(), {}
    for j, column in enumerate(order.tolist()):
        at = slice(column, column + 1)
        codes[column] = grid.round(w[:, j : j + 1], at)
        error = (w[:, j] - grid.value(codes[column], at)[:, 0]) / factor[j, j]
        w[:, j:] -= error[:, None] * factor[j, j:]
    return torch.cat([codes[column] for column in range(len(order))], 1)


@pytest.mark.parametrize("name", ["int4_g64", "q4_1", "q3_k", "nf4", "kmeans3_channel", "int3_g128_asym"])
@pytest.mark.parametrize("width", [1, 32, 256])
def test_feedback_is_the_textbook_code_for_code(name, width):
    """There is no block size to depend on. In f64, where no two sums differ enough to flip a rounding."""
    format = FORMATS.get(name)
    w, stats = sample(7, 256)
    hessian_factor = HessianFactor.of(stats, 0.01, column_order(stats, width))
    grid = format.fit(w)
    factor = hessian_factor.factor.double()
    expected = textbook(w.double(), factor, grid, hessian_factor.order)
    q, _ = feed_back(format, grid, w.double().T[hessian_factor.order], factor, hessian_factor.order)
    assert torch.equal(format.unpack(q)[1], expected)
    assert not torch.equal(expected, grid.round(w))


def test_the_errors_fed_back_are_the_loss():
    """sum of err^2 = tr((q - w) H (q - w)^T), to what f32 knows of the factor (see above)."""
    format = FORMATS.get("int4_g32")
    w, stats = sample(7, 64)
    hessian_factor = HessianFactor.of(stats, 0.01, column_order(stats, 64))
    q, errors = feed_back(
        format, format.fit(w), w.T[hessian_factor.order], hessian_factor.factor, hessian_factor.order
    )
    exact = loss(q.decode(), w, hessian_factor.hessian)
    torch.testing.assert_close(errors.double().square().sum(0), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["int4_g32", "q4_1", "nf4", "q2_k", "int4_channel"])
def test_each_refinement_pays(name):
    """In sum over seeds: search and descent each lower the loss."""
    format = FORMATS.get(name)
    recipes = [
        {"fit": "dynamic", "descent": 0},
        {"fit": "searched", "descent": 0},
        {"fit": "searched", "descent": 2},
    ]
    totals = [0.0] * len(recipes)
    for seed in range(3):
        w, stats = sample(12, 256, seed)
        for i, recipe in enumerate(recipes):
            totals[i] += output_error(gptq(w, format, stats, **recipe).decode(), w, stats)
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)


@pytest.mark.parametrize("fit", FITS)
def test_rows_do_not_know_of_each_other(fit):
    """So a weight may be cut by rows: same codes, for products of equal columns sum alike in f64 only."""
    format = FORMATS.get("int4_g32")
    w, stats = sample(8, 64)
    whole = gptq(w, format, stats, fit=fit)
    upper = gptq(w[:4], format, stats, fit=fit)
    torch.testing.assert_close(
        loss(upper.decode(), w[:4], stats.hessian),
        loss(whole.decode(), w, stats.hessian)[:4],
        rtol=1e-4,
        atol=0,
    )


# Descent


@pytest.mark.parametrize("name", ["q4_1", "int4_g32", "q4_k", "int4_channel", *SHARED_ROWS])
def test_descent_pays_from_plain_rounding(name):
    format = FORMATS.get(name)
    w, stats = sample(6, 256)
    q = format.encode(w)
    assert output_error(descend(q, w, stats).decode(), w, stats) < 0.7 * output_error(q.decode(), w, stats)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("width", [16, 24, 64])
def test_scales_are_solved(width, ordered, offsets):
    """At the solution the gradient along every scale and offset vanishes (f32; last groups may be short),
    whichever columns belong to a group."""
    w, stats = sample(5, 64)
    level = torch.round(w * 30).clamp(-4, 4)
    value = 0.02 * level
    gradient = (value - w) @ stats.hessian
    index = (torch.arange(64) // width)[random(64).argsort()] if ordered else None
    ones = torch.ones(5, -(-64 // width))
    grid = AffineGrid(ones, ones if offsets else None, 0, 15, width, 64, torch.float16, index=index)
    scale, offset = solve_scales(grid, level, gradient, stats.hessian, offsets)
    value = value + grid.spread(scale, 64) * level
    if offsets:
        value = value + grid.spread(offset, 64)
    after = (value - w) @ stats.hessian
    for kind in (level, torch.ones_like(level))[: 1 + offsets]:
        left, had = (grid.sums(g * kind).abs().max() for g in (after, gradient))
        assert left < 1e-3 * had
    assert offset.shape == (5, -(-64 // width) if offsets else 0)


@pytest.mark.parametrize("name", ["int4_g64_asym", "q4_k", "nf4", "int3_g7_asym"])
def test_columns_are_split_and_joined(name):
    format = FORMATS.get(name)
    width = format.column_block(256 * 7)
    w, _ = sample(3, 3 * width)
    q = format.encode(w)
    parts = split_columns(q, width)
    assert len(parts) == 3 and same(join_parts(parts), q)
    assert all(same(part, format.encode(w[:, i * width : (i + 1) * width])) for i, part in enumerate(parts))


# Weighted and half-quadratic


def test_weighted_modes():
    format = FORMATS.get("int4_g32")
    w, stats = sample(6, 64)
    diagonal = weighted(w, format, stats).decode()
    ours, plain = (
        float((part - w).square().sum(0) @ stats.mean_square)
        for part in (diagonal, format.encode(w).decode())
    )
    assert ours < 0.95 * plain
    hessian = weighted(w, format, stats, mode="hessian")
    assert output_error(hessian.decode(), w, stats) < output_error(diagonal, w, stats)


@pytest.mark.parametrize("name", ["int4_g32", "q4_1", "nf4", "int2_g64_asym", "q3_k", "kmeans2_tensor"])
def test_hqq_lowers_its_norm(name):
    """Of weights with outliers."""
    format = FORMATS.get(name)
    w, _ = sample(6, 256)
    ours, plain = (float((q.decode() - w).abs().pow(0.7).sum()) for q in (hqq(w, format), format.encode(w)))
    assert ours < 0.999 * plain


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gptq", {"damp": -1.0}),
        ("gptq", {"damp": float("nan")}),
        ("gptq", {"gptaq": 2.0}),
        ("gptq", {"fit": "none"}),
        ("gptq", {"descent": -1}),
        ("weighted", {"mode": "full"}),
        ("weighted", {"damp": -1.0}),
        ("weighted", {"rounds": -1}),
        ("hqq", {"norm": 1.5}),
        ("hqq", {"beta": 0.0}),
        ("hqq", {"rounds": -1}),
    ],
)
def test_bad_options_raise(name, options):
    w, stats = sample(2, 64)
    with pytest.raises(PlanError, match=f"{name}: {next(iter(options))} is"):
        ALGORITHMS.get(name)(w, FORMATS.get("q4_0"), stats, **options)
