"""Columns rounded in turn: the C++ core equals its reference bit for bit, for every format."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewbits import core
from fewbits.algorithms.columns import LEVELS, quantize_columns, quantize_columns_reference
from fewbits.errors import KernelError
from fewbits.formats import FORMATS
from fewbits.formats.rounding import rounding_of

needs_core = pytest.mark.skipif(not core.available(), reason="the C++ core is not built")
ROWS = (5, 33)  # less than the sixteen that the core takes at once, and two of them with one more


def problem(k: int, n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """State, coupling, pivot and old values of k columns of n rows, of the size that weights have."""
    g = torch.Generator().manual_seed(seed)
    return {
        "state": torch.randn(k, n, generator=g) * 0.05,
        "coupling": torch.randn(k, k, generator=g) * 0.3,
        "pivot": torch.rand(k, generator=g) + 0.5,
        "old": torch.randn(k, n, generator=g) * 0.05,
        "order": torch.randperm(k, generator=g),
    }


def compare_columns(
    run: Callable[..., Any] = quantize_columns,
    most: int = LEVELS,
    rows: tuple[int, ...] = ROWS,
    widths: tuple[int, ...] = (1, 64),
) -> int:
    """`run` for every format, number of rows, and way to move; -> how many formats a kernel rounds for."""
    rounded = 0
    for name in sorted(FORMATS):
        fmt = FORMATS.get(name)
        for n in rows:
            w = torch.randn(n, 256, generator=torch.Generator().manual_seed(n)) * 0.05
            grid = fmt.fit(w, search=False)
            known = rounding_of(grid, n, torch.arange(256), most) is not None
            rounded += known and n == rows[0]
            if not known:
                continue
            for k in widths:
                given = problem(k, n)
                columns = torch.randperm(256, generator=torch.Generator().manual_seed(k))[:k]
                common = (grid, given["state"], given["coupling"], columns)
                for how in ({"pivot": given["pivot"]}, {"old": given["old"]}):
                    found = run(*common, **how), quantize_columns_reference(*common, **how)
                    for fast, slow in zip(*found, strict=True):
                        assert fast.shape == (k, n) and torch.equal(fast.to(slow.dtype), slow), (
                            name, n, k, list(how))  # fmt: skip
    return rounded


@needs_core
def test_core_equals_reference_bit_for_bit() -> None:
    """With the best instruction set of this machine; tests/test_core.py runs the same with every one."""
    assert compare_columns() > len(list(FORMATS)) / 2


@needs_core
def test_any_number_of_threads_and_what_is_not_contiguous_give_the_same() -> None:
    fmt, given = FORMATS.get("q4_k"), problem(256, 300)
    grid = fmt.fit(given["state"].T.contiguous())
    wide = torch.zeros(512, 512)
    wide[:256, :512:2] = given["coupling"]
    turned = given["state"].T.contiguous().T
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for state, coupling in ((given["state"], given["coupling"]), (turned, wide[:256, :512:2])):
                found.append(quantize_columns(grid, state, coupling, given["order"], given["pivot"]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_core
def test_arguments_are_not_changed() -> None:
    given = problem(64, 8)
    grid = FORMATS.get("int4_g64").fit(given["state"].T.contiguous())
    before = {name: value.clone() for name, value in given.items()}
    quantize_columns(grid, given["state"], given["coupling"], given["order"], given["pivot"])
    assert all(torch.equal(given[name], value) for name, value in before.items())


CHANGES = {
    "state": "the state as a contiguous float32",
    "coupling": r"coupling as a contiguous float32 tensor \(64, 64\) on the CPU, not .* \(64, 63\)",
    "pivot": r"pivots .* \(64,\)",
    "old": r"old values .* \(64, 8\)",
    "both": "either pivots or old values",
    "neither": "either pivots or old values",
    "group": "not one of 2",
    "scale": r"scales as a .* not Tensor torch.float32 \(2, 7\)",
    "levels": r"boundaries .* \(2,\) on",
}


@needs_core
@pytest.mark.parametrize("change", CHANGES)
def test_arrays_that_do_not_fit_one_another_are_refused(change: str) -> None:
    k, n = 64, 8
    given = problem(k, n)
    grid = FORMATS.get("int4_g32").fit(given["state"].T.contiguous())
    rounding = rounding_of(grid, n, torch.arange(k), LEVELS)
    assert rounding is not None
    state, coupling, pivot, old = given["state"], given["coupling"], given["pivot"], None
    if change == "coupling":
        coupling = coupling[:, :-1].contiguous()
    elif change == "pivot":
        pivot = pivot[:-1]
    elif change == "old":
        pivot, old = None, given["old"][:, :-1]
    elif change == "both":
        old = given["old"]
    elif change == "neither":
        pivot = None
    elif change == "group":
        rounding = replace(rounding, group=rounding.group + 1)
    elif change == "scale":
        rounding = replace(rounding, scale=rounding.scale[:, :-1].contiguous())
    elif change == "levels":
        rounding = replace(rounding, table=(torch.zeros(3), torch.zeros(3), torch.zeros(3)))
    elif change == "state":
        state = state.double()
    with pytest.raises(KernelError, match=CHANGES[change]):
        core.quantize_columns(state, coupling, rounding, pivot, old)
