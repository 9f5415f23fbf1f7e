"""Weights of one shape in lockstep: what each gets is what it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbits
from fewbits import core
from fewbits.algorithms import columns, gptq
from fewbits.algorithms.gptq import Settings, gptq_batch, most_at_once
from fewbits.algorithms.hessian import loss
from fewbits.calibrate.stats import Stats
from fewbits.calibrate.tokens import Tokens
from fewbits.errors import CalibrationError
from fewbits.formats import FORMATS
from fewbits.qtensor import QTensor
from fewbits.workflow.blockwise import ahead
from fewbits.workflow.blockwise.settings import Streaming
from tests.tiny import change_weights, save_tiny

from .batches import pretended_kernel, weights_and_stats
from .pretend import NAME

pytestmark = pytest.mark.skipif(not core.available(), reason="the C++ core is not built")
KINDS = (
    "int4_g32", "int4_g32_asym", "int4_g64_asym_float", "int8_channel", "q4_0", "q5_1", "q3_k", "q4_k",
    "q6_k", "nf4", "fp4_e2m1_g32", "mxfp4", "iq4_xs",
)  # fmt: skip
ALONE = (
    "int4_g32_actorder",
    "nvfp4",
    "nf4_dq",
    "kmeans3_channel",
    "int8_tensor",
    "iq3_s",
    "fp8_e4m3_block128",
)
OPTIONS = (Settings(), Settings(fit="static", descent=8, gptaq=0.25), Settings(fit="dynamic", descent=0))
CASES = [(name, OPTIONS[0]) for name in KINDS] + [
    (name, settings) for name in ("int4_g32_asym", "q4_0", "q4_k", "nf4") for settings in OPTIONS[1:]
]


@pytest.fixture
def launches(device: torch.device) -> Iterator[list[int]]:
    """Of each launch of the kernel, for how many weights it was; empty on a device that has the kernel."""
    with pretended_kernel() if device.type == NAME else nullcontext([]) as found:
        yield found


def same(found: QTensor | None, w: torch.Tensor, stats: Stats, alone: QTensor) -> None:
    """The same planes on the pretended device; elsewhere sums run in another order."""
    assert found is not None and stats.hessian is not None
    here = found.to("cpu")
    if found.planes[found.format.planes[0].name].device.type == NAME:
        assert all(torch.equal(here.planes[name], plane) for name, plane in alone.to("cpu").planes.items())
    lost, least = (float(loss(q.to("cpu").decode(), w, stats.hessian).sum()) for q in (here, alone))
    assert lost <= 1.001 * least


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda x: getattr(x, "fit", x))
def test_each_weight_gets_the_codes_it_gets_alone(
    name: str, settings: Settings, device: torch.device, launches: list[int]
) -> None:
    """Three weights of odd size; Hessians, orders and mismatch differ, and so do the rounds of descent."""
    fmt = FORMATS.get(name)
    ws, stats = weights_and_stats(3, 33, 512 if fmt.block == 256 else 320)
    there, known = [w.to(device) for w in ws], [each.to(device) for each in stats]
    assert columns.in_lockstep(fmt, ws[0].shape[1], there[0])
    found = gptq_batch(there, fmt, known, settings)
    assert set(launches) <= {3}
    for i, q in enumerate(found):
        same(q, ws[i], stats[i], gptq(there[i], fmt, known[i], *settings))


@pytest.mark.parametrize("name", ALONE)
def test_what_the_kernel_does_not_round_or_rows_share_is_alone(
    name: str, device: torch.device, launches: list[int]
) -> None:
    assert not columns.in_lockstep(FORMATS.get(name), 256, torch.zeros(1, device=device))


def test_on_the_cpu_nothing_is_in_lockstep() -> None:
    assert not columns.in_lockstep(FORMATS.get("int4_g32"), 256, torch.zeros(1))


def test_a_hessian_that_needs_more_damping_is_left_to_gptq(device: torch.device, launches: list[int]) -> None:
    fmt, (ws, stats) = FORMATS.get("int4_g32"), weights_and_stats(3, 33, 64)
    broken = stats[1].hessian
    assert broken is not None
    broken[0, 0] = -1.0
    there, known = [w.to(device) for w in ws], [each.to(device) for each in stats]
    found = gptq_batch(there, fmt, known, Settings())
    assert [q is None for q in found] == [False, True, False]
    for i in (0, 2):
        same(found[i], ws[i], stats[i], gptq(there[i], fmt, known[i]))
    assert gptq_batch(there[1:2], fmt, known[1:2], Settings()) == [None]


def test_a_batch_has_no_more_weights_and_hessians_than_fit() -> None:
    assert most_at_once(1536, 2048) == 21  # 2^26 weights
    assert most_at_once(64, 8192) == 2  # 2 GiB of four copies of 2^28 bytes
    assert most_at_once(4096, 14336) == 1


# ---- a calibrated run --------------------------------------------------------------------------------

WINDOWS = torch.randint(3, 500, (6, 40), generator=torch.Generator().manual_seed(0))
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16,
}  # fmt: skip
MIXTRAL = {"intermediate_size": 96, "num_local_experts": 5, "num_experts_per_tok": 2}
QWEN = {"moe_intermediate_size": 96, "num_experts": 6, "num_experts_per_tok": 2}


def quantized(model: Path, out: Path, device: torch.device, **given: Any) -> Any:
    given = {"to": "int4_g32", "method": "gptq", "verify": False} | given
    streaming = Streaming(device=str(device), dtype=torch.float32)
    return fewbits.quantize(model, out, calibrate=Tokens.of(WINDOWS, "random"), streaming=streaming, **given)


def compared(model: Path, tmp_path: Path, device: torch.device, monkeypatch: Any, **given: Any) -> list[str]:
    """Runs in lockstep and one by one: the same file, rows and notes -> the notes."""
    together = quantized(model, tmp_path / "together", device, **given)
    monkeypatch.setattr(ahead, "most_at_once", lambda n, k: 1)
    alone = quantized(model, tmp_path / "alone", device, **given)
    notes, wanted = ([note for note in each.notes if "busy" not in note] for each in (together, alone))
    assert notes == wanted
    for a, b in zip(together.tensors, alone.tensors, strict=True):
        assert (a.name, a.format, a.algorithm, a.options, a.tokens) == (
            b.name, b.format, b.algorithm, b.options, b.tokens)  # fmt: skip
        known = b.output_error is not None
        assert a.output_error == (pytest.approx(b.output_error, rel=1e-3) if known else None)
    if device.type == NAME:
        name = "model.safetensors"
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    return notes


@pytest.mark.parametrize(("name", "fields"), [("MixtralForCausalLM", MIXTRAL), ("Qwen3MoeForCausalLM", QWEN)])
def test_experts_get_the_codes_they_get_one_by_one(
    name: str, fields: dict[str, Any], tmp_path: Path, device: torch.device, launches: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    batches: list[int] = []

    def counted(ws: Any, *rest: Any) -> Any:
        batches.append(len(ws))
        return gptq_batch(ws, *rest)

    monkeypatch.setattr(ahead, "gptq_batch", counted)
    model = save_tiny(name, tmp_path / "m", **SMALL, **fields)
    notes = compared(model, tmp_path, device, monkeypatch)
    assert any(note.startswith("few tokens: ") for note in notes)
    experts = fields.get("num_experts", fields.get("num_local_experts"))
    assert batches == [experts] * 2  # their gates and ups, then their downs
    assert launches == [] or set(launches) == {1, experts}


def test_experts_without_a_token_and_what_was_trained_stay_alone(
    tmp_path: Path, device: torch.device, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token goes to one of the first four experts; the weights of 1 lie on a grid, and keep their
    codes."""
    batches: list[int] = []

    def counted(ws: Any, *rest: Any) -> Any:
        batches.append(len(ws))
        return gptq_batch(ws, *rest)

    monkeypatch.setattr(ahead, "gptq_batch", counted)
    model = save_tiny("MixtralForCausalLM", tmp_path / "m", **SMALL, **MIXTRAL | {"num_experts_per_tok": 1})
    at, fmt = "model.layers.0.block_sparse_moe.{}.weight", FORMATS.get("int4_g32")
    router = {at.format("gate"): lambda w: torch.stack([w[0], -w[0], w[1], -w[1], w[4] * 1e-3])}
    trained = [at.format(f"experts.1.{name}") for name in ("w1", "w2", "w3")]
    change_weights(model, router | dict.fromkeys(trained, lambda w: fmt.encode(w).decode()))
    notes = compared(model, tmp_path, device, monkeypatch)
    assert batches == [3, 3]
    assert any(note.startswith("unseen: ") and "experts.4" in note for note in notes)


def test_pruned_experts_stay_alone(
    tmp_path: Path, device: torch.device, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "gptq_batch", None)
    model = save_tiny("MixtralForCausalLM", tmp_path / "m", **SMALL, **MIXTRAL)
    quantized(model, tmp_path / "out", device, sparsity=0.5, prune="wanda")
    assert set(launches) <= {1}


def test_a_batch_that_fails_is_done_one_by_one(
    tmp_path: Path, device: torch.device, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory the experts go one by one; what is wrong with one is said with its name."""

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    model = save_tiny("MixtralForCausalLM", tmp_path / "m", **SMALL, **MIXTRAL)
    with monkeypatch.context() as patched:
        patched.setattr(ahead, "gptq_batch", full)
        quantized(model, tmp_path / "out", device)
    assert set(launches) <= {1}
    broken = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    change_weights(model, {broken: lambda w: w.index_fill_(0, torch.tensor([3]), 1e30)})
    with pytest.raises((fewbits.errors.FormatError, CalibrationError), match=r"layers\.0\..*experts\.2"):
        quantized(model, tmp_path / "broken", device)
