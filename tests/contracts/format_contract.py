"""What every number format promises, as functions that take one and assert.

A new format is registered, gets its row of figures (figures.py), and passes all of it: see `PROMISES`, and
test_formats.py, which crosses them with the registry. Nothing here knows a format by name.
"""

import pytest
import torch

from fewbits.errors import FormatError
from fewbits.formats.base import Format, Grid
from tests.contracts.figures import at_size, figures
from tests.contracts.samples import (
    ROWS,
    columns_of,
    every_code,
    rounding_codes,
    same_planes,
    sample,
    uneven,
    weights,
)

# What the bits mean


def every_code_round_trips(format: Format) -> None:
    w = sample(format)
    grid = format.fit(w, uneven(w.shape[1]))
    codes = every_code(grid, *w.shape)
    q = format.pack(grid, codes)
    assert torch.equal(q.decode().nan_to_num(1e9), grid.value(codes).nan_to_num(1e9))
    assert torch.equal(q.decode().isnan(), grid.value(codes).isnan())


def decode_is_the_grid_value(format: Format) -> None:
    w = sample(format)
    for search, known in ((True, None), (False, None), (True, uneven(w.shape[1]))):
        grid = format.fit(w, known, search)
        codes = grid.round(w)
        assert torch.equal(format.pack(grid, codes).decode(), grid.value(codes))
        encoded = format.encode(w, known, search)
        assert torch.equal(encoded.decode(), grid.value(codes)), "encode is fit, round and pack"


def rounding_is_a_projection(format: Format) -> None:
    w = sample(format)
    grid = format.fit(w)
    once = grid.value(grid.round(w))
    assert torch.equal(grid.value(grid.round(once)), once)


def rounding_is_nearest(format: Format) -> None:
    """By brute force over all codes."""
    w = sample(format)
    grid = format.fit(w)
    if format.vector > 1:
        return points_are_near(format, grid, w)
    codes = rounding_codes(grid)
    chosen = (grid.value(grid.round(w)) - w).abs()
    if codes is None:
        nearest = (w.to(format.planes[0].dtype).float() - w).abs()
    else:
        nearest = torch.stack(
            [(grid.value(torch.full(w.shape, int(c), dtype=torch.uint8)) - w).abs() for c in codes]
        )
        nearest = nearest.amin(0)
    assert bool((chosen <= nearest).all())


def points_are_near(format: Format, grid: Grid, w: torch.Tensor) -> None:
    """A vector's point is as near as others; tests/formats/test_iq.py compares with all."""
    codes = grid.round(w)

    def far(codes: torch.Tensor) -> torch.Tensor:
        return (grid.value(codes) - w).square().unflatten(1, (-1, format.vector)).sum(2)

    others = every_code(grid, 64 * len(w), w.shape[1]).reshape(64, *w.shape)
    nearest = torch.stack([far(other) for other in others]).amin(0)
    assert bool((far(codes) <= nearest).all())


def slices_equal_the_whole(format: Format) -> None:
    w = sample(format)
    grid = format.fit(w, uneven(w.shape[1]))
    codes = grid.round(w)
    single = (slice(0, 1), slice(31, 33), slice(5, 200), slice(128, None), slice(3, 250, 7))
    for columns in single if format.vector == 1 else (slice(8, 16), slice(24, 200), slice(128, None)):
        part = grid.round(w[:, columns], columns)
        assert torch.equal(part, codes[:, columns])
        assert torch.equal(grid.value(part, columns), grid.value(codes)[:, columns])


def bytes_are_the_planes(format: Format) -> None:
    for n in (1, 3, 130):
        k = columns_of(format)
        q = format.encode(weights(n, n, k))
        assert (
            q.nbytes
            == format.nbytes(n, k)
            == sum(plane.numel() * plane.itemsize for plane in q.planes.values())
        )
        assert q.bits_per_weight == format.bits_per_weight(n, k)


