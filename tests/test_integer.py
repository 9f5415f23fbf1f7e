"""Integer-only layers: bit for bit as plain Python integers have it, and one step from the real numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.activations.integer import (
    HIGH,
    LOW,
    IntegerLinear,
    fixed_point,
    high_product,
    product,
    requantize,
    right_shift,
)
from fewbits.activations.quantizers import Affine, parse, quantize
from fewbits.errors import KernelError

int32s = st.one_of(st.integers(LOW, HIGH), st.sampled_from([LOW, LOW + 1, -1, 0, 1, HIGH, 2**30, -(2**30)]))


# ---- the reference: Python's integers, no float, no torch ----


def reference_high(a, b):
    both = a * b
    doubled = both + (2**30 if both >= 0 else 1 - 2**30)
    towards_zero = abs(doubled) // 2**31 * (1 if doubled >= 0 else -1)
    return min(towards_zero, HIGH)


def reference_shift(a, n):
    magnitude, half = abs(a), (1 << n) // 2
    return (magnitude + half) // (1 << n) * (1 if a >= 0 else -1)


def reference_scaled(acc, m0, n):
    return reference_shift(reference_high(max(LOW, min(HIGH, acc << max(-n, 0))), m0), max(n, 0))


def reference_layer(layer, x):
    rows = []
    for line in x.tolist():
        row = []
        for w, b, m0, n in zip(
            layer.weight.tolist(),
            layer.bias.tolist(),
            layer.multiplier.tolist(),
            layer.shift.tolist(),
            strict=True,
        ):
            acc = b + sum((c - layer.zero_w) * (v - layer.zero_x) for c, v in zip(w, line, strict=True))
            assert LOW <= acc <= HIGH
            row.append(max(-128, min(127, layer.zero_y + reference_scaled(acc, m0, n))))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int8).view(len(rows), layer.weight.shape[0])


def int8(*shape, seed=0, low=-128):
    return torch.randint(low, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


# ---- properties ----


@given(int32s, int32s)
def test_the_high_product_is_the_reference(a, b):
    assert int(high_product(torch.tensor(a), torch.tensor(b))) == reference_high(a, b)


def test_the_one_product_that_overflows_saturates():
    least = torch.tensor(LOW, dtype=torch.int32)
    assert int(high_product(least, least)) == HIGH
    assert int(high_product(least, torch.tensor(HIGH, dtype=torch.int32))) == -HIGH


@given(int32s, st.integers(0, 31))
def test_the_right_shift_rounds_ties_away_from_zero(a, n):
    assert int(right_shift(torch.tensor(a), torch.tensor(n))) == reference_shift(a, n)


@pytest.mark.parametrize(
    ("a", "n", "expected"), [(3, 1, 2), (-3, 1, -2), (5, 2, 1), (-6, 2, -2), (-1, 1, -1)]
)
def test_shifts_worked_by_hand(a, n, expected):
    assert int(right_shift(torch.tensor(a), torch.tensor(n))) == expected


@given(st.floats(2.0**-32, 2.0**30))
def test_a_multiplier_is_normalized_and_as_near_as_its_bits_allow(real):
    m0, n = fixed_point(real)
    assert 2**30 <= m0 < 2**31
    assert abs(m0 * 2.0 ** (-31 - n) - real) <= real * 2.0**-31  # half a unit of M0 >= 2^30


def test_a_fraction_that_rounds_up_to_one_moves_the_point():
    assert fixed_point(1 - 2.0**-40) == (2**30, -1)
    assert fixed_point(2.0**-40) == (0, 0)


@pytest.mark.parametrize("real", [0.0, -1.0, float("nan"), float("inf"), 2.0**31])
def test_a_multiplier_that_is_no_step_is_refused(real):
    with pytest.raises(KernelError, match="multiplier"):
        fixed_point(real)


@given(int32s, st.floats(2.0**-31, 64.0))
def test_requantizing_is_the_reference_and_within_one_of_the_real_product(acc, real):
    m0, n = fixed_point(real)
    found = int(requantize(torch.tensor([[acc]]), torch.tensor([m0]), torch.tensor([n]))[0, 0])
    assert found == reference_scaled(acc, m0, n)
    if abs(acc * real) < HIGH and abs(acc << max(-n, 0)) < HIGH:
        # two roundings of half a unit each, and 2^-31 relative of M0 on at most 2^31
        assert abs(found - acc * real) <= 2


@settings(max_examples=60)
@given(
    st.tuples(st.integers(0, 5), st.integers(1, 7), st.integers(1, 40)),
    st.tuples(*[st.integers(-128, 127)] * 3),
    st.integers(-12, 31),
    st.integers(0, 10**6),
)
def test_a_layer_is_its_reference_bit_for_bit(shape, zeros, n, seed):
    t, rows, k = shape
    generator = torch.Generator().manual_seed(seed)
    layer = IntegerLinear(
        int8(rows, k, seed=seed),
        torch.randint(-(2**20), 2**20, (rows,), generator=generator, dtype=torch.int32),
        torch.randint(2**30, 2**31, (rows,), generator=generator).to(torch.int32),
        torch.randint(n - 1, n + 1, (rows,), generator=generator),
        *zeros,
    )
    x = int8(t, k, seed=seed + 1)
    assert torch.equal(layer(x), reference_layer(layer, x))


@pytest.mark.parametrize("x", [-128, 127])
@pytest.mark.parametrize("w", [-128, 127])
@pytest.mark.parametrize("zero", [-128, 0, 127])
def test_extremes_are_exact_across_the_pieces_of_a_product(x, w, zero):
    k = 2 * 1024 + 3
    layer = IntegerLinear(
        torch.full((1, k), w, dtype=torch.int8),
        torch.tensor([2**24], dtype=torch.int32),
        torch.tensor([2**30 + 1], dtype=torch.int32),
        torch.tensor([17]),
        zero_x=zero,
    )
    line = torch.full((2, k), x, dtype=torch.int8)
    assert int(product(line, layer.weight)[0, 0]) == k * x * w
    assert torch.equal(layer(line), reference_layer(layer, line))


def test_random_products_equal_int64():
    x, w = int8(9, 3000), int8(11, 3000, seed=1)
    assert torch.equal(product(x, w).long(), x.long() @ w.long().T)


@pytest.mark.parametrize("scheme", ["int8_static", "int8_asymmetric_static"])
def test_a_layer_is_within_one_step_of_the_float_computation(scheme):
    """On the same codes: |y - (real / scale + zero)| < 1, since one rounding is to an integer (1/2) and the
    other, before the shift, is at most another half of what is shifted."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 96, generator=generator) + 0.3
    w, bias = torch.randn(20, 96, generator=generator), torch.randn(20, generator=generator)
    scale_w = w.abs().amax(1) / 127
    codes_w = (w / scale_w[:, None]).round().to(torch.int8)
    kind = parse(scheme)

    def ranged(values):
        return kind.affine(values.min(), values.max())

    ax, ay = ranged(x), ranged(x @ w.T + bias)
    codes_x = quantize(x, kind, ax).to(torch.int8)
    layer = IntegerLinear.of(codes_w, scale_w, bias, ax, ay)
    scale = scale_w.double() * ax.scale.double()
    real = ((codes_x.double() - ax.zero) @ codes_w.double().T + (bias / scale).round()) * scale
    expected = (real / ay.scale + ay.zero).clamp(-128, 127)
    assert float((layer(codes_x).double() - expected).abs().max()) <= 1
    assert torch.equal(layer(codes_x), reference_layer(layer, codes_x))


