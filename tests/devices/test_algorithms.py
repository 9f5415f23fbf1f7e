"""Every algorithm on formats of each kind, on another device: the CPU's codes, or codes as good."""

import pytest
import torch

from fewbits.algorithms import ALGORITHMS, NEEDS
from fewbits.algorithms.hessian import loss
from fewbits.calibrate.stats import Stats
from fewbits.formats import FORMATS

from .same import same_codes

KINDS = (
    "int4_g32", "int4_g64_asym", "int8_channel", "int4_g32_actorder", "int4_g64_asym_float",
    "fp8_e4m3_block128", "fp4_e2m1_g32", "mxfp4", "nvfp4", "nf4", "nf4_dq", "pow2_4_g128", "kmeans3_channel",
    "kmeans3_tensor", "int8_absmax", "q4_0", "q5_1", "q8_0", "q3_k", "q4_k", "q6_k", "iq4_nl", "iq4_xs",
    "tq2_0", "mxfp4_ggml", "iq3_s", "iq2_xxs", "iq1_m",
)  # fmt: skip
OPTIONS = [
    ("gptq", {}),
    ("gptq", {"fit": "static", "descent": 0, "gptaq": 0.25}),
    ("weighted", {}),
    ("hqq", {}),
]


@pytest.mark.parametrize(("algorithm", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_codes_are_as_good_as_the_cpus(name, algorithm, options, device):
    fmt, generator = FORMATS.get(name), torch.Generator().manual_seed(0)
    k = 256 if fmt.block == 256 else 128
    w = torch.randn(3, k, generator=generator) * 0.1
    x = torch.randn(700, k, generator=generator) @ torch.randn(k, k, generator=generator) / 20
    hessian = (x.T @ x / len(x)).float()
    cross = hessian * 0.9
    stats = Stats(len(x), hessian.diagonal().clone(), x.abs().amax(0), hessian, cross)
    q = ALGORITHMS.get(algorithm)(w, fmt, stats, **options)
    found = ALGORITHMS.get(algorithm)(w.to(device), fmt, stats.to(device), **options)
    assert all(plane.device.type == device.type for plane in found.planes.values())
    wanted, got = (float(loss(each.decode().cpu(), w, hessian).sum()) for each in (q, found))
    if NEEDS[algorithm] == "hessian":
        assert got <= wanted * 1.001
    same_codes(found, q)