def rows_are_independent(format: Format) -> None:
    """Where every plane belongs to one row, a reordered weight has reordered planes."""
    w, order = sample(format), torch.tensor([3, 1, 4, 0, 2])
    q = format.encode(w)
    if any(plane.flat is not None or plane.rows not in (1, None) for plane in format.planes):
        with pytest.raises(FormatError, match="spans several rows"):
            q.take_rows(order)
        return
    assert torch.equal(q.take_rows(order).decode(), q.decode()[order])
    if all(plane.rows == 1 for plane in format.planes):
        importance = torch.rand(w.shape, generator=torch.Generator().manual_seed(0))
        whole = format.encode(w, importance)
        assert same_planes(format, whole.take_rows(order), format.encode(w[order], importance[order]))


# Hard inputs


def zeros_decode_to_zeros(format: Format) -> None:
    w = torch.zeros(ROWS, columns_of(format))
    assert not format.encode(w).decode().any()
    w = sample(format)
    w[2] = 0.0
    decoded = format.encode(w).decode()
    assert bool(decoded.isfinite().all())


def size_does_not_matter(format: Format) -> None:
    """Inside the range of figures.txt; see there."""
    ends = figures()[format.name]
    for exponent in torch.linspace(ends["smallest"], ends["largest"], 7).round().tolist():
        assert at_size(format, int(exponent)) <= 1.02


def weights_up_to_the_largest_are_taken(format: Format) -> None:
    """And no others."""
    w = sample(format).clamp(-1, 1) * format.largest
    w[0, 0] = -format.largest
    assert bool(format.encode(w).decode().isfinite().all())
    more = torch.tensor(format.largest).nextafter(torch.tensor(torch.inf))
    if more.isfinite():
        w[1, 1] = more
        with pytest.raises(FormatError, match="tensor: the largest magnitude"):
            format.encode(w)


def not_finite_raises(format: Format) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        w = sample(format)
        w[1, 2] = bad
        with pytest.raises(FormatError):
            format.encode(w)
        with pytest.raises(FormatError, match=r"blk\.0\.ffn_down"):
            format.check(w, "blk.0.ffn_down")


def odd_shapes_work_or_raise(format: Format) -> None:
    for n, k in ((1, format.block), (1, columns_of(format)), (ROWS, format.block), (129, format.block)):
        w = weights(k, n, k)
        grid = format.fit(w)
        q = format.encode(w)
        assert q.shape == (n, k) and torch.equal(q.decode(), grid.value(grid.round(w)))
    for k in (1, 7, 37, 129, 257):
        if k % format.block:
            with pytest.raises(FormatError, match=f"{k} is not a multiple of {format.block}"):
                format.encode(weights(k, ROWS, k))
    for shape in ((4,), (2, 3, format.block), (0, format.block), (3, 0)):
        with pytest.raises(FormatError):
            format.encode(torch.zeros(shape))


# Importance


def importance_may_be_zero(format: Format) -> None:
    """No importance at all is even importance."""
    w = sample(format)
    plain = format.encode(w)
    assert same_planes(format, format.encode(w, torch.zeros(w.shape[1])), plain)
    assert same_planes(format, format.encode(w, torch.zeros_like(w)), plain)


def bad_importance_raises(format: Format) -> None:
    w = sample(format)
    for bad in (
        torch.ones(3),
        torch.ones(w.shape[1], ROWS),
        -torch.ones(w.shape[1]),
        torch.full((w.shape[1],), torch.nan),
    ):
        with pytest.raises(FormatError, match="importance"):
            format.encode(w, bad)


def encoding_is_deterministic(format: Format) -> None:
    w = sample(format)
    importance = torch.rand(w.shape, generator=torch.Generator().manual_seed(1))
    assert same_planes(format, format.encode(w, importance), format.encode(w.clone(), importance.clone()))


PROMISES = (
    every_code_round_trips,
    decode_is_the_grid_value,
    rounding_is_a_projection,
    rounding_is_nearest,
    slices_equal_the_whole,
    bytes_are_the_planes,
    rows_are_independent,
    zeros_decode_to_zeros,
    size_does_not_matter,
    weights_up_to_the_largest_are_taken,
    not_finite_raises,
    odd_shapes_work_or_raise,
    importance_may_be_zero,
    bad_importance_raises,
    encoding_is_deterministic,
)
