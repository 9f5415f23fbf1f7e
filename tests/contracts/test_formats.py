"""Every registered format, and some that only the grammars know, keep every promise of the contract."""

import pytest
import torch

from fewbits.errors import FormatError
from fewbits.formats import FORMATS
from tests.contracts import format_contract, grid_contract
from tests.contracts.figures import CEILINGS, MEASURES, NAMES, figures
from tests.contracts.samples import same_planes, weights


@pytest.mark.parametrize(
    "promise", format_contract.PROMISES + grid_contract.PROMISES, ids=lambda promise: promise.__name__
)
@pytest.mark.parametrize("name", NAMES)
def test_promise(name, promise):
    promise(FORMATS.get(name))


@pytest.mark.parametrize("column", MEASURES)
@pytest.mark.parametrize("name", NAMES)
def test_is_as_good_as_its_figures(name, column):
    """A new format has no row yet: `python -m tests.contracts.figures` measures it."""
    assert MEASURES[column](FORMATS.get(name)) <= figures()[name][column] <= CEILINGS[column]


@pytest.mark.parametrize("name", NAMES)
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


def test_a_worse_format_fails_by_its_own_figures(monkeypatch):
    """One part in a thousand off is nothing to most of the formats, and too much for this one."""
    format = FORMATS.get("int4_g32")
    decode = type(format).decode
    monkeypatch.setattr(type(format), "decode", lambda self, q: decode(self, q) * 1.001)
    assert (
        figures()["int4_g32"]["constant"]
        < MEASURES["constant"](format)
        < figures()["int3_g32_actorder_bf16"]["constant"]
    )


def test_a_format_that_refuses_what_it_takes_fails(monkeypatch):
    format = FORMATS.get("q4_0")

    def refuse(self, w, importance=None, search=True):
        raise FormatError("tensor: the largest magnitude is too large")

    monkeypatch.setattr(type(format), "encode", refuse)
    with pytest.raises(FormatError):
        format_contract.weights_up_to_the_largest_are_taken(format)
