"""ECSQ: against the closed forms of a Gaussian, against every code tried, and through the commands."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fewbits
from fewbits.algorithms import ecsq
from fewbits.algorithms.hessian import HessianFactor, loss
from fewbits.calibrate.stats import Stats
from fewbits.cli.main import main
from fewbits.errors import FormatError, PlanError
from fewbits.files.packed import pack_model
from fewbits.formats import FORMATS
from fewbits.model.sites import Site
from fewbits.plan import Plan, parse_rule
from fewbits.plan.rates import with_rates
from tests.contracts.algorithm_contract import sample
from tests.tiny import save_tiny

INT8 = FORMATS.get("int8_channel")
module = importlib.import_module("fewbits.algorithms.ecsq")  # the package's `ecsq` is the function


def codes_of(q) -> torch.Tensor:
    return q.planes["codes"].float() - 128


def entropy_of(codes: torch.Tensor) -> float:
    """By numpy."""
    p = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    return float(-(p * np.log2(p)).sum())


def best_of_gaussian(step: float) -> tuple[float, float]:
    """Bits and squared error of a unit Gaussian in multiples of `step`, each chosen for least error + lambda
    length at the slope of the high-rate bound; lengths from exact probabilities, by repetition."""
    levels = np.arange(-60, 61)
    edges = (levels[:-1] + 0.5) * step
    for _ in range(300):
        below = np.array([0.0, *(0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges), 1.0])
        p = np.maximum(np.diff(below), 1e-300)
        edges = (levels[:-1] + 0.5) * step - step * math.log(2) / 12 * np.diff(np.log2(p))
    x = np.linspace(-12, 12, 240_001)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    error = float((density * (x - levels[np.searchsorted(edges, x)] * step) ** 2).sum())
    return float(-(p * np.log2(p)).sum()), error


@pytest.mark.parametrize("bits", [1.5, 2.0, 4.0])
def test_a_gaussian_gets_the_error_that_theory_says(bits: float) -> None:
    """4 bits: 2 pi e / 12 above the Shannon bound, 0.2546 bits. Fewer: the exact curve too."""
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    q = ecsq(w, INT8, bits=bits)
    found, error = entropy_of(codes_of(q)), float((q.decode() - w).square().mean())
    assert found == pytest.approx(bits, rel=0.01)
    low, high = 0.05, 1.5
    for _ in range(20):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if best_of_gaussian(middle)[0] > found else (low, middle)
    assert error == pytest.approx(best_of_gaussian(low)[1], rel=0.02)
    above = found - 0.5 * math.log2(1 / error)
    assert above == pytest.approx(0.2546, abs=0.01)


def test_each_code_is_the_best_of_all_of_them() -> None:
    """Columns that do not correlate: error + lambda length of all 256 codes, for lengths that are given."""
    w, _ = sample(40, 6)
    diagonal = torch.tensor([0.2, 0.5, 1.0, 2.0, 3.0, 9.0])
    stats = Stats(100, diagonal.sqrt(), diagonal, diagonal.diag())
    hessian, steps = HessianFactor.of(stats, 0.0, torch.arange(6)), w / 0.05
    counts = module.counts_of(steps)
    longer = module.longer(counts)
    lengths = torch.cat([torch.zeros(1), longer.cumsum(0)])
    slope = 2 * math.log(2) / 12 * diagonal.mean()
    codes = torch.arange(-128.0, 128)
    costs = (steps[..., None] - codes).square() * diagonal[:, None] + slope * lengths
    assert torch.equal(module.chosen(steps, hessian, longer, 1.0), codes[costs.argmin(2)])
    assert torch.equal(module.chosen(steps, hessian, longer, 0.0), steps.round())


def test_lengths_are_those_of_the_counts() -> None:
    counts = torch.zeros(2 * module.WIDE + 1, dtype=torch.int64)
    for code, count in ((-1, 2**10), (0, 2**14), (1, 2**12), (2, 2**8)):
        counts[module.WIDE + code] = count
    found = module.longer(counts)
    middle = 127  # of code 0 over code -1
    assert found[middle : middle + 3].tolist() == pytest.approx([-4, 2, 4], abs=0.01)
    assert bool((found.diff() >= 0).all())


def test_feedback_and_lengths_each_lower_the_loss_at_equal_size() -> None:
    w, stats = sample(64, 256)
    lost = {}
    for name, given, rate in (("plain", None, 0.0), ("fed back", stats, 0.0), ("both", stats, 1.0)):
        q = ecsq(w, INT8, given, bits=2.0, rate=rate)
        size = entropy_of(codes_of(q))
        lost[name] = float(loss(q.decode(), w, stats.hessian).sum()) * 4 ** (size - 2.0)
    assert lost["both"] < 0.97 * lost["fed back"] < 0.9 * lost["plain"]


def test_hard_weights() -> None:
    _, stats = sample(2, 64)
    assert not ecsq(torch.zeros(3, 64), INT8, stats).decode().any()
    for w in (torch.ones(3, 64), torch.randn(1, 64), torch.randn(3, 64) * 1e-12, torch.randn(3, 64) * 1e6):
        q = ecsq(w, FORMATS.get("int8_channel_f32"), stats)
        assert bool(((q.decode() - w).abs() <= w.abs().max()).all())
    spiked = torch.randn(8, 64)
    spiked[3, 5] = 1e4  # out of reach of one step: its row alone is coarser
    q = ecsq(spiked, INT8)
    assert q.decode()[3, 5] == pytest.approx(1e4, rel=0.01)
    assert len(q.planes["scale"].unique()) == 2


def test_what_it_does_not_take(tmp_path: Path) -> None:
    w, _ = sample(2, 64)
    save_tiny("LlamaForCausalLM", tmp_path)
    with pytest.raises(FormatError, match="not int4_g32; use int8_channel"):
        ecsq(w, FORMATS.get("int4_g32"))
    for bits in (0.0, 8.0, -1.0, math.nan):
        with pytest.raises(PlanError, match="bits is above 0"):
            ecsq(w, INT8, bits=bits)
    with pytest.raises(PlanError, match="needs the method ecsq"):
        fewbits.quantize(tmp_path, to="int8_channel", method="gptq", bits_per_weight=3)


def test_bits_go_by_role_and_have_the_mean_that_was_asked() -> None:
    """A wide model's weights, the first of them by a rule of the user, which stays first."""
    shapes = {"self_attn.v_proj": (64, 256), "self_attn.q_proj": (256, 256), "mlp.down_proj": (256, 512)}
    found = [
        Site(f"model.layers.{i}.{name}.weight", shape, name.split(".")[1][0].replace("d", "down"), i, "")
        for i in range(2)
        for name, shape in shapes.items()
    ]
    found += [
        Site("lm_head.weight", (999, 256), "output", None, ""),
        Site("a.b.weight", (9, 9), "router", 1, ""),
    ]
    plan = with_rates(Plan((parse_rule("*.0.self_attn.v_proj=q8_0"),)), found, "int8_channel", 3.5, True)
    assert plan.rules[0].format == "q8_0" and len(plan.rules) == 5
    bits = {rule.match: rule.options["bits"] for rule in plan.rules[1:]}
    assert bits["*.self_attn.v_proj"] > bits["*.mlp.down_proj"] > bits["*.self_attn.q_proj"]
    chosen = [(site, plan.choose([site.name])) for site in found[1:-1]]
    total = sum(math.prod(site.shape) * rule.options["bits"] for site, rule in chosen)
    assert total / sum(math.prod(site.shape) for site, _ in chosen) == pytest.approx(3.5, abs=0.001)
    assert plan.choose(["a.b.weight"]) is None
    assert "lm_head" not in str(with_rates(Plan(), found, "int8_channel", 3.5, False).rules)