def test_what_could_overflow_or_does_not_fit_is_refused_with_numbers():
    def layer(weight, bias=0, **zeros):
        n = weight.shape[0]
        return IntegerLinear(
            weight,
            torch.full((n,), bias, dtype=torch.int32),
            torch.full((n,), 2**30, dtype=torch.int32),
            torch.zeros(n, dtype=torch.int64),
            **zeros,
        )

    with pytest.raises(KernelError, match=r"2147483648.*2147483647"):
        layer(torch.full((1, 2**17), -128, dtype=torch.int8))
    with pytest.raises(KernelError, match="can reach"):
        layer(torch.full((1, 8), 127, dtype=torch.int8), bias=HIGH)
    with pytest.raises(KernelError, match="zero_x is 200"):
        layer(int8(2, 8), zero_x=200)
    good = layer(int8(2, 8))
    with pytest.raises(KernelError, match=r"\(3, 9\).*\(t, 8\)"):
        good(int8(3, 9))
    with pytest.raises(KernelError, match="float32"):
        good(torch.zeros(3, 8))
    one = Affine(torch.tensor(1e-9), torch.tensor(0.0))
    with pytest.raises(KernelError, match="does not fit int32"):
        IntegerLinear.of(int8(1, 8), torch.tensor([1e-9]), torch.tensor([1.0]), one, one)
