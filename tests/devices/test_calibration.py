"""A calibrated run whose model, statistics and codes are on another device: the CPU's output."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fewbits
from fewbits.calibrate.tokens import Tokens
from fewbits.workflow.blockstore import BlockStore
from fewbits.workflow.blockwise.settings import Streaming
from tests.tiny import save_tiny

WINDOWS = torch.randint(3, 500, (6, 40), generator=torch.Generator().manual_seed(0))
RUNS: dict[str, dict[str, Any]] = {
    "gptq": {"to": "int4_g64", "method": "gptq"},
    "equalize": {"to": "int4_g64", "method": "gptq", "equalize": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize("run", RUNS)
def test_the_output_is_the_cpus(run: str, model: Path, tmp_path: Path, device: torch.device) -> None:
    given = RUNS[run] | {"calibrate": Tokens.of(WINDOWS, "random"), "verify": False}
    here = fewbits.quantize(model, tmp_path / "cpu", **given)
    there = fewbits.quantize(
        model, tmp_path / "there", **given, streaming=Streaming(device=str(device), dtype=torch.float32)
    )
    assert not any("dropped" in note for note in there.notes)
    for a, b in zip(here.tensors, there.tensors, strict=True):
        # A code between two may fall to either side, and what is fed back of it moves the codes behind it.
        assert (a.name, a.format, a.tokens) == (b.name, b.format, b.tokens)
        for ours, theirs in ((a.relative_error, b.relative_error), (a.output_error, b.output_error)):
            assert theirs == (None if ours is None else pytest.approx(ours, rel=0.05)), a.name
    with torch.no_grad():
        logits = [fewbits.load(tmp_path / name)(WINDOWS[:2]).logits for name in ("cpu", "there")]
        parent = fewbits.load(model)(WINDOWS[:2]).logits
    lost = [float((each - parent).norm() / parent.norm()) for each in logits]
    assert lost[1] == pytest.approx(lost[0], rel=0.05)


def test_the_receipt_says_how_busy_the_device_was(
    model: Path, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fewbits.devices, "SECONDS", 0.01)
    looks = iter([20, 40] * 10000)
    monkeypatch.setattr(getattr(torch, device.type), "utilization", lambda device: next(looks), raising=False)
    given = RUNS["gptq"] | {"calibrate": Tokens.of(WINDOWS, "random"), "verify": False}
    streaming = Streaming(device=str(device), dtype=torch.float32)
    receipt = fewbits.quantize(model, tmp_path / "out", **given, streaming=streaming)
    [note] = [note for note in receipt.notes if "busy" in note]
    assert note.startswith(device.type) and note.endswith("of the time, block by block")
    share = int(note.split("busy ")[1].split("%")[0])
    assert 28 <= share <= 32


def test_a_disk_that_fails_while_the_device_goes_on_ends_the_run(
    model: Path, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run goes on after the blocks that were written, to the same bytes."""
    given = RUNS["gptq"] | {"calibrate": Tokens.of(WINDOWS, "random"), "verify": False}
    streaming = Streaming(device=str(device), dtype=torch.float32)
    fewbits.quantize(model, tmp_path / "whole", **given, streaming=streaming)
    write, calls = BlockStore.write, []

    def full(self: BlockStore, block: int, *rest: Any) -> None:
        calls.append(block)
        if block == 1 and calls.count(1) == 1:
            raise OSError(28, "No space left on device")
        write(self, block, *rest)

    monkeypatch.setattr(BlockStore, "write", full)
    with pytest.raises(OSError, match="No space left"):
        fewbits.quantize(model, tmp_path / "out", **given, streaming=streaming)
    fewbits.quantize(model, tmp_path / "out", **given, streaming=streaming)
    assert calls.count(0) == 1 and calls.count(1) == 2
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
