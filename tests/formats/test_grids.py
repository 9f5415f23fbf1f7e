"""Grids by example: shared parameters, two levels, what a weight of a group buys; joining; fast look-up."""

import pytest
import torch

from fewbits.errors import FormatError
from fewbits.formats import FORMATS
from fewbits.formats.floats import nearest_exponent
from fewbits.formats.ggml import TYPES
from fewbits.formats.intervals import pick, raster_of
from fewbits.formats.levels import Levels
from fewbits.formats.search import ordered_sum
from fewbits.qtensor import QTensor


def weights(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("name, rows", [("int8_tensor", 200), ("fp8_e4m3_block128", 128)])
def test_shared_steps_become_the_weighted_mean(name, rows):
    grid = FORMATS.get(name).fit(weights(200, 128))
    scale = torch.rand(200, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    weight = torch.rand(200, 1, generator=torch.Generator().manual_seed(2))
    for w in (torch.ones_like(scale), weight):
        got, _ = grid.refitted(scale, None, None if w is not weight else w).groups(200)
        for part in (slice(0, rows), slice(rows, 200)):
            if part.start < 200:
                mean = (scale[part].double() * w[part]).sum() / w[part].sum()
                assert torch.allclose(got[part].double(), mean, rtol=2**-11, atol=0)  # half an ulp of f16


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"])
def test_a_group_that_counts_is_stored_nearer(name):
    """Of scales all over the range, in blocks of one weight in ten thousand but for one group."""
    grid = FORMATS.get(name).fit(weights(64, 256))
    scale, offset = grid.groups(64)
    scale = scale * (0.3 + torch.rand(scale.shape, generator=torch.Generator().manual_seed(1)))
    weight = torch.full(scale.shape, 1e-4)
    weight[:, 3] = 1.0
    even, weighted = (grid.refitted(scale, offset, w).groups(64)[0][:, 3] for w in (None, weight))
    assert (weighted - scale[:, 3]).square().sum() < (even - scale[:, 3]).square().sum() / 2


@pytest.mark.parametrize("name", ["int4_g64_asym_float", "q4_1"])
def test_the_base_makes_good_what_the_step_missed(name):
    """At the middle code the line is off by the rounding of the offset alone: half an ulp of f16."""
    grid = FORMATS.get(name).fit(weights(16, 256))
    scale, offset = (part * 1.0123 for part in grid.groups(16))
    got, got_offset = grid.refitted(scale, offset).groups(16)
    missed = (got - scale) * 7.5 + (got_offset - offset)
    assert bool((missed.abs() <= 2**-11 * offset.abs() * (1 + 2**-8)).all())
    assert missed.square().sum() < ((scale.half() - scale) * 7.5).square().sum() * 4


@pytest.mark.parametrize("name", ["int4_g64", "q4_0", "q3_k"])
def test_a_symmetric_step_may_be_negative(name):
    grid = FORMATS.get(name).fit(weights(4, 256))
    scale, _ = grid.groups(4)
    assert torch.equal(torch.sign(grid.refitted(-scale, None).groups(4)[0]), -torch.sign(scale))


@pytest.mark.parametrize("name", ["int4_g64_asym", "nf4", "nvfp4", "mxfp4", "mxfp4_ggml"])
def test_other_steps_may_not(name):
    grid = FORMATS.get(name).fit(weights(4, 256))
    scale, _ = grid.refitted(-grid.groups(4)[0], None).groups(4)
    assert bool((scale >= 0).all()) and bool((scale < 1e-30).all())


def test_the_global_scale_of_nvfp4_grows_where_it_must():
    format, w = FORMATS.get("nvfp4"), weights(4, 64)
    grid = format.fit(w)
    scale, _ = grid.groups(4)
    got, _ = grid.refitted(scale * 100, None).groups(4)
    assert bool(((got / (scale * 100) - 1).abs() <= 2**-4).all())  # e4m3 has three bits of mantissa


@pytest.mark.parametrize("factor", [0.51, 0.74, 0.76, 1.0, 1.49, 1.51])
def test_nearest_power_of_two(factor):
    for e in (-130, -126, 0, 100):
        x = torch.tensor([factor * 2.0**e])
        ends = [2.0 ** (e + d) for d in (-1, 0, 1)]
        assert 2.0 ** int(nearest_exponent(x)) == min(ends, key=lambda end: abs(end - float(x)))


@pytest.mark.parametrize("fmt", TYPES, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("search", [True, False])
def test_fit_is_its_reference(fmt, search):
    w = weights(5, 512)
    for importance in (None, torch.rand(5, 512, generator=torch.Generator().manual_seed(0))):
        fast, slow = (fit(w, importance, search) for fit in (fmt.fit, fmt.fit_reference))
        assert fast.values.keys() == slow.values.keys()
        assert all(torch.equal(fast.values[name], slow.values[name]) for name in slow.values)


def test_parts_join_along_the_columns():
    format, w = FORMATS.get("q4_k"), weights(3, 1024)
    whole = format.encode(w)
    parts = [format.encode(part) for part in w.split([256, 512, 256], 1)]
    joined = QTensor.join_columns(parts)
    assert joined.shape == (3, 1024) and torch.equal(joined.planes["blocks"], whole.planes["blocks"])


@pytest.mark.parametrize(
    "name, fault",
    [
        ("int4_channel", "plane 'scale' has cells of several rows or of whole rows"),
        ("nf4_dq", "plane 'nested_absmax' has cells of several rows or of whole rows"),
        ("int4_g64", "part 0 has 96 columns, plane 'scale' cells of 64"),
    ],
)
def test_parts_that_share_a_cell_do_not_join(name, fault):
    columns = 64 if name == "nf4_dq" else 96
    parts = [FORMATS.get(name).encode(weights(3, columns)) for _ in range(2)]
    with pytest.raises(FormatError, match=fault):
        QTensor.join_columns(parts)


def test_parts_of_other_formats_or_rows_do_not_join():
    q = FORMATS.get("q4_0").encode(weights(3, 32))
    for other in (FORMATS.get("q4_1").encode(weights(3, 32)), FORMATS.get("q4_0").encode(weights(2, 32))):
        with pytest.raises(FormatError, match=rf"part 1 is {other.format.name} of {other.shape[0]} rows"):
            QTensor.join_columns([q, other])


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor([-1.0, 1.0]),
        torch.tensor([-1.0, -0.1, 0.3, 2.0]),
        torch.randn(63, generator=torch.Generator().manual_seed(0)).sort().values,
        torch.cat([-torch.logspace(0, -6, 20), torch.logspace(-6, 0, 20)]),
    ],
)
@pytest.mark.parametrize("ties", ["even", "below"])
def test_pick_is_bucketize(table, ties):
    """At each boundary and its neighbours, far out, and at what is no number."""
    boundaries = Levels(lambda: table, ties).boundaries
    t = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    near = [torch.nextafter(boundaries, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    odd = torch.tensor([0.0, -0.0, 3e38, -3e38, 1e-45, torch.inf, -torch.inf, torch.nan])
    t = torch.cat([t, boundaries, *near, odd])
    index = torch.bucketize(t, boundaries, right=True)
    assert torch.equal(pick(table, boundaries, t), table[index])
    assert torch.equal(pick(table, boundaries, t.clone(), out=torch.empty_like(t)), table[index])
    across, index = t[-1000:].reshape(2, -1).T, index[-1000:].reshape(2, -1).T
    assert torch.equal(pick(table, boundaries, across), table[index])


def test_short_tables_have_a_raster_and_long_ones_need_none():
    assert raster_of(tuple(FORMATS.get("nf4").levels.boundaries.tolist())) is not None
    assert raster_of((0.0, 1e-6, 1.0)) is None and raster_of((0.0,)) is None


@pytest.mark.parametrize("rows", [1, 2, 7, 256, 300])
def test_sums_run_from_the_first_row_to_the_last(rows):
    x = torch.randn(rows, 2, 33, generator=torch.Generator().manual_seed(0))
    folded = x if rows <= 256 else torch.cat([x, x.new_zeros(-rows % 32, 2, 33)]).reshape(-1, 32, 2, 33)
    total = folded[0].clone()
    for row in folded[1:]:
        total = total + row
    if rows > 256:
        parts, total = total, total[0].clone()
        for row in parts[1:]:
            total = total + row
    assert torch.equal(ordered_sum(x), total)
