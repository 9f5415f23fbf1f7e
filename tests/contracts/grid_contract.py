"""What every grid promises to algorithms and file types: codes and parameters apart, and back again.

Promises as in format_contract.py: functions that take a format and assert. test_formats.py crosses
them with the registry.
"""

import torch

from fewbits.formats.base import Format, Grid
from fewbits.formats.codebook import NestedGrid
from fewbits.formats.floats import PowerGrid, TwoLevelGrid
from fewbits.qtensor import QTensor
from tests.contracts.format_contract import (
    ROWS,
    SUM_ERROR,
    columns_of,
    error,
    every_code,
    same_planes,
    sample,
    uneven,
    weights,
)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal although some are NaN."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def unpack_inverts_pack(format: Format) -> None:
    """The importance by which the codes of a vector are chosen is not stored."""
    w = sample(format)
    for known in (None, uneven(w.shape[1])):
        grid = format.fit(w, known)
        codes = every_code(grid, *w.shape)
        q = format.pack(grid, codes)
        again, unpacked = format.unpack(q)
        assert same_bytes(codes, unpacked)
        twice = format.pack(again, unpacked)
        assert all(same_bytes(twice.planes[plane.name], q.planes[plane.name]) for plane in format.planes)
        if known is None or format.vector == 1:
            assert torch.equal(again.round(w), grid.round(w))


