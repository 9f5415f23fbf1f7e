"""Every registered algorithm keeps every promise of the contract on every registered format."""

import pytest
import torch

from fewbits.algorithms import ALGORITHMS, NEEDS
from fewbits.algorithms.descent import descend
from fewbits.algorithms.gptq import gptq
from fewbits.algorithms.hessian import HessianFactor, loss
from fewbits.calibrate.stats import Stats
from fewbits.errors import FormatError
from fewbits.formats import FORMATS
from tests.contracts.algorithm_contract import (
    METRICS,
    PROMISES,
    bad_statistics_raise,
    columns_of,
    no_worse_than_rounding,
    sample,
)

ECSQ_FORMATS = ("int8_channel",)
# It saves bits that rounding to nearest spends, and takes weights without statistics: tests/test_ecsq.py.
ECSQ_DIFFERS = (no_worse_than_rounding, bad_statistics_raise)


def test_every_algorithm_is_in_the_tables():
    assert set(ALGORITHMS) == set(NEEDS) == set(METRICS)
    assert set(NEEDS.values()) <= {"nothing", "mean_square", "hessian"}


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("name", [*ALGORITHMS])
@pytest.mark.parametrize("format", [*FORMATS])
def test_promise(promise, name, format):
    if name == "ecsq" and format not in ECSQ_FORMATS:
        with pytest.raises(FormatError, match=f"not {format}; use int8_channel"):
            ALGORITHMS.get(name)(sample(4, 256)[0], FORMATS.get(format), sample(4, 256)[1])
    elif name != "ecsq" or promise not in ECSQ_DIFFERS:
        promise(name, FORMATS.get(format))


@pytest.mark.parametrize("name", [*FORMATS])
def test_descent_never_raises_the_loss(name):
    """Whatever it starts from. The loss is one of f32 values, summed in f64: equal up to their rounding."""
    format = FORMATS.get(name)
    w, stats = sample(3, columns_of(format), 4)
    hessian = HessianFactor.of(stats).hessian
    rounded = format.encode(w, None, search=False)
    before, after = (loss(q.decode(), w, hessian).sum() for q in (rounded, descend(rounded, w, stats)))
    assert after <= before * (1 + 1e-6)


@pytest.mark.parametrize("name", [*FORMATS])
def test_gptq_without_correlations_rounds_to_nearest(name):
    """On its own static grid, whatever the order."""
    format = FORMATS.get(name)
    k = columns_of(format)
    w = sample(3, k, 5)[0]
    stats = Stats(100, torch.ones(k), torch.ones(k), torch.eye(k))
    q = gptq(w, format, stats, fit="static", descent=0)
    grid, codes = format.unpack(q)
    assert torch.equal(codes, grid.round(w))