@pytest.mark.parametrize("file", ["native", "compressed-tensors"])
def test_the_size_asked_is_that_of_the_packed_file(tmp_path: Path, file: str) -> None:
    """Within 1 % by the receipt. The packed file has little besides: its floats, and tables that a model of
    two blocks does not fill."""
    model, out = save_tiny("LlamaForCausalLM", tmp_path / "model"), tmp_path / file
    command = ["quantize", str(model), "--to", "int8_channel", "--method", "ecsq", "--bits-per-weight", "3"]
    command += ["--file", file, "--calibrate", "vocabulary", "--tokens", "2048", "--context", "64"]
    assert main([*command, "--out", str(out), "--no-verify"]) == 0
    rows = json.loads((out / "receipt.json").read_text())["tensors"]
    coded = [row for row in rows if row["algorithm"] == "ecsq"]
    tables = {"model.embed_tokens.weight", "lm_head.weight"} & {row["name"] for row in coded}
    assert len(coded) == 14 + len(tables) and bool(tables) == (file == "native")
    weights = [math.prod(row["shape"]) for row in coded]
    total = sum(row["coded_bits"] * count for row, count in zip(coded, weights, strict=True))
    assert total / sum(weights) == pytest.approx(3, rel=0.01)
    packed = pack_model(out) / "model.safetensors.packed.safetensors"
    whole = load_file(out / "model.safetensors")
    floats = sum(t.nbytes for t in whole.values() if t.dtype.is_floating_point)
    assert packed.stat().st_size < 1.03 * (floats + total / 8) + 8192