def value_is_linear_in_step_and_base(format: Format) -> None:
    """Bit for bit, one f32 multiplication and, where there is a base, one addition."""
    for k in (columns_of(format), columns_of(format) + format.block * (format.block < 32)):
        w = weights(0, ROWS, k)
        grid = format.fit(w, uneven(k))
        codes = grid.round(w)
        step, base = grid.groups(ROWS)
        assert step.shape == (ROWS, -(-k // grid.group)) and step.dtype == torch.float32
        value = grid.spread(step, k) * grid.level(codes)
        value = value if base is None else value + grid.spread(base, k)
        assert torch.equal(value, grid.value(codes))
        for columns in (slice(5, 6), slice(31, 200), slice(3, 250, 7)):
            part = codes[:, columns]
            assert torch.equal(grid.level(part, columns), grid.level(codes)[:, columns])


def columns_belong_to_groups(format: Format) -> None:
    """Each to one; what is summed over groups and spread again is what each column's group has."""
    k = columns_of(format)
    grid = format.fit(sample(format), uneven(k))
    group, g = grid.group_of(torch.arange(k)), grid.groups(ROWS)[0].shape[1]
    assert group.shape == (k,) and 0 <= int(group.min()) <= int(group.max()) < g
    members = grid.members(k)
    assert len(members) == g
    for j, inside in enumerate(members):
        assert torch.equal(torch.arange(k)[inside], torch.where(group == j)[0])
    x = torch.arange(1.0, 2 * k + 1).reshape(2, k)  # whole numbers, whose sums are exact
    sums = torch.stack([x[:, group == j].sum(1) for j in range(g)], 1)
    assert torch.equal(grid.sums(x), sums) and torch.equal(grid.spread(sums, k), sums[:, group])


def refitting_to_its_own_groups_changes_nothing(format: Format) -> None:
    """Also for parameters in two levels, which are coded anew only where that comes nearer."""
    w = sample(format)
    grid = format.fit(w, uneven(w.shape[1]))
    codes = grid.round(w)
    step, base = grid.groups(ROWS)
    for weight in (None, torch.rand(step.shape, generator=torch.Generator().manual_seed(0))):
        assert same_planes(
            format, format.pack(grid.refitted(step, base, weight), codes), format.pack(grid, codes)
        )


def storing_error(format: Format, grid: Grid) -> float:
    """How far a step may be stored from where it is wanted, relative to the steps of its block."""
    if isinstance(grid, PowerGrid) or "exponent" in getattr(grid, "values", ()):
        return 1 / 3  # 1.5 * 2^e becomes 2^e
    if isinstance(grid, TwoLevelGrid):
        return 2**-4  # three bits of mantissa
    if isinstance(grid, NestedGrid):
        return 1 / 64  # levels in a decade
    scale_range = getattr(format, "scale_range", None)
    if scale_range:  # half a unit; the widest group takes all units, a typical one at least half
        return 1 / scale_range[1]
    stored = {plane.dtype for plane in format.planes} & {torch.float16, torch.bfloat16, torch.float32}
    return torch.finfo(min(stored, key=lambda t: t.itemsize)).eps / 2 if stored else 2**-11


def refitting_comes_near(format: Format) -> None:
    """Half-way to the groups of another weight: as near as steps and bases can be stored. A base also
    makes good what its step missed, which may move it as much again."""
    grid = format.fit(sample(format))
    (step, base), (far, deep) = (part.groups(ROWS) for part in (grid, format.fit(sample(format, 1))))
    step = (step + far) / 2
    base = None if base is None or deep is None else (base + deep) / 2
    got, got_base = grid.refitted(step, base).groups(ROWS)
    bound = storing_error(format, grid) * (1 + 2**-20)
    assert (got - step).norm() <= bound * step.norm()
    assert (base is None) == (got_base is None)
    if base is not None and got_base is not None:
        assert (got_base - base).norm() <= 2 * bound * base.norm()


def refitting_in_closed_form_pays(format: Format) -> None:
    """For the codes of the plain rule, the least-squares line of each group, stored, has a lower error."""
    before, after = [], []
    for seed in range(3):
        w = sample(format, seed)
        grid = format.fit(w, uneven(w.shape[1]), search=False)
        codes = grid.round(w)
        step, base, weight = closed_form(w, grid, codes)
        before.append(error(w, grid.value(codes)))
        after.append(error(w, grid.refitted(step, base, weight).value(codes)))
    assert all(new <= old * (1 + SUM_ERROR) for new, old in zip(after, before, strict=True))
    assert sum(after) < sum(before) or not format.fit(sample(format)).parameters()


def closed_form(
    w: torch.Tensor, grid: Grid, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The least-squares step and base of each group for these codes, and what an error of the step costs."""
    x, v, step = w.double(), grid.level(codes).double(), grid.groups(ROWS)[0]
    index = grid.group_of(torch.arange(w.shape[1]))

    def total(part: torch.Tensor) -> torch.Tensor:
        return torch.zeros(step.shape, dtype=torch.float64).index_add_(1, index, part)

    xv, vv = total(x * v), total(v * v)
    if grid.groups(ROWS)[1] is None:
        return torch.where(vv > 0, xv / vv, step).float(), None, vv.float()
    count, sx, sv = total(torch.ones_like(x)), total(x), total(v)
    vv, xv = vv - sv * sv / count, xv - sx * sv / count
    slope = torch.where(vv > 0, xv / vv, step)
    return slope.float(), ((sx - slope * sv) / count).float(), vv.float()


def parameters_carry_gradients(format: Format) -> None:
    """`replaced` with the same parameters is the same grid; along a direction of parameters the gradient
    of sum(c * value) is the difference of values, which are linear in each parameter."""
    w = sample(format)
    grid = format.fit(w, uneven(w.shape[1]))
    codes = grid.round(w)
    parameters = grid.parameters()
    assert torch.equal(grid.replaced(parameters).value(codes), grid.value(codes))
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(w.shape, generator=generator)
    for name, stored in parameters.items():
        assert stored.ndim == 2 and stored.dtype == torch.float32
        leaf = stored.clone().requires_grad_()
        (c * grid.replaced({**parameters, name: leaf}).value(codes)).sum().backward()
        assert leaf.grad is not None and bool(leaf.grad.isfinite().all()) and bool(leaf.grad.any())
        by = stored.abs().mean() * torch.randn(stored.shape, generator=generator)
        ends = [
            (c * grid.replaced({**parameters, name: stored + h * by}).value(codes)).double() for h in (1, -1)
        ]
        moved, rate = float((ends[0] - ends[1]).sum() / 2), float((leaf.grad.double() * by).sum())
        # Each product and sum is off by an ulp of its terms at the most.
        assert abs(moved - rate) <= 2**-20 * float(sum(end.abs().sum() for end in ends))


def atoms_stand_alone(format: Format) -> None:
    k = columns_of(format)
    width = format.column_block(k)
    if width is None:
        assert any(
            p.flat is not None or p.rows != 1 or p.columns is None or k % p.columns for p in format.planes
        )
        return
    w = weights(0, ROWS, max(k, 2 * width))
    importance = torch.rand(w.shape, generator=torch.Generator().manual_seed(0))
    for known in (None, importance):
        parts = [
            format.encode(w[:, at : at + width], None if known is None else known[:, at : at + width])
            for at in range(0, w.shape[1], width)
        ]
        assert same_planes(format, QTensor.join_columns(parts), format.encode(w, known))


PROMISES = (
    unpack_inverts_pack,
    value_is_linear_in_step_and_base,
    columns_belong_to_groups,
    refitting_to_its_own_groups_changes_nothing,
    refitting_comes_near,
    refitting_in_closed_form_pays,
    parameters_carry_gradients,
    atoms_stand_alone,
)
