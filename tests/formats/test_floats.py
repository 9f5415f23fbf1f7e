"""Few-bit floats against the tables of their specifications, and against torch's own float8 casts."""

import pytest
import torch

from fewbits.formats import FORMATS
from fewbits.formats.floats import ELEMENTS, e8m0

# (largest, smallest normal, largest subnormal, smallest subnormal): FP8 Formats for Deep Learning, table 1;
# OCP MX v1.0, tables 2 to 5.
SPECIFIED = {
    "e4m3": (448.0, 2.0**-6, 0.875 * 2.0**-6, 2.0**-9),
    "e5m2": (57344.0, 2.0**-14, 0.75 * 2.0**-14, 2.0**-16),
    "e2m3": (7.5, 1.0, 0.875, 0.125),
    "e3m2": (28.0, 0.25, 0.1875, 0.0625),
    "e2m1": (6.0, 1.0, 0.5, 0.5),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_element_table(name):
    element = ELEMENTS[name]
    values, m = element.levels.values, element.mantissa_bits
    assert len(values) == 2**element.bits
    subnormal = [float(values[(1 << m) - 1]), float(values[1])]
    assert [element.largest, float(values[1 << m]), *subnormal] == list(SPECIFIED[name])
    half = 2 ** (element.bits - 1)
    assert torch.equal(values[half:].nan_to_num(-1), -values[:half].nan_to_num(1))
    assert torch.signbit(values[half]) and values[half] == 0


def test_special_codes():
    e4m3, e5m2 = ELEMENTS["e4m3"].levels.values, ELEMENTS["e5m2"].levels.values
    assert e4m3.isnan().nonzero()[:, 0].tolist() == [0x7F, 0xFF] and not e4m3.isinf().any()
    assert e5m2.isnan().nonzero()[:, 0].tolist() == [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]
    assert e5m2[0x7C] == torch.inf and e5m2[0xFC] == -torch.inf
    for small in ("e2m1", "e2m3", "e3m2"):
        assert ELEMENTS[small].levels.values.isfinite().all()


@pytest.mark.parametrize("name, dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_agrees_with_torch(name, dtype):
    levels = ELEMENTS[name].levels
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(levels.values.nan_to_num(0.5), codes.view(dtype).float().nan_to_num(0.5))
    # Each level, each midpoint (a tie), and their f32 neighbours.
    middle = (levels.sorted[1:] + levels.sorted[:-1]) / 2
    points = torch.cat([levels.sorted, middle])
    points = torch.cat([points, points.nextafter(torch.tensor(9e9)), points.nextafter(torch.tensor(-9e9))])
    points = points.clamp(levels.sorted[0], levels.sorted[-1])
    assert torch.equal(levels.values[levels.round(points).long()], points.to(dtype).float())


def test_ties_go_to_the_even_code_and_beyond_the_end_saturates():
    levels = ELEMENTS["e2m1"].levels
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e9])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0])
    assert torch.equal(levels.values[levels.round(x).long()], expected)
    assert torch.equal(levels.values[levels.round(-x).long()], -expected)


def test_e8m0():
    """OCP MX v1.0, section 5.4.1: bias 127, 255 is NaN."""
    assert e8m0()[127] == 1.0 and e8m0()[0] == 2.0**-127 and e8m0()[254] == 2.0**127 and e8m0()[255].isnan()
    torchs = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    assert torch.equal(e8m0()[:255], torchs)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_mx_scale_rule(name):
    """OCP MX v1.0, section 6.3: the scale is the power of two of the largest magnitude, less emax."""
    format = FORMATS.get(name)
    top = 2.0**format.element.exponent_max
    for amax, exponent in (
        (top, 0),
        (top * 1.99, 0),
        (top * 2, 1),
        (top / 1024, -10),
        (top * 2.0**-140, -127),
    ):
        w = torch.zeros(1, 32)
        w[0, 5] = -amax
        assert format.encode(w, search=False).planes["scale"].item() == 127 + exponent


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_mx_values_survive_unchanged(name):
    """A block that holds exact multiples of a power of two, with one value at the top, is lossless."""
    format = FORMATS.get(name)
    levels = format.element.levels.sorted
    w = levels[torch.randint(len(levels), (4, 64), generator=torch.Generator().manual_seed(0))]
    w[:, ::32] = levels[-1]
    for search in (True, False):
        assert torch.equal(format.encode(w * 2.0**-7, search=search).decode(), w * 2.0**-7)


def test_nvfp4_rule():
    """Tensor scale amax / (448 * 6); the block of the largest weight has scale 448."""
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    q = FORMATS.get("nvfp4").encode(w, search=False)
    scale = q.planes["scale"].view(torch.float8_e4m3fn).float()
    largest = w.abs().reshape(8, 4, 16).amax(-1)
    assert torch.allclose(q.planes["global_scale"], largest.amax() / (448 * 6), rtol=2**-22, atol=0)
    assert scale.max() == 448
    # e4m3 has 3 mantissa bits: half a unit in the last place is 1 / 16.
    assert torch.allclose(scale * q.planes["global_scale"], largest / 6, rtol=1 / 16, atol=0)


def test_cells_of_fp8():
    w = torch.randn(130, 300, generator=torch.Generator().manual_seed(0))
    for cells, shape in (("tensor", (1, 1)), ("channel", (130, 1)), ("block128", (2, 3))):
        q = FORMATS.get(f"fp8_e4m3_{cells}").encode(w, search=False)
        assert q.planes["scale"].shape == shape
    corner = w[128:, 256:].abs().amax() / 448
    assert torch.allclose(q.planes["scale"][1, 2], corner, rtol=2**-22, atol=0)
