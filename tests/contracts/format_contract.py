"""What every number format promises, as functions that take one and assert.

A new format is registered and passes all of it: see `PROMISES`, and test_formats.py, which crosses
them with the registry. Nothing here knows a format by name.
"""

from math import lcm

import pytest
import torch

from fewbits.errors import FormatError
from fewbits.formats.base import Format, Grid
from fewbits.formats.codebook import LearnedGrid
from fewbits.formats.floats import Microscaling
from fewbits.formats.grids import AffineGrid, TableGrid
from fewbits.formats.levels import LevelGrid
from fewbits.qtensor import QTensor

ROWS = 5
# Fits compare f32 sums of up to ROWS * 256 squares, each addition wrong by half an ulp at the most.
SUM_ERROR = ROWS * 256 * 2**-24


def columns_of(format: Format) -> int:
    """A row length of several blocks, and of several groups of 32, 64 and 128."""
    return lcm(format.block, 256)


def weights(seed: int, n: int, k: int) -> torch.Tensor:
    """`(n, k)` of the size and shape that weights have: rows of different spread, a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * torch.logspace(-2, -1, n)[:, None]
    return w * torch.where(torch.rand(n, k, generator=generator) < 0.01, 4.0, 1.0)


def sample(format: Format, seed: int = 0) -> torch.Tensor:
    return weights(seed, ROWS, columns_of(format))


def uneven(k: int) -> torch.Tensor:
    """`(k,)`: an importance in no order, by which a format may put columns into groups."""
    return torch.rand(k, generator=torch.Generator().manual_seed(2))


def rounding_codes(grid: Grid) -> torch.Tensor | None:
    """The codes that rounding may give, `(L,)`; None where they are too many to list."""
    grid = getattr(grid, "meaning", grid)
    if isinstance(grid, AffineGrid):
        return torch.arange(grid.top + 1, dtype=torch.uint8)
    if isinstance(grid, TableGrid):
        return grid.codes
    if isinstance(grid, LevelGrid):
        return grid.levels.codes
    if isinstance(grid, LearnedGrid):
        return torch.arange(grid.table.shape[1], dtype=torch.uint8)
    return None


def every_code(grid: Grid, n: int, k: int) -> torch.Tensor:
    """`(n, k)` codes among which each that can be stored occurs."""
    generator = torch.Generator().manual_seed(0)
    if grid.vector > 1:  # any bytes are codes
        format = grid.format
        blocks = torch.randint(0, 256, (n, format.nbytes(1, k)), generator=generator, dtype=torch.uint8)
        return format.unpack(QTensor(format, (n, k), {"blocks": blocks}))[1]
    inner = getattr(grid, "meaning", grid)
    codes = torch.arange(len(inner.levels.values)) if isinstance(inner, LevelGrid) else rounding_codes(inner)
    return (
        codes.to(torch.uint8)
        .repeat(-(-n * k // len(codes)))[torch.randperm(n * k, generator=generator)]
        .reshape(n, k)
    )


def error(w: torch.Tensor, decoded: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    """Sum of (weighted) squared errors."""
    square = (w.double() - decoded.double()).square()
    return float((square if importance is None else square * importance).sum())


def same_planes(format: Format, a, b) -> bool:
    return all(torch.equal(a.planes[plane.name], b.planes[plane.name]) for plane in format.planes)


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
    """By brute force over all codes; half an ulp of the quotient w / scale may decide a tie."""
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
    assert bool((chosen <= nearest + 2**-22 * w.abs().amax()).all())


def points_are_near(format: Format, grid: Grid, w: torch.Tensor) -> None:
    """A vector's point is as near as others; tests/formats/test_iq.py compares with all."""
    codes = grid.round(w)

    def far(codes: torch.Tensor) -> torch.Tensor:
        return (grid.value(codes) - w).square().unflatten(1, (-1, format.vector)).sum(2)

    others = every_code(grid, 64 * len(w), w.shape[1]).reshape(64, *w.shape)
    nearest = torch.stack([far(other) for other in others]).amin(0)
    assert bool((far(codes) <= nearest * (1 + SUM_ERROR)).all())


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


def constants_survive(format: Format) -> None:
    """The coarsest neighbours of a float with one mantissa bit are 4 and 6: an error of 1 in 5."""
    for constant in (0.37, -0.37, 1.0):
        w = torch.full((ROWS, columns_of(format)), constant)
        assert bool(((format.encode(w).decode() - w).abs() <= abs(constant) / 5).all())


def tiny_weights_stay_finite(format: Format) -> None:
    """Where scales underflow, a value may be anything between the least and the largest weight."""
    for size in (1e-8, 1e-30, 1e-38, 1e-42):
        w = sample(format) * size
        decoded = format.encode(w).decode()
        assert bool(decoded.isfinite().all())
        assert (decoded - w).abs().max() <= 2 * w.abs().max()


def huge_weights_stay_finite_or_raise(format: Format) -> None:
    for size in (1e6, 1e12, 1e20, 1e30, 3e38):
        w = sample(format).clamp(-1, 1) * size
        try:
            decoded = format.encode(w).decode()
        except FormatError as fault:
            assert "tensor: " in str(fault)
            continue
        assert bool(decoded.isfinite().all())


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
        else:
            w = weights(k, ROWS, k)
            assert error(w, format.encode(w).decode()) < error(w, torch.zeros_like(w))
    for shape in ((4,), (2, 3, format.block), (0, format.block), (3, 0)):
        with pytest.raises(FormatError):
            format.encode(torch.zeros(shape))


# What a fit is worth


def search_beats_the_plain_rule(format: Format) -> None:
    """Never worse, and better for most seeds (unless the format has nothing to choose)."""
    pairs = []
    for seed in range(4):
        w = sample(format, seed)
        pairs.append([error(w, format.encode(w, None, search).decode()) for search in (True, False)])
    assert all(searched <= plain * (1 + SUM_ERROR) for searched, plain in pairs)
    assert sum(searched < plain for searched, plain in pairs) >= 3


def importance_pays(format: Format) -> None:
    """Fits know what counts: on average over seeds, for importances that spread over some decades."""
    ratios = []
    for seed in range(4):
        w = sample(format, seed)
        importance = torch.randn(w.shape[1], generator=torch.Generator().manual_seed(seed)).mul(3).exp()
        told, untold = (
            error(w, format.encode(w, known).decode(), importance) for known in (importance, None)
        )
        ratios.append(1.0 if told == untold else told / untold)
    if isinstance(format, Microscaling):  # a power of two has hardly any choice
        assert max(ratios) <= 1.0 + SUM_ERROR
    else:
        assert sum(ratios) < len(ratios)


def importance_may_be_zero(format: Format) -> None:
    """No importance at all is even importance; dead columns leave the live ones represented."""
    w = sample(format)
    plain = format.encode(w)
    assert same_planes(format, format.encode(w, torch.zeros(w.shape[1])), plain)
    assert same_planes(format, format.encode(w, torch.zeros_like(w)), plain)
    live = torch.zeros(w.shape[1])
    live[: w.shape[1] // 2 : 2] = 1.0
    decoded = format.encode(w, live).decode()
    assert bool(decoded.isfinite().all())
    assert error(w, decoded, live) < error(w, torch.zeros_like(w), live)


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
    constants_survive,
    tiny_weights_stay_finite,
    huge_weights_stay_finite_or_raise,
    not_finite_raises,
    odd_shapes_work_or_raise,
    search_beats_the_plain_rule,
    importance_pays,
    importance_may_be_zero,
    bad_importance_raises,
    encoding_is_deterministic,
)
