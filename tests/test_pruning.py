"""Pruning: the masks of the papers, computed in another way; least squares bounds what is left."""

from itertools import combinations

import pytest
import torch
from torch.sparse import _semi_structured_conversions as semi_structured

from fewbits.algorithms import gptq, rtn
from fewbits.algorithms.hessian import DAMP, loss
from fewbits.algorithms.prune import PATTERNS, PRUNERS, Pruning, kept, quantize_pruned
from fewbits.calibrate.stats import Stats
from fewbits.dtypes import BF16, F16, F32
from fewbits.errors import CalibrationError, FormatError, PlanError
from fewbits.formats import FORMATS
from fewbits.formats.plain import Plain
from fewbits.formats.zero import holds_zero
from tests.contracts.algorithm_contract import columns_of

FLOAT = Plain.of(F32)
# Codebooks and lattices whose levels, by their published tables, are all beside 0.
WITHOUT_ZERO = {"iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_s", "iq1_m"}


def sample(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, Stats]:
    """A weight, and the statistics of inputs that are correlated, of columns of different size."""
    make = torch.Generator().manual_seed(seed)
    mixing = 0.3 * torch.randn(k, k, generator=make) / k**0.5 + torch.diag(
        0.2 + torch.rand(k, generator=make)
    )
    x = torch.randn(8 * k, k, generator=make) @ mixing
    return torch.randn(n, k, generator=make), Stats(
        len(x), x.abs().amax(0), x.square().mean(0), x.T @ x / len(x)
    )


def damped(stats: Stats) -> torch.Tensor:
    assert stats.hessian is not None
    h = stats.hessian.double()
    return h + DAMP * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def least_squares(w: torch.Tensor, keep: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The kept weights of each row that leave the least output error, solved row by row in f64."""
    best = torch.zeros_like(w, dtype=torch.float64)
    for i, mask in enumerate(keep):
        inside = hessian[mask][:, mask]
        best[i, mask] = torch.linalg.solve(inside, hessian[mask] @ w[i].double())
    return best


# ---- which weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.87])
def test_magnitude_is_that_of_torch(sparsity: float) -> None:
    from torch.nn.utils import prune

    w, _ = sample(24, 40)
    layer = torch.nn.Linear(40, 24, bias=False)
    layer.weight.data.copy_(w)
    prune.l1_unstructured(layer, "weight", amount=sparsity)
    assert torch.equal(kept(w, Pruning(sparsity, "magnitude")), layer.weight_mask.bool())


def test_wanda_compares_in_each_row() -> None:
    w, stats = sample(6, 20)
    norms = stats.mean_square.sqrt().tolist()
    for pattern in ("unstructured", "row"):
        keep = kept(w, Pruning(0.3, "wanda", pattern), stats)
        for row, mask in zip(w.tolist(), keep.tolist(), strict=True):
            by_score = sorted(range(20), key=lambda j: abs(row[j]) * norms[j])
            assert {j for j in range(20) if not mask[j]} == set(by_score[:6])


def published(
    w: torch.Tensor, stats: Stats, share: float, group: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT's algorithm 1 as printed, in f64, in blocks of 128 columns -> what is kept, the weights."""
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(stats)), upper=True)
    w, keep = w.double().clone(), torch.ones_like(w, dtype=torch.bool)
    n, k = w.shape
    for start in range(0, k, 128):
        stop = min(start + 128, k)
        for j in range(start, stop):
            if group and j % group == 0:
                score = w[:, j : j + group] ** 2 / upper.diagonal()[j : j + group] ** 2
                keep[:, j : j + group] = score.argsort(1).argsort(1) >= group // 2
            elif not group and j == start:
                score = (w[:, start:stop] ** 2 / upper.diagonal()[start:stop] ** 2).flatten()
                dropped = score.argsort()[: round(n * stop * share) - round(n * start * share)]
                keep[:, start:stop] = torch.ones_like(score).bool().index_fill(0, dropped, False).view(n, -1)
            error = torch.where(keep[:, j], 0.0, w[:, j]) / upper[j, j]
            w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return keep, w * keep


@pytest.mark.parametrize(
    ("share", "pattern"), [(0.5, "unstructured"), (0.7, "unstructured"), (0.5, "2:4"), (0.5, "4:8")]
)
def test_sparsegpt_is_the_published_algorithm(share: float, pattern: str) -> None:
    w, stats = sample(12, 328)
    expected, weights = published(w, stats, share, PATTERNS[pattern])
    keep = kept(w, Pruning(share, "sparsegpt", pattern), stats)
    assert torch.equal(keep, expected)
    # its values: those of one pass in the order of columns; ours are taken in a better order, and descend
    once = quantize_pruned(gptq, w, FLOAT, stats, keep, {}).decode()
    assert loss(once, w, stats.hessian).sum() < loss(weights.float(), w, stats.hessian).sum()


def test_sparsegpt_without_correlations_is_magnitude_times_norm() -> None:
    w, stats = sample(16, 64)
    diagonal = Stats(stats.count, stats.absmax, stats.mean_square, torch.diag(stats.mean_square))
    keep = kept(w, Pruning(0.5, "sparsegpt", "2:4"), diagonal, damp=0.0)
    score = w.abs() * stats.mean_square.sqrt()
    for i, j in ((i, j) for i in range(16) for j in range(0, 64, 4)):
        best = max(combinations(range(j, j + 4), 2), key=lambda pair: sum(score[i, list(pair)] ** 2))
        assert torch.where(keep[i, j : j + 4])[0].tolist() == [c - j for c in best]


