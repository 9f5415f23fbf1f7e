"""The IQ types: lattices, signs bound together, and what the search is worth."""

import itertools

import pytest
import torch

from fewbits.errors import FormatError
from fewbits.formats.base import FORMATS
from fewbits.formats.iq import IQ_TYPES, Iq

EVEN = [fmt for fmt in IQ_TYPES if fmt.signs == "even"]


def names(types):
    return {"argvalues": types, "ids": [fmt.name for fmt in types]}


@pytest.mark.parametrize("fmt", **names(IQ_TYPES))
def test_points_are_those_of_their_places(fmt: Iq) -> None:
    lattice = fmt.lattice
    assert torch.equal(lattice.index(lattice.points), torch.arange(len(lattice.points)))
    assert int((lattice.places >= 0).sum()) == len(lattice.points)


@pytest.mark.parametrize("fmt", **names(IQ_TYPES))
def test_points_are_in_order(fmt: Iq) -> None:
    """The core, which searches by halves, finds the first of equal points for that reason."""
    first, last = fmt.lattice.halves
    assert bool(((last * len(fmt.lattice.points) ** 2 + first).diff() > 0).all())


@pytest.mark.parametrize("fmt", **names(IQ_TYPES))
def test_search_finds_the_cheapest_of_all_points(fmt: Iq) -> None:
    """f32 costs of at most eight terms: off by a few ulps of the largest."""
    generator = torch.Generator().manual_seed(0)
    lattice = fmt.lattice
    x, w = (torch.rand(50, lattice.dim, generator=generator) for _ in range(2))
    scale = torch.rand(50, generator=generator) / lattice.levels.abs().max()
    values = lattice.levels[lattice.points].double()
    every = (w[:, None] * (values[None] * scale[:, None, None] - x[:, None]).square()).sum(2)
    place, _ = lattice.search(w * x, w, scale)
    chosen = every.gather(1, place[:, None])[:, 0]
    assert bool((chosen <= every.amin(1) + 2**-20).all())


@pytest.mark.parametrize("fmt", **names(IQ_TYPES))
def test_codes_that_are_no_points_are_refused(fmt: Iq) -> None:
    w = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    grid = fmt.fit(w)
    codes = grid.round(w)
    stray = (fmt.lattice.places < 0).nonzero()[0] // len(fmt.lattice.levels) ** torch.arange(fmt.lattice.dim)
    codes[1, : fmt.lattice.dim] = (stray % len(fmt.lattice.levels)).to(torch.uint8)
    with pytest.raises(FormatError, match=f"round {fmt.vector} columns together"):
        fmt.pack(grid, codes)


@pytest.mark.parametrize("fmt", **names(EVEN))
def test_an_odd_number_of_signs_is_refused_and_never_chosen(fmt: Iq) -> None:
    w = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    grid = fmt.fit(w)
    codes = grid.round(w)
    minus = (codes >> fmt.level_bits).long().unflatten(1, (-1, 8)).sum(2)
    assert not bool((minus % 2).any())
    codes[0, 0] ^= 1 << fmt.level_bits
    with pytest.raises(FormatError, match="not points"):
        fmt.pack(grid, codes)


@pytest.mark.parametrize("fmt", **names(EVEN))
def test_the_flipped_sign_costs_little_more_than_the_best(fmt: Iq) -> None:
    """One flip is tried, not eight. Measured: 0.1 to 2 % over the best of all eight for Gaussian weights."""
    w = torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    grid = fmt.fit(w)
    x = w.unflatten(1, (-1, 8))
    odd = (x < 0).sum(2) % 2 == 1
    tried = []
    for flips in itertools.chain([()], ((i,) for i in range(8))):
        size = x.abs().clone()
        size[..., flips] *= -1  # what stays even is rounded as it is: its signs come from the sizes
        allowed = odd if flips else ~odd
        level = grid.scale.repeat_interleave(fmt.group, 1).unflatten(1, (-1, 8))
        flat = [part.reshape(-1, fmt.lattice.dim) for part in (size, torch.ones_like(size))]
        each = level.reshape(-1, fmt.lattice.dim)[:, 0]
        place, _ = fmt.lattice.search(*flat, each)
        value = each[:, None] * fmt.lattice.levels[fmt.lattice.points[place]]
        far = (value - flat[0]).square().reshape(*x.shape).sum(2)
        tried.append(torch.where(allowed, far, torch.inf))
    best = torch.stack(tried).amin(0).sum()
    ours = (grid.value(grid.round(w)) - w).square().sum()
    assert best * (1 - 1e-5) <= ours <= 1.02 * best


def test_all_seven_are_registered() -> None:
    assert {f"iq{rest}" for rest in ("1_s", "1_m", "2_xxs", "2_xs", "2_s", "3_xxs", "3_s")} <= set(FORMATS)
