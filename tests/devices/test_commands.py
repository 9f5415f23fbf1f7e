"""What runs a model runs it where it is asked to: names of devices, evaluation, text, memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fewbits
from fewbits.blocks.activations import Activations
from fewbits.calibrate import capture as capturing
from fewbits.calibrate.sampling import writer_of
from fewbits.calibrate.tokens import Tokens, read_tokens
from fewbits.devices import AUTO, Room, device_of, free_device_memory
from fewbits.errors import KernelError, ModelError
from fewbits.evaluation import Settings, evaluate, evaluate_head
from fewbits.evaluation.text import self_text
from fewbits.files.open import open_checkpoint
from fewbits.runtime.runner import Whole
from fewbits.workflow import memory
from fewbits.workflow.blockwise.settings import Streaming
from tests.encoders import save_encoder
from tests.tiny import save_tiny

WINDOWS = torch.randint(3, 500, (16, 40), generator=torch.Generator().manual_seed(0))
TEXT = "the quick brown fox jumps over the lazy dog " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "int4"
    fewbits.quantize(model, out, to="int4_g64", effort="fast", verify=False)
    return out


@pytest.fixture
def one_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """`auto` finds the device."""
    monkeypatch.setattr(fewbits.devices, "GPUS", (device.type,))
    return device


@pytest.mark.parametrize(
    ("name", "message"),
    [("tpu7", "knows no such device"), ("cuda", "finds no cuda device"), ("xpu:3", "finds no xpu device")],
)
def test_a_device_that_is_not_here_is_refused(name: str, message: str) -> None:
    if torch.cuda.is_available() and name == "cuda":
        pytest.skip("there is one")
    with pytest.raises(KernelError, match=message):
        device_of(name)


def test_auto_is_a_gpu_where_there_is_one(one_gpu: torch.device) -> None:
    assert device_of(AUTO).type == one_gpu.type
    assert Streaming().place.type == one_gpu.type and Streaming().dtype == torch.bfloat16
    places = Room(AUTO, left=5).places()
    assert [place.type for place, _ in places] == [one_gpu.type, "cpu"]
    assert all(nbytes <= 5 for _, nbytes in places)
    assert Streaming(device="cpu").dtype == torch.float32


@pytest.mark.parametrize("activations", [None, "int8_dynamic"])
def test_figures_are_the_cpus(
    model: Path, quantized: Path, device: torch.device, activations: str | None
) -> None:
    simulation = fewbits.evaluation.Simulation(activations)
    found = {
        name: evaluate(
            model, [quantized], TEXT,
            Settings(context=32, max_windows=2, prompts=1, new_tokens=4, device=name, simulation=simulation),
        )
        for name in ("cpu", str(device))
    }  # fmt: skip
    here, there = (each.quantized_models[0] for each in found.values())
    assert there.ran.endswith(f"on {device}") and here.ran == "whole, float32"
    assert here.fidelity is not None and there.fidelity is not None
    assert there.fidelity.kl.value == pytest.approx(here.fidelity.kl.value, rel=5e-3)
    assert there.fidelity.kl.value > 0
    assert [each.quantized for each in there.continuations] == [each.quantized for each in here.continuations]


def test_what_does_not_fit_a_gpu_whole_goes_there_block_by_block(
    model: Path, quantized: Path, one_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(context=32, max_windows=2, prompts=0)
    kl, ran = [], []
    whole = max(Whole(open_checkpoint(path)).needs(2, 32) for path in (model, quantized))
    for free in (whole, whole - 1, 2**20):
        monkeypatch.setattr(fewbits.devices, "free_device_memory", lambda device, free=free: free)
        found = evaluate(model, [quantized], TEXT, settings).quantized_models[0]
        assert found.fidelity is not None
        kl.append(found.fidelity.kl.value)
        ran.append(found.ran)
    assert ran == [f"whole, float32 on {one_gpu}:0", f"block by block on {one_gpu}:0", "whole, float32"]
    assert kl == pytest.approx([kl[0]] * 3, rel=1e-3)


def test_classifiers(tmp_path: Path, device: torch.device) -> None:
    path = save_encoder("DistilBertForSequenceClassification", tmp_path / "classifier")
    fewbits.quantize(path, tmp_path / "int8", to="int8_channel", effort="fast", verify=False)
    found = [
        evaluate_head(path, [tmp_path / "int8"], ["a b c", "d e"], Settings(device=name)).quantized_models[0]
        for name in ("cpu", str(device))
    ]
    assert found[1].figures["KL mean"] == pytest.approx(found[0].figures["KL mean"], rel=1e-2)


def test_text_is_written_on_it(model: Path, device: torch.device) -> None:
    checkpoint, room = open_checkpoint(model), Room(str(device))
    assert torch.device(writer_of(checkpoint, room).device).type == device.type
    tokens = read_tokens(checkpoint, "self", 96, 32, seed=1, room=room)
    again = read_tokens(checkpoint, "self", 96, 32, seed=1, room=room)
    assert tokens.windows.shape == (3, 32) and torch.equal(tokens.windows, again.windows)
    assert tokens.windows.device.type == "cpu" and tokens.windows.unique().numel() > 10
    assert len(self_text(checkpoint, 64, context=32, room=room).tokens) == 64


def quantize(model: Path, out: Path, **how: Any) -> fewbits.Receipt:
    given = {"to": "int4_g64", "method": "gptq", "calibrate": Tokens.of(WINDOWS, "random"), "verify": False}
    return fewbits.quantize(model, out, **given | how)


@pytest.mark.parametrize("largest", [3, 0])
def test_batches_are_halved_where_memory_runs_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    """On the CPU too, where torch raises the same where an allocator is limited."""
    whole = quantize(model, tmp_path / "whole")
    add = capturing.Sums.add

    def limited(self: capturing.Sums, x: torch.Tensor, floats: torch.Tensor | None = None) -> None:
        if len(x) > largest * WINDOWS.shape[1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nMore.")
        add(self, x, floats)

    monkeypatch.setattr(capturing.Sums, "add", limited)
    if not largest:
        with pytest.raises(fewbits.CalibrationError, match=r"block 0 with one sequence of 40 tokens.*3 GiB"):
            quantize(model, tmp_path / "out")
        return
    receipt = quantize(model, tmp_path / "out")
    assert any("out of memory on cpu: batches of 2 from block 0 on" in note for note in receipt.notes)
    for a, b in zip(whole.tensors, receipt.tensors, strict=True):
        assert b.relative_error == (
            None if a.relative_error is None else pytest.approx(a.relative_error, 0.02)
        )


def test_halved_batches_keep_their_numbers(tmp_path: Path) -> None:
    batches = [torch.randn(rows, 3, 5, generator=torch.Generator().manual_seed(rows)) for rows in (4, 5, 1)]
    with Activations(batches, limit=4 * 3 * 5 * 4, folder=tmp_path) as kept:
        for sizes in ([2, 2, 3, 2, 1], [1, 1, 1, 1, 2, 1, 1, 1, 1]):
            kept.halve()
            assert [len(batch) for batch in kept] == sizes
            assert torch.equal(torch.cat([*kept]), torch.cat(batches))
            kept[4] = kept[4] * 1
        assert torch.equal(torch.cat([*kept]), torch.cat(batches))


def test_a_block_that_does_not_fit_a_gpu_is_said_before_the_start(
    model: Path, tmp_path: Path, one_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_device_memory", lambda device: 2**20)
    with pytest.raises(ModelError, match=rf"one sequence takes .* on {one_gpu}, which has 0.00 GiB free"):
        quantize(model, tmp_path / "out", streaming=Streaming(device=str(one_gpu)))
    assert not (tmp_path / "out").exists()
    receipt = quantize(model, tmp_path / "out")
    assert any("run on the CPU: a block with one sequence takes" in note for note in receipt.notes)


def test_its_memory_is_said_and_limits_the_batch(
    model: Path, tmp_path: Path, one_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbits.workflow.options import Options
    from fewbits.workflow.quantize import opened, prepared

    checkpoint, path = opened(model)
    options = Options(to="int4_g64", calibrate=Tokens.of(WINDOWS, "random"), verify=False)

    def needed(out: str) -> tuple[int, str]:
        _, _, need = prepared(checkpoint, path, tmp_path / out, options)
        assert need.device is not None
        return need.device[1], need.line()

    every, line = needed("a")
    assert f"{every / 2**30:.2f} GiB on {one_gpu}:0" in line
    monkeypatch.setattr(memory, "free_device_memory", lambda device: every - 1)
    assert needed("b")[0] < every
    assert free_device_memory(torch.device("cpu")) is None
