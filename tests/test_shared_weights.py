"""Shared weights (Han et al., arXiv 1510.00149, section 3): codebooks per row and per weight, trained."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from fewbits.files.checkpoint import Checkpoint
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from fewbits.formats.codebook import LearnedGrid
from fewbits.formats.lloyd import fit_levels
from fewbits.train.distill import distill
from fewbits.train.rounding import gap_of
from fewbits.train.settings import DistillSettings
from fewbits.train.ste import GridLinear, LatentLinear
from tests.test_distill import SMALL, TOKENS, divergence, holding, in_format
from tests.tiny import VOCAB, save_tiny

NAMES = ("kmeans3_channel", "kmeans4_tensor")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("reference"), **SMALL))


def sample(name: str) -> tuple[torch.Tensor, LearnedGrid, torch.Tensor]:
    """A weight, the grid fitted to it, its codes."""
    format = FORMATS.get(name)
    w = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    grid, codes = format.unpack(format.encode(w))
    return w, grid, codes


def linear_start(reference: Checkpoint, name: str) -> Checkpoint:
    """Levels evenly from the least to the largest weight, as the paper starts, without Lloyd's iterations."""
    format = FORMATS.get(name)
    names = [name for name in reference.tensors if "_proj" in name]
    return holding(
        reference, {name: format.encode(reference.tensors[name].load(), None, search=False) for name in names}
    )


@pytest.mark.parametrize("trains_codes", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_centroid_gets_the_sum_of_the_gradients_of_its_weights(name: str, trains_codes: bool) -> None:
    w, grid, codes = sample(name)
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    module = (
        LatentLinear(grid, w.clone(), gap_of(grid, w), None)
        if trains_codes
        else GridLinear(grid, codes, None)
    )
    module(x).pow(3).sum().backward()
    table = grid.table.clone().requires_grad_()
    rows = torch.arange(12)[:, None] if len(table) > 1 else torch.zeros(12, 1, dtype=torch.long)
    weight = table[rows, codes.long()]
    weight.retain_grad()
    linear(x, weight).pow(3).sum().backward()
    found = module.block_parameters["table"].grad
    assert torch.allclose(found, table.grad, rtol=1e-4, atol=1e-4)
    # and, as the paper has it (equation 3), summed by hand
    of_row = torch.zeros_like(table)
    for i in range(12):
        for j in range(40):
            of_row[rows[i, 0], int(codes[i, j])] += weight.grad[i, j]
    assert torch.allclose(found, of_row, rtol=1e-3, atol=1e-3)


# measured: 0.78, 0.89
@pytest.mark.parametrize(("name", "left"), [("kmeans2_channel", 0.85), ("kmeans2_tensor", 0.93)])
def test_fine_tuned_centroids_lower_the_divergence_held_out(
    reference: Checkpoint, name: str, left: float
) -> None:
    quantized = linear_start(reference, name)
    settings = DistillSettings(steps=40, lr=2e-2, lr_vectors=0.0, batch=4, held_out=3, every=10)
    text = torch.randint(3, VOCAB, (60, 24), generator=torch.Generator().manual_seed(0))
    done = distill(reference, quantized, text, settings)
    better = holding(quantized, done.tensors)
    before, after = (divergence(reference, each, text[-3:]) for each in (quantized, better))
    assert after < left * before
    assert all(name.endswith("proj.weight") for name in done.tensors), "centroids alone"


def test_a_level_of_zero_stays_where_zeros_are_held(reference: Checkpoint) -> None:
    quantized = in_format(reference, "kmeans3_channel")
    zeroed = {}
    for name, tensor in quantized.tensors.items():
        if tensor.quantized:
            q = tensor.load()
            grid, codes = q.format.unpack(q)
            zeroed[name] = q.format.pack(grid.with_zero(), codes)
    quantized = holding(quantized, zeroed)
    settings = DistillSettings(steps=12, lr=2e-2, lr_vectors=0.0, held_out=3, every=4)
    held = distill(reference, quantized, TOKENS, replace(settings, keep_zeros=True))
    free = distill(reference, quantized, TOKENS, settings)
    assert held.tensors and free.tensors
    for name, q in held.tensors.items():
        zero = zeroed[name].decode() == 0
        assert zero.any() and torch.equal(q.decode() == 0, zero)
    assert any(
        not torch.equal(q.decode() == 0, zeroed[name].decode() == 0) for name, q in free.tensors.items()
    )


def test_levels_that_training_has_crossed_round_to_the_nearest() -> None:
    w, grid, _ = sample("kmeans3_channel")
    crossed = replace(
        grid, table=grid.table[:, torch.randperm(8, generator=torch.Generator().manual_seed(2))]
    )
    nearest = (w[..., None] - crossed.table[:, None]).abs().amin(2)
    assert torch.equal((w - crossed.value(crossed.round(w))).abs(), nearest)


def test_initial_levels_are_linear_and_lloyd_never_loses_to_them() -> None:
    w = torch.randn(6, 200, generator=torch.Generator().manual_seed(0)).pow(3)
    start = fit_levels(w, torch.ones_like(w), 8, search=False)
    ends = torch.stack([w.amin(1), w.amax(1)], 1)
    steps = torch.arange(8) / 7
    assert torch.allclose(start, ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * steps, rtol=1e-3)
    fitted = fit_levels(w, torch.ones_like(w), 8, search=True)
    lost = [(w[..., None] - levels[:, None]).square().amin(2).sum(1) for levels in (start, fitted)]
    assert (lost[1] < lost[0]).all()
