"""What runs a model: packed modules, activations and caches in few bits, integer products."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fewbits
from fewbits.activations import kv_cache, mixed, observers, quantizers
from fewbits.activations.integer import IntegerLinear
from fewbits.adapters.transformers import load_model
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from fewbits.runtime.packed import PackedWeight, pack_module, packed_modules
from tests.tiny import save_tiny

from .same import same_tensor

TENSORS = ("weight", "bias", "multiplier", "shift")
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 5, 256, generator=GENERATOR)
IDS = torch.randint(3, 500, (2, 12), generator=GENERATOR)


@pytest.mark.parametrize(
    "name", ["int4_g64", "nf4_dq", "q4_k", "iq4_nl", "mxfp4", "kmeans4_channel", "fp8_e4m3_channel"]
)
def test_packed_modules_move_and_multiply(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    linear, table = nn.Linear(256, 32), nn.Embedding(32, 256)
    for module in (linear, table):
        q = FORMATS.get(name).encode(module.weight.detach())
        pack_module(module, PackedWeight(q, torch.float32))
    x = X.clone().requires_grad_()
    linear(x).sum().backward()
    there = deepcopy(linear).to(device)
    y = X.to(device).requires_grad_()
    there(y).sum().backward()
    same_tensor(there(y).detach(), linear(X).detach())
    assert x.grad is not None and y.grad is not None
    same_tensor(y.grad, x.grad)
    ids = torch.tensor([[3, 1, 3], [0, 31, 7]])
    same_tensor(deepcopy(table).to(device)(ids.to(device)), table(ids))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize(
    ("to", "method"), [("int4_g64", "rtn"), ("q4_0", "rtn"), ("int4_g64_asym", "hqq"), ("nf4", "hqq")]
)
@torch.no_grad()
def test_quantize_model_where_the_model_is(to: str, method: str, model: Path, device: torch.device) -> None:
    here = load_model(open_checkpoint(model))
    there = deepcopy(here).to(device)
    fewbits.quantize_model(here, to, method=method)
    fewbits.quantize_model(there, to, method=method)
    for (name, _, a), (_, _, b) in zip(packed_modules(here), packed_modules(there), strict=True):
        assert b.device.type == device.type, name
        same_tensor(b.decode(), a.decode())
    same_tensor(there(IDS.to(device)).logits, here(IDS).logits, exact=False)


@pytest.mark.parametrize("name", [name for name, _ in quantizers.SCHEMES.items()])
def test_activations(name: str, device: torch.device) -> None:
    scheme = quantizers.parse(name)
    affine = None if scheme.dynamic else observers.Histogram.of(X).affine(scheme, "minmax")
    wanted = quantizers.quantize_dequantize(X, scheme, affine)
    there = X.to(device)
    seen = None if scheme.dynamic else observers.Histogram.of(there).affine(scheme, "minmax")
    same_tensor(quantizers.quantize_dequantize(there, scheme, seen), wanted)


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse", "entropy"])
def test_ranges(rule: str, device: torch.device) -> None:
    scheme = quantizers.parse("int8_static")
    a, b = (observers.Histogram.of(x).range(scheme, rule) for x in (X, X.to(device)))
    assert b == pytest.approx(a, rel=1e-6)


@torch.no_grad()
def test_sites_that_are_sensitive(model: Path, device: torch.device) -> None:
    whole = load_model(open_checkpoint(model))
    scheme = quantizers.parse("int8_static")
    here = mixed.calibrate(whole, IDS, scheme, "mse")
    there = mixed.calibrate(whole.to(device), IDS.to(device), scheme, "mse")
    assert here.quantizers.keys() == there.quantizers.keys()


@pytest.mark.parametrize("name", [name for name, _ in kv_cache.CACHES.items()])
def test_caches(name: str, device: torch.device) -> None:
    tokens = torch.randn(1, 2, 70, 64, generator=GENERATOR)
    wanted = kv_cache.CACHES.get(name).quantized(tokens)
    found = kv_cache.CACHES.get(name).quantized(tokens.to(device))
    for a, b in zip(found, wanted, strict=True):
        same_tensor(a, b)


def test_integer_products(device: torch.device) -> None:
    kind = quantizers.parse("int8_asymmetric_static")
    w = torch.randn(16, 256, generator=GENERATOR) * 0.1
    scale = w.abs().amax(1) / 127
    x = X.reshape(-1, 256)
    given, out = (kind.affine(values.min(), values.max()) for values in (x, x @ w.T))
    layer = IntegerLinear.of((w / scale[:, None]).round().to(torch.int8), scale, None, given, out)
    moved = replace(layer, **{name: getattr(layer, name).to(device) for name in TENSORS})
    x = quantizers.quantize(x, kind, given).to(torch.int8)
    same_tensor(moved(x.to(device)), layer(x))


@pytest.mark.parametrize("kind", ["float", "int4_g64"])
def test_the_engine_of_a_verification_runs_there(
    kind: str, model: Path, device: torch.device, tmp_path: Path
) -> None:
    """The script of the engine's process; packed weights by our quantizer of transformers."""
    import numpy as np

    import fewbits.transformers
    from fewbits.engines.run_transformers import tried

    path = model
    if kind != "float":
        path = tmp_path / "quantized"
        fewbits.quantize(model, path, to=kind, effort="fast", verify=False)
    task = {"windows": [IDS[0].tolist()], "first": 2, "new": 2, "stored": None, "texts": []}
    found = {}
    for place in ("cpu", str(device)):
        folder = tmp_path / place.replace(":", "-")
        folder.mkdir()
        said = tried(str(path), {**task, "device": place}, str(folder))
        found[place] = said["new"], np.load(folder / "0.npy")
    (new, logits), (new_there, logits_there) = found.values()
    assert new_there == new and np.allclose(logits_there, logits, atol=1e-5)
