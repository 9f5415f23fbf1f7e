"""Pruning on another device: the same masks, and zeros in every format."""

import pytest
import torch

from fewbits.algorithms import gptq, rtn
from fewbits.algorithms.prune import PATTERNS, PRUNERS, Pruning, kept, quantize_pruned
from fewbits.calibrate.stats import Stats
from fewbits.dtypes import F16
from fewbits.formats import FORMATS
from fewbits.formats.plain import Plain

FORMAT_NAMES = ("int4_g32", "int4_g64_asym_float", "nf4", "kmeans3_channel", "q4_1", "q4_k", "f16")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("prune", PRUNERS)
def test_masks_are_the_cpus(prune: str, pattern: str, device: torch.device) -> None:
    w, stats = sample(128)
    pruning = Pruning(0.5, prune, pattern)
    found = kept(w.to(device), pruning, stats.to(device))
    assert found.device.type == device.type
    assert float((found.cpu() == kept(w, pruning, stats)).double().mean()) > 0.99


@pytest.mark.parametrize("algorithm", [gptq, rtn], ids=lambda algorithm: algorithm.__name__)
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_zeros(name: str, algorithm, device: torch.device) -> None:
    format = Plain.of(F16) if name == "f16" else FORMATS.get(name)
    w, stats = sample(256)
    keep = kept(w, Pruning(0.5, "wanda"), stats)
    q = quantize_pruned(algorithm, w.to(device), format, stats.to(device), keep.to(device), {})
    assert all(plane.device.type == device.type for plane in q.planes.values())
    value = q.decode().cpu()
    assert not value[~keep].any() and value[keep].any()


def sample(k: int) -> tuple[torch.Tensor, Stats]:
    make = torch.Generator().manual_seed(0)
    x = torch.randn(4 * k, k, generator=make) @ torch.randn(k, k, generator=make) / k**0.5
    hessian = x.T @ x / len(x)
    return torch.randn(6, k, generator=make), Stats(
        len(x), x.abs().amax(0), hessian.diagonal().clone(), hessian
    )
