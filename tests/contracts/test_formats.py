"""Every registered format, and some that only the grammars know, keep every promise of the contract."""

import pytest
import torch

from fewbits.errors import FormatError
from fewbits.formats import FORMATS
from tests.contracts import format_contract, grid_contract
from tests.contracts.format_contract import same_planes, weights

PARSED = [
    "int2_channel_asym_bf16",
    "int3_g7_asym",
    "int4_tensor_asym_float_f32",
    "int3_g32_actorder_bf16",
    "int4_g48_asym_actorder",
    "int5_g96_asym_float_bf16",
    "int6_tensor_asym_f32",
    "fp6_e3m2_g48",
    "fp4_e2m1_channel_bf16",
    "fp8_e5m2_g256_f32",
    "pow2_5_tensor_f32",
    "pow2_2_g33",
    "kmeans1_channel",
    "kmeans6_tensor",
]


@pytest.mark.parametrize(
    "promise", format_contract.PROMISES + grid_contract.PROMISES, ids=lambda promise: promise.__name__
)
@pytest.mark.parametrize("name", [*FORMATS, *PARSED])
def test_promise(name, promise):
    promise(FORMATS.get(name))


@pytest.mark.parametrize("name", [*FORMATS, *PARSED])
def test_name_is_canonical(name):
    format = FORMATS.get(name)
    assert format.name == name and FORMATS.get(format.name) == format


@pytest.mark.parametrize(
    "name",
    [
        "int4_actorder",
        "int4_channel_actorder",
        "int4_g64_asym_float_actorder",
        "int4_g64_actorder_asym",
        "int1",
        "int9_g64",
        "int4_g0",
        "int4_g",
        "q4_9",
        "fp8_e2m1_tensor",
        "nf4 ",
        "",
    ],
)
def test_unknown_name_raises(name):
    with pytest.raises(FormatError, match="unknown format"):
        FORMATS.get(name)


@pytest.mark.parametrize(
    "name",
    [
        "int4_g96_asym",
        "mxfp4",
        "nf4",
        "kmeans3_channel",
        "fp8_e4m3_block128",
        "int8_tensor",
        "int4_g64_asym_actorder",
    ],
)
@pytest.mark.parametrize("axes", [1, 2])
def test_encoding_a_few_rows_at_a_time_changes_nothing(name, axes, monkeypatch):
    format, w = FORMATS.get(name), weights(0, 21, 384)
    importance = torch.rand((21, 384)[2 - axes :], generator=torch.Generator().manual_seed(0))
    whole = format.encode(w, importance)
    monkeypatch.setattr("fewbits.formats.base.CHUNK", 4 * 384)
    assert same_planes(format, format.encode(w, importance), whole)