@pytest.mark.parametrize("prune", PRUNERS)
def test_patterns(prune: str) -> None:
    w, stats = sample(32, 256)
    assert int(kept(w, Pruning(0.75, prune), stats).sum()) == 32 * 64
    assert kept(w, Pruning(0.25, prune, "row"), stats).sum(1).tolist() == [192] * 32
    assert set(kept(w, Pruning(0.5, prune, "4:8"), stats).view(32, -1, 8).sum(2).flatten().tolist()) == {4}
    half = (w * kept(w, Pruning(0.5, prune, "2:4"), stats)).half()
    packed = semi_structured.sparse_semi_structured_from_dense_cutlass(half)
    assert torch.equal(semi_structured.sparse_semi_structured_to_dense_cutlass(*packed), half)


# ---- what the others become ---------------------------------------------------------------------


def test_kept_weights_approach_least_squares_from_above() -> None:
    w, stats = sample(8, 32)
    hessian = damped(stats)
    for prune in PRUNERS:
        keep = kept(w, Pruning(0.5, prune), stats)
        best = loss(least_squares(w, keep, hessian), w, hessian)
        found = loss(quantize_pruned(gptq, w, FLOAT, stats, keep, {}).decode(), w, hessian)
        descended = quantize_pruned(gptq, w, FLOAT, stats, keep, {"descent": 60})
        assert (found >= best * (1 - 1e-5)).all()
        assert found.sum() < 1.1 * best.sum()
        assert loss(descended.decode(), w, hessian).sum() < 1.005 * best.sum()


def test_sparsegpt_beats_the_others_and_no_mask_beats_the_best_of_all() -> None:
    w, stats = sample(12, 8)
    hessian = damped(stats)
    pairs = [[j in pair for j in range(4)] for pair in combinations(range(4), 2)]
    masks = torch.tensor([[*a, *b] for a in pairs for b in pairs])
    each = torch.stack(
        [loss(least_squares(w, mask.expand(12, -1), hessian), w, hessian) for mask in masks]
    )  # fmt: skip
    lost = {}
    for prune in PRUNERS:
        keep = kept(w, Pruning(0.5, prune, "2:4"), stats)
        lost[prune] = loss(quantize_pruned(gptq, w, FLOAT, stats, keep, {}).decode(), w, hessian)
        assert (lost[prune] >= each.amin(0) * (1 - 1e-5)).all()
    assert lost["sparsegpt"].sum() < 1.3 * each.amin(0).sum()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("format", [FLOAT, FORMATS.get("int4_g64")], ids=lambda format: format.name)
def test_output_error_of_the_three(format, pattern: str) -> None:
    w, stats = sample(64, 256)
    rows = {}
    for prune, algorithm in (("sparsegpt", gptq), ("wanda", gptq), ("wanda", rtn), ("magnitude", rtn)):
        keep = kept(w, Pruning(0.5, prune, pattern), stats)
        q = quantize_pruned(algorithm, w, format, stats, keep, {})
        rows[prune, algorithm.__name__] = float(loss(q.decode(), w, stats.hessian).sum())
    assert [*rows.values()] == sorted(rows.values())


# ---- zeros in every format ----------------------------------------------------------------------


def test_formats_that_hold_zero() -> None:
    assert {name for name, format in FORMATS.items() if not holds_zero(format)} == WITHOUT_ZERO


@pytest.mark.parametrize("algorithm", [gptq, rtn], ids=lambda algorithm: algorithm.__name__)
@pytest.mark.parametrize("name", [*(name for name in FORMATS if name not in WITHOUT_ZERO), "f16", "bf16"])
def test_pruned_weights_are_zero_in_the_file(name: str, algorithm) -> None:
    format = Plain.of({"f16": F16, "bf16": BF16}[name]) if name in ("f16", "bf16") else FORMATS.get(name)
    w, stats = sample(4, columns_of(format), 1)
    w[:, 1] += 3  # groups that lie to one side of 0
    keep = kept(w, Pruning(0.5, "sparsegpt"), stats)
    value = quantize_pruned(algorithm, w, format, stats, keep, {}).decode()
    assert not value[~keep].any()
    assert value[keep].any(), "not everything is 0"


@pytest.mark.parametrize("name", ["q4_1", "q5_1", "q4_k", "q5_k", "int4_g64_asym_float"])
def test_a_grid_with_zero_costs_formats_with_offsets_little(name: str) -> None:
    format = FORMATS.get(name)
    w, stats = sample(32, 512, 2)
    keep = kept(w, Pruning(0.5, "magnitude"))
    pruned = quantize_pruned(rtn, w, format, stats, keep, {}).decode()
    free = format.encode(w * keep).decode()
    error, without = (float((value - w * keep).square().sum()) for value in (pruned, free))
    assert free[~keep].any() and error < 1.7 * without


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is 1; it is the share of weights that become 0, below 1"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": 0.5, "prune": "random"}, "choose one of sparsegpt, wanda, magnitude"),
        ({"sparsity": 0.5, "pattern": "1:4"}, "choose one of unstructured, row, 2:4, 4:8"),
        ({"sparsity": 0.3, "pattern": "2:4"}, "sparsity 0.3 with pattern 2:4, which keeps half: take 0.5"),
    ],
)
def test_settings_that_are_refused(given: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Pruning(**given)


def test_weights_that_are_refused() -> None:
    w, stats = sample(4, 10)
    with pytest.raises(FormatError, match="row length 10 is not a multiple of 4, which pattern 2:4 needs"):
        kept(w, Pruning(0.5, "magnitude", "2:4"))
    with pytest.raises(CalibrationError, match="wanda needs statistics of the weight's input"):
        kept(w, Pruning(0.5, "wanda"))
    with pytest.raises(CalibrationError, match="sparsegpt needs the Hessian"):
        kept(w, Pruning(0.5, "sparsegpt"), Stats(stats.count, stats.absmax, stats.mean_square))
