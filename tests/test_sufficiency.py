"""A shortfall of calibration tokens is said by the stated rule, and the rule is what random matrices do."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.calibrate.stats import Stats
from fewbits.calibrate.sufficiency import shortfall, tokens_needed


def statistics(count, columns, hessian=True):
    return Stats(count, torch.ones(columns), torch.ones(columns), torch.eye(columns) if hessian else None)


@given(st.integers(0, 10_000), st.integers(1, 3000), st.booleans())
def test_a_shortfall_names_both_numbers_and_ends_at_the_rule(count, columns, hessian):
    stats = statistics(count, 2, hessian)
    stats = replace(stats, mean_square=torch.ones(1).expand(columns))
    needed, said = tokens_needed(stats), shortfall(stats)
    assert (said is None) == (count >= needed)
    assert needed == (4 * columns if hessian else 2400)
    if said:
        assert str(needed) in said and (str(count) if count else "no token") in said


def test_at_the_rule_no_direction_is_understated_more_than_it_says():
    """Normal inputs, H = 1: the sample's smallest eigenvalue is (1 - sqrt(k/t))^2 = 1/4, and 0 below k."""
    k, generator = 256, torch.Generator().manual_seed(0)
    at_rule, too_few = (Stats.of(torch.randn(t, k, generator=generator)) for t in (4 * k, k // 2))
    # the edge moves by k^(-2/3) = 0.025 (Tracy and Widom), times a factor of about 1 here
    assert float(torch.linalg.eigvalsh(at_rule.hessian)[0]) == pytest.approx(0.25, abs=0.025)
    assert float(torch.linalg.eigvalsh(too_few.hessian)[0]) == pytest.approx(
        0, abs=1e-4
    )  # f32 of values near 4
    assert shortfall(at_rule) is None
    assert "singular" in str(shortfall(too_few))
    assert "understates some errors" in str(shortfall(replace(at_rule, count=2 * k)))
