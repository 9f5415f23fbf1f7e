"""What every grid promises to algorithms and file types: codes and parameters apart, and back again.

Promises as in format_contract.py: functions that take a format and assert. test_formats.py crosses
them with the registry.
"""

import torch

from fewbits.formats.base import Format
from fewbits.qtensor import QTensor
from tests.contracts.samples import ROWS, columns_of, every_code, same_planes, sample, uneven, weights


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
    """Bit for bit, one f32 multiplication and, where there is an offset, one addition."""
    for k in (columns_of(format), columns_of(format) + format.block * (format.block < 32)):
        w = weights(0, ROWS, k)
        grid = format.fit(w, uneven(k))
        codes = grid.round(w)
        scale, offset = grid.groups(ROWS)
        assert scale.shape == (ROWS, -(-k // grid.group)) and scale.dtype == torch.float32
        value = grid.spread(scale, k) * grid.level(codes)
        value = value if offset is None else value + grid.spread(offset, k)
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
    scale, offset = grid.groups(ROWS)
    for weight in (None, torch.rand(scale.shape, generator=torch.Generator().manual_seed(0))):
        assert same_planes(
            format, format.pack(grid.refitted(scale, offset, weight), codes), format.pack(grid, codes)
        )


def parameters_make_the_grid(format: Format) -> None:
    """`replaced` with the same parameters is the same grid."""
    w = sample(format)
    grid = format.fit(w, uneven(w.shape[1]))
    codes, parameters = grid.round(w), grid.parameters()
    assert torch.equal(grid.replaced(parameters).value(codes), grid.value(codes))
    assert all(stored.ndim == 2 and stored.dtype == torch.float32 for stored in parameters.values())


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
    parameters_make_the_grid,
    atoms_stand_alone,
)
