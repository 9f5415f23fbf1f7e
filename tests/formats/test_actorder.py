"""Act order: which columns share a scale, and what that is worth to error feedback."""

from importlib import import_module
from itertools import product

import pytest
import torch

from fewbits.algorithms import descend, gptq, hqq
from fewbits.algorithms.hessian import loss
from fewbits.calibrate.stats import Stats
from fewbits.core.pack import unpack
from fewbits.errors import FormatError
from fewbits.formats import FORMATS
from fewbits.formats.lossless import convert_lossless, lossless_equivalents
from fewbits.qtensor import QTensor

ORDERED = ["int4_g32_actorder", "int4_g32_asym_actorder", "int3_g64_asym_actorder_bf16"]


def weights(n: int = 6, k: int = 160, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) + 0.2


def importance(k: int = 160, seed: int = 1) -> torch.Tensor:
    return torch.randn(k, generator=torch.Generator().manual_seed(seed)).exp()


@pytest.mark.parametrize("name", ORDERED)
def test_without_importance_it_is_the_format_in_order(name):
    format, w = FORMATS.get(name), weights()
    q, plain = format.encode(w), format.plain.encode(w)
    assert q.planes["g_idx"].tolist() == [[j // format.columns for j in range(160)]]
    assert all(torch.equal(q.planes[plane], value) for plane, value in plain.planes.items())
    assert torch.equal(q.decode(), plain.decode())


@pytest.mark.parametrize("name", ORDERED)
def test_columns_of_like_importance_share_a_scale(name):
    """By hand: sorted, encoded in order, put back. The last group is short and holds what counts least."""
    format, w, counts = FORMATS.get(name), weights(), importance()
    q = format.encode(w, counts)
    order = sorted(range(160), key=lambda j: -float(counts[j]))
    assert [int(q.planes["g_idx"][0, j]) for j in order] == [j // format.columns for j in range(160)]
    by_hand = format.plain.encode(w[:, order].contiguous(), counts[order]).decode()
    assert torch.equal(q.decode()[:, order], by_hand)


def test_importance_of_single_weights_counts_by_columns():
    format, w = FORMATS.get("int4_g32_actorder"), weights()
    each = importance() * torch.rand(6, 1, generator=torch.Generator().manual_seed(2))
    assert torch.equal(format.encode(w, each).planes["g_idx"], format.encode(w, importance()).planes["g_idx"])


def of_any_index(name: str, index: torch.Tensor, n: int = 6) -> QTensor:
    """A weight as another tool may have written it."""
    format, k = FORMATS.get(name), len(index)
    return format.with_index(format.plain.encode(weights(n, k)), index)


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize("index", ["random", "all in one", "backwards"])
def test_any_index_decodes(name, index):
    """Also with groups of different sizes and of no column, against the formula."""
    format, k = FORMATS.get(name), 160
    count = -(-k // format.columns)
    g_idx = {
        "random": torch.randint(0, count, (k,), generator=torch.Generator().manual_seed(3)),
        "all in one": torch.full((k,), 1),
        "backwards": (torch.arange(k) // format.columns).flip(0),
    }[index]
    q = of_any_index(name, g_idx)
    codes, scale = unpack(q.planes["codes"], format.plain.bits, k).float(), q.planes["scale"].float()
    zero = torch.full(scale.shape, 2.0 ** (format.plain.bits - 1))
    if "asym" in name:
        zero = unpack(q.planes["zero"], format.plain.bits, count).float()
    expected = torch.empty(6, k)
    for i, j in product(range(6), range(k)):
        g = int(g_idx[j])
        expected[i, j] = scale[i, g] * (codes[i, j] - zero[i, g])
    assert torch.equal(q.decode(), expected)


@pytest.mark.parametrize("name", ORDERED)
def test_any_index_can_be_descended_on(name):
    """From codes that were never meant for these groups: the loss falls, the groups stay."""
    groups = -(-96 // FORMATS.get(name).columns)
    index = torch.randint(0, groups, (96,), generator=torch.Generator().manual_seed(4))
    q, w, stats = of_any_index(name, index), weights(6, 96, 5), inputs(96)
    better = descend(q, w, stats)
    before, after = (loss(part.decode(), w, stats.hessian).sum() for part in (q, better))
    assert after < 0.5 * before and torch.equal(better.planes["g_idx"], q.planes["g_idx"])


@pytest.mark.parametrize("group", [-1, 5])
def test_a_group_that_does_not_exist_is_named(group):
    index = torch.arange(160) // 32
    index[7] = group
    q = of_any_index("int4_g32_actorder", index)
    with pytest.raises(FormatError, match=f"g_idx names group {group}, there are 5"):
        q.decode()


def test_rows_move_and_columns_are_not_joined():
    q = FORMATS.get("int4_g32_actorder").encode(weights(), importance())
    order = torch.tensor([4, 0, 2])
    assert torch.equal(q.take_rows(order).decode(), q.decode()[order])
    with pytest.raises(FormatError, match="'g_idx' has cells of several rows"):
        QTensor.join_columns([q, q])
    assert q.format.column_block(160) is None


def test_names():
    assert FORMATS.get("int4_g64_actorder_f16").name == "int4_g64_actorder"
    assert FORMATS.get("int3_g64_asym_actorder_bf16").plain.name == "int3_g64_asym_bf16"
    assert FORMATS.get("int4_g128").ordered is None


# Lossless conversion


def test_columns_in_order_are_the_format_in_order():
    format = FORMATS.get("int4_g32_actorder")
    rising, moved = format.encode(weights()), format.encode(weights(), importance())
    assert next(lossless_equivalents(format.name)) == "int4_g32"
    for to in ("int4_g32", "q4_0", "int4_g32_asym"):
        plain = convert_lossless(rising, FORMATS.get(to))
        assert plain is not None and torch.equal(plain.decode(), rising.decode())
        assert convert_lossless(moved, FORMATS.get(to)) is None
        assert to in list(lossless_equivalents(format.name))
    back = convert_lossless(convert_lossless(rising, FORMATS.get("int4_g32")), format)
    assert all(torch.equal(back.planes[name], plane) for name, plane in rising.planes.items())
    assert not [name for name in lossless_equivalents("int4_g32") if "actorder" in name]


# What it is worth


def inputs(k: int, seed: int = 0, uneven: float = 0.4) -> Stats:
    """Correlated inputs, the columns of which differ in size: by a factor of 5 at two standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5
    x = torch.randn(2 * k, k, generator=generator) @ mix + 0.3 * torch.randn(2 * k, k, generator=generator)
    return Stats.of(x * (uneven * torch.randn(k, generator=generator)).exp())


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_gains_by_it(bits):
    """On each of four seeds no worse than int4_g64 on a static grid, nor than as it is by default."""
    for seed in range(4):
        w, stats = 0.1 * weights(32, 384, seed), inputs(384, seed)

        def error(name, w=w, stats=stats, **options):
            return float(loss(gptq(w, FORMATS.get(name), stats, **options).decode(), w, stats.hessian).sum())

        ordered = error(f"int{bits}_g64_actorder")
        assert ordered < error(f"int{bits}_g64", fit="static")
        assert ordered < 0.97 * error(f"int{bits}_g64")


def test_gptq_takes_columns_by_the_diagonal_of_the_hessian():
    """Which is the input's alone: weights that share it have one g_idx, whatever they are themselves."""
    stats, format = inputs(160), FORMATS.get("int4_g32_actorder")
    order = stats.hessian.diagonal().argsort(descending=True, stable=True)
    for seed, fit in product(range(2), ("searched", "dynamic", "static")):
        index = gptq(weights(6, 160, seed), format, stats, fit=fit).planes["g_idx"][0]
        assert index[order].tolist() == [j // 32 for j in range(160)]


def test_gptq_a_few_rows_at_a_time(monkeypatch):
    """Sums of other lengths, so not the same bits, but as good; one g_idx."""
    format, w, stats = FORMATS.get("int4_g32_asym_actorder"), weights(24), inputs(160)
    whole = gptq(w, format, stats)
    monkeypatch.setattr(import_module("fewbits.algorithms.gptq"), "PIECE", 8 * 160)
    parts = gptq(w, format, stats)
    errors = [float(loss(q.decode(), w, stats.hessian).sum()) for q in (whole, parts)]
    assert torch.equal(whole.planes["g_idx"], parts.planes["g_idx"])
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_hqq_has_no_importance_and_keeps_columns_in_order():
    q, plain = (hqq(weights(), FORMATS.get(name)) for name in ("int4_g32_actorder", "int4_g32"))
    assert torch.equal(q.decode(), plain.decode())
