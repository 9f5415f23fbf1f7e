"""Lossless conversion gives the same numbers or nothing."""

import pytest
import torch

from fewbits.formats import FORMATS
from fewbits.formats.lossless import convert_lossless, lossless_equivalents
from fewbits.qtensor import QTensor

ALWAYS = [
    ("int4_g32", "q4_0"), ("q4_0", "int4_g32"), ("int8_g32", "q8_0"), ("q8_0", "int8_g32"),
    ("int5_g32", "q5_0"), ("q5_0", "int5_g32"), ("int4_g32_asym_float", "q4_1"),
    ("q4_1", "int4_g32_asym_float"), ("int5_g32_asym_float", "q5_1"), ("q5_1", "int5_g32_asym_float"),
    ("mxfp4", "mxfp4_ggml"), ("mxfp4_ggml", "mxfp4"), ("int4_g64", "int4_g64_asym"),
    ("int4_g128", "q4_0"), ("int8_channel", "q8_0"), ("int3_g64_asym", "int3_g32_asym_f32"),
    ("int4_g32_asym", "int4_g32_asym_float_f32"), ("int8_channel_asym", "int8_g64_asym"),
]  # fmt: skip


def encoded(name, n=6, k=256):
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(n, k, generator=generator) + 0.5 * torch.randn(n, 1, generator=generator)
    w[0, :64] = 0
    return FORMATS.get(name).encode(w)


@pytest.mark.parametrize(("source", "target"), ALWAYS)
def test_every_value_is_kept(source, target):
    q = encoded(source)
    converted = convert_lossless(q, FORMATS.get(target))
    assert converted is not None and converted.format.name == target
    assert torch.equal(converted.decode(), q.decode())
    assert target in set(lossless_equivalents(source))


@pytest.mark.parametrize("target", list(FORMATS))
@pytest.mark.parametrize("source", ["int4_g32", "int4_g32_asym", "q4_1", "q8_0", "mxfp4", "nf4", "q4_k"])
def test_exact_or_nothing(source, target):
    q = encoded(source)
    converted = convert_lossless(q, FORMATS.get(target))
    assert converted is None or torch.equal(converted.decode(), q.decode())
    if source in ("nf4", "q4_k"):
        assert (converted is None) == (target != source)


def test_a_base_that_is_no_multiple_of_its_step_has_no_zero_point():
    q = encoded("q4_1")
    assert convert_lossless(q, FORMATS.get("int4_g32_asym")) is None
    zeros = convert_lossless(encoded("int4_g32"), FORMATS.get("q4_1"))  # offset = -8 scale is exact in f16
    assert zeros is not None
    back = convert_lossless(zeros, FORMATS.get("int4_g32_asym"))
    assert back is not None and convert_lossless(back, FORMATS.get("q4_0")) is not None


def test_there_and_back_is_the_same_bytes():
    for source, target in (("q4_0", "int4_g32"), ("mxfp4_ggml", "mxfp4"), ("int8_g32", "q8_0")):
        q = encoded(source)
        there = convert_lossless(q, FORMATS.get(target))
        back = convert_lossless(there, FORMATS.get(source))
        assert isinstance(back, QTensor)
        assert all(torch.equal(back.planes[name], plane) for name, plane in q.planes.items())


def test_groups_are_cut_and_never_joined():
    assert convert_lossless(encoded("int4_g32"), FORMATS.get("int4_g64")) is None
    assert convert_lossless(encoded("int4_g64"), FORMATS.get("int4_g32")) is not None
