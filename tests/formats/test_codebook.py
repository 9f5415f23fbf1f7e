"""Codebooks: golden bytes of bitsandbytes, and k-means against its own conditions of optimality."""

import pytest
import torch

from fewbits.formats import FORMATS
from fewbits.formats.codebook import DYNAMIC, FP4, NF4
from fewbits.formats.lloyd import companded, fit_levels


def wave() -> torch.Tensor:
    return torch.sin(torch.arange(64.0) * 1.7)[None]


# `bitsandbytes.functional.quantize_4bit` 0.50.2 of `wave()` on the CPU.
GOLDEN = {
    "nf4": "7f40ce11ec05f60bf21ed04f80af31ee13f908f40de12fb06f50ce11ec05f70a",
    "fp4": "03fb52aa34be3eb43aa25bc31b73da22bd36b13cb52ad34b93eb53aa25bf39b7",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_equal_those_of_bitsandbytes(name):
    q = FORMATS.get(name).encode(wave(), search=False)
    assert bytes(q.planes["codes"][0].tolist()).hex() == GOLDEN[name]
    assert q.planes["absmax"].item() == wave().abs().max()


def test_first_weight_lies_in_the_high_nibble():
    w = torch.zeros(1, 64)
    w[0, 0], w[0, 1] = 1.0, -1.0
    assert FORMATS.get("nf4").encode(w, search=False).planes["codes"][0, 0] == 0xF0


def test_tables():
    assert torch.equal(NF4.values, NF4.sorted) and NF4.values[7] == 0 and len(NF4.values) == 16
    assert FP4.values[3] == 1.0 and FP4.values[11] == -1.0
    assert torch.allclose(FP4.values[1] * 192, torch.tensor(1.0))


def test_dynamic_map():
    """Spot values of bitsandbytes' create_dynamic_map(), which ours equals entry for entry."""
    expected = {0: -0.992968738, 1: -0.978906274, 64: -0.098593749, 126: -5.5e-07, 127: 0.0, 128: 5.5e-07}
    expected |= {129: 3.25e-06, 200: 0.233593747, 254: 0.992968738, 255: 1.0}
    got = DYNAMIC.values[list(expected)]
    # Nine digits are printed above: half a unit of the last one.
    assert torch.allclose(got, torch.tensor(list(expected.values())), rtol=1e-8, atol=5e-10)
    assert bool((DYNAMIC.values.diff() > 0).all()) and len(DYNAMIC.values) == 256


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_double_quantization(name):
    w = torch.randn(33, 640, generator=torch.Generator().manual_seed(0))
    single, double = (FORMATS.get(n).encode(w, search=False) for n in (name, f"{name}_dq"))
    assert double.planes["nested_absmax"].shape == (2,)  # 330 absmax in blocks of 256, over row ends
    nested = double.planes["nested_absmax"].repeat_interleave(256)[:330].reshape(33, 10)
    absmax = DYNAMIC.values[double.planes["absmax"].long()] * nested + double.planes["offset"]
    # The map's widest step near its ends is 0.9 / 64 of the nested absmax; half of it is lost.
    assert bool(((absmax - single.planes["absmax"]).abs() <= nested * (0.9 / 64) * (0.5 + 2**-10)).all())
    errors = [float((q.decode() - w).square().sum()) for q in (single, double)]
    assert errors[1] < 1.01 * errors[0]  # measured: 1.0003


def test_powers_of_two():
    format = FORMATS.get("pow2_4_g128")
    positive = format.levels.sorted[8:]
    assert torch.equal(positive, 2.0 ** torch.arange(-6.0, 1.0))
    assert torch.equal(format.levels.sorted[:7], -positive.flip(0)) and format.levels.sorted[7] == 0


@pytest.mark.parametrize("weighted", [True, False])
def test_kmeans_levels_are_means_of_their_cells(weighted):
    """Lloyd's fixed point: no level can move and no weight can change its level for the better."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 400, generator=generator)
    weight = torch.rand(5, 400, generator=generator) if weighted else torch.ones(5, 400)
    levels = fit_levels(x, weight, 8, search=True)
    nearest = (x[:, :, None] - levels[:, None]).abs().argmin(-1)
    mass = torch.zeros(5, 8).scatter_add_(1, nearest, weight)
    mean = torch.zeros(5, 8).scatter_add_(1, nearest, weight * x) / mass
    assert bool((mass > 0).all())
    assert torch.allclose(levels, mean, rtol=2**-10, atol=2**-12)  # levels are kept in f16


def test_kmeans_of_few_values_is_exact():
    values = torch.tensor([-0.75, -0.5, 0.125, 2.0])
    w = values[torch.randint(4, (6, 200), generator=torch.Generator().manual_seed(0))]
    for name in ("kmeans2_channel", "kmeans2_tensor"):
        assert torch.equal(FORMATS.get(name).encode(w).decode(), w)


def test_kmeans_reaches_the_optimal_quantizer_of_a_normal():
    """Max (1960), table I: mean squared error 0.1175, 0.03454 and 0.009497 for 4, 8 and 16 levels."""
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    for bits, least in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        error = float((FORMATS.get(f"kmeans{bits}_tensor").encode(w).decode() - w).square().mean())
        # 131072 samples: their own variance moves the error by about 1 %.
        assert error == pytest.approx(least, rel=0.03)


def test_companded_start_is_uniform_for_uniform_weights():
    x = torch.linspace(0, 1, 4001)[None]
    start = companded(x, torch.ones_like(x), 4)
    assert torch.allclose(start, torch.tensor([[0.125, 0.375, 0.625, 0.875]]), atol=1e-3)  # 4 spacings
