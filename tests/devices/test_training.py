"""Learned rounding and distillation on another device: the CPU's result."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbits import prepare_qat
from fewbits.adapters.transformers import load_model
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from fewbits.qtensor import QTensor
from fewbits.train.distill import DistillSettings, distill
from fewbits.train.rounding import RoundingSettings, learn_block
from fewbits.train.ste import LatentLinear
from tests.test_distill import SMALL, TOKENS, in_format, off
from tests.tiny import save_tiny

from .same import same_codes

GENERATOR = torch.Generator().manual_seed(0)
SHORT = RoundingSettings(steps=4, batch=2)


class Product:
    """A block of one weight: x W^T."""

    name = "product"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(
        self, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        return hidden.to(self.device) @ (weights or {})["w"].T


@pytest.mark.parametrize("name", ["int4_g32", "nf4", "q4_0", "q4_k", "mxfp4"])
def test_learned_codes(name: str, device: torch.device) -> None:
    fmt = FORMATS.get(name)
    w = torch.randn(6, fmt.block * (256 // fmt.block), generator=GENERATOR)
    inputs = [torch.randn(3, 5, w.shape[1], generator=GENERATOR) for _ in range(4)]
    targets = [x @ w.T for x in inputs]
    found = [
        learn_block(Product(place), {"w": w}, {"w": fmt}, {}, inputs, targets, SHORT)["w"]
        for place in (torch.device("cpu"), device)
    ]
    assert {plane.device.type for plane in found[1].planes.values()} == {device.type}
    same_codes(found[1], found[0], differing=0.01)


def test_the_parents_most_probable_tokens_are_kept(tmp_path: Path, device: torch.device) -> None:
    reference = open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path / "model", **SMALL))
    start = off(in_format(reference, "int4_g32"))
    settings = DistillSettings(steps=2, batch=2, held_out=2, every=1, lr_codes=0.01, top_k=8)
    here = distill(reference, start, TOKENS, settings)
    there = replace(settings, device=str(device), state=tmp_path / "state")
    for _ in range(2):  # the second time from the file
        found = distill(reference, start, TOKENS, there)
        assert found.after == pytest.approx(here.after, rel=1e-3)
        (tmp_path / "state").unlink()


@pytest.mark.parametrize("kind", ["int4_g32", "q4_0", "nf4", "kmeans4_channel"])
def test_a_prepared_model_moves(kind: str, tmp_path: Path, device: torch.device) -> None:
    """As Trainer moves it."""
    small = {**SMALL, "hidden_size": 64, "intermediate_size": 128}
    model = load_model(open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path / "model", **small)))
    prepare_qat(model, kind)

    def step() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        ids = TOKENS[:2].to(model.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss.detach()), {
            n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None
        }

    loss, gradients = step()
    model.to(device)
    for module in model.modules():
        if isinstance(module, LatentLinear):
            assert module.latent.device.type == module.gap.device.type == device.type
    moved, others = step()
    assert moved == pytest.approx(loss, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("kind", ["int4_g32", "q4_1"])
def test_distilled(kind: str, tmp_path: Path, device: torch.device) -> None:
    reference = open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path / "model", **SMALL))
    start = off(in_format(reference, kind))
    settings = DistillSettings(steps=3, batch=2, held_out=2, every=1, lr=1e-3, state=tmp_path / "state")
    found = []
    for name in ("cpu", str(device)):
        found.append(distill(reference, start, TOKENS, replace(settings, device=name)))
        (tmp_path / "state").unlink()
    here, there = found
    assert there.after < there.before
    assert [each.held_out for each in there.history] == pytest.approx(
        [each.held_out for each in here.history], rel=1e-3
    )
    assert there.tensors.keys() == here.tensors.keys()
    for name, value in there.tensors.items():
        planes = value.planes.values() if isinstance(value, QTensor) else [value]
        assert {plane.device.type for plane in planes} == {"cpu"}, name
