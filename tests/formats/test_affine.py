"""Affine integers: what the planes hold, against arithmetic written out here."""

import pytest
import torch

from fewbits.core import pack
from fewbits.formats import FORMATS


def weights(n: int = 4, k: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def unpacked(q, bits: int) -> torch.Tensor:
    return pack.unpack(q.planes["codes"], bits, q.shape[1]).float()


@pytest.mark.parametrize(
    "alias, canonical",
    [
        ("int8", "int8_channel"),
        ("int4_g128_f16", "int4_g128"),
        ("int4_asym", "int4_channel_asym"),
        ("int3_tensor_asym_float_f16", "int3_tensor_asym_float"),
        ("int3_g64_bf16", "int3_g64_bf16"),
    ],
)
def test_aliases_have_one_canonical_name(alias, canonical):
    assert FORMATS.get(alias) == FORMATS.get(canonical) and FORMATS.get(alias).name == canonical


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("search", [True, False])
def test_symmetric_planes(bits, search):
    w = weights()
    q = FORMATS.get(f"int{bits}_g64").encode(w, search=search)
    scale = q.planes["scale"].float().repeat_interleave(64, 1)
    assert q.planes["scale"].dtype == torch.float16
    assert torch.equal(q.decode(), scale * (unpacked(q, bits) - 2 ** (bits - 1)))


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_zero_planes(bits):
    w = weights() + 0.5
    q = FORMATS.get(f"int{bits}_g64_asym").encode(w)
    zero = pack.unpack(q.planes["zero"], bits, 4).float().repeat_interleave(64, 1)
    scale = q.planes["scale"].float().repeat_interleave(64, 1)
    assert torch.equal(q.decode(), scale * (unpacked(q, bits) - zero))


def test_float_minimum_planes():
    w = weights() + 0.5
    q = FORMATS.get("int4_g64_asym_float_f32").encode(w)
    scale, minimum = (q.planes[name].repeat_interleave(64, 1) for name in ("scale", "minimum"))
    assert torch.equal(q.decode(), scale * unpacked(q, 4) + minimum)


def test_symmetric_rule_puts_the_extreme_on_the_longer_end():
    for sign in (1.0, -1.0):
        w = torch.linspace(-0.9, 1.0, 64)[None] * sign
        q = FORMATS.get("int4_g64_f32").encode(w, search=False)
        assert q.planes["scale"].item() == pytest.approx(-sign / 8, rel=2**-22)
        assert unpacked(q, 4)[0, -1] == 0  # code -8


@pytest.mark.parametrize("shift", [5.0, -5.0, 0.1])
def test_integer_zero_holds_zero_wherever_the_weights_lie(shift):
    """One-sided groups stretch to zero: half a scale of that range is the largest error."""
    w = weights().clamp(-1, 1) + shift
    decoded = FORMATS.get("int8_g64_asym_f32").encode(w, search=False).decode()
    span = w.amax().clamp(min=0) - w.amin().clamp(max=0)
    # The zero itself is rounded: another half scale where the range meets its end.
    assert (decoded - w).abs().max() <= span / 255 * (1 + 2**-10)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integer_zero_search_comes_near_trying_every_zero(bits):
    """The bound of 1 % is three times the largest excess seen (0.3 %) on normal weights."""
    w = weights(32, 128)
    found = FORMATS.get(f"int{bits}_g64_asym_f32").encode(w)
    from fewbits.formats.search import fit_symmetric

    x, top = w.reshape(-1, 64), 2**bits - 1
    least = torch.full((len(x),), torch.inf)
    for zero in range(1, top):
        scale = fit_symmetric(x, None, -zero, top - zero, signed=False)[:, None]
        value = torch.clamp(torch.round(x / scale), -zero, top - zero) * scale
        least = torch.minimum(least, (value - x).square().sum(1))
    assert (found.decode() - w).square().sum() <= 1.01 * least.sum()


@pytest.mark.parametrize("name", ["int4_g128", "int4_g128_asym", "int4_g128_asym_float"])
def test_short_last_group_equals_that_group_alone(name):
    w = weights(3, 300) + 0.2
    format = FORMATS.get(name)
    assert torch.equal(format.encode(w).decode()[:, 256:], format.encode(w[:, 256:].contiguous()).decode())


@pytest.mark.parametrize("name", ["int4_channel", "int4_channel_asym", "int4_channel_asym_float"])
def test_scale_of_a_channel_belongs_to_its_row(name):
    w = weights(3, 64) * torch.tensor([[1e-3], [1.0], [1e3]])
    decoded = FORMATS.get(name).encode(w).decode()
    error = (decoded - w).norm(dim=1) / w.norm(dim=1)
    assert error.max() < 2 * error.min()


def test_scale_that_overflows_its_type_is_its_largest_value():
    q = FORMATS.get("int4_g32").encode(torch.full((1, 32), -1e9))
    assert q.planes["scale"].abs().item() == 65504
    assert torch.equal(q.decode(), torch.full((1, 32), -8 * 65504.0))
