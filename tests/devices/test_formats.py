"""Every format on another device: the CPU's codes, made there."""

import pytest
import torch

from fewbits.formats import FORMATS
from fewbits.qtensor import QTensor

from .same import same_tensor


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("name", [*FORMATS])
def test_codes_and_values_are_the_cpus(name: str, search: bool, device: torch.device) -> None:
    fmt, generator = FORMATS.get(name), torch.Generator().manual_seed(0)
    w, importance = torch.randn(4, 256, generator=generator) * 0.1, torch.rand(256, generator=generator) + 0.1
    q = fmt.encode(w, importance, search)
    there = w.to(device)
    found = fmt.encode(there, importance.to(device), search)
    assert all(plane.device.type == device.type for plane in found.planes.values())
    for plane, value in q.planes.items():
        same_tensor(found.planes[plane], value)
    same_tensor(found.decode(), q.decode())
    grid, codes = fmt.unpack(found)
    same_tensor(grid.value(codes), q.decode())
    same_tensor(codes, fmt.unpack(q)[1])
    same_tensor(fmt.pack(grid, grid.round(there)).decode(), fmt.pack(*_again(q, w)).decode())
    ours, theirs = fmt.distortion(w, q), fmt.distortion(there, found)
    # The core sums in f32 over tiles: see test_core.py.
    assert theirs.squared == pytest.approx(ours.squared, rel=256 * 2**-24)
    assert theirs.largest == pytest.approx(ours.largest, rel=1e-6)


def _again(q: QTensor, w: torch.Tensor):  # type: ignore[no-untyped-def]
    grid, _ = q.format.unpack(q)
    return grid, grid.round(w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["int4_g64", "nf4", "nvfp4", "mxfp4", "q4_k", "iq3_s", "fp8_e4m3_channel"])
def test_weights_of_16_bits(name: str, dtype: torch.dtype, device: torch.device) -> None:
    fmt = FORMATS.get(name)
    w = (torch.randn(8, 512, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)
    same_tensor(fmt.encode(w.to(device)).decode(), fmt.encode(w).decode())
