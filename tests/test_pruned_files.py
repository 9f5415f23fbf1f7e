"""Pruned models as files: what an outside reader finds in them, receipts, resumed runs, training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import fewbits
from fewbits.calibrate.tokens import Tokens
from fewbits.cli.main import main
from fewbits.errors import FileError, PlanError
from fewbits.files.open import open_checkpoint
from fewbits.train.settings import DistillSettings
from tests.interrupts import interrupt_at
from tests.tiny import VOCAB, read_by_gguf, save_tiny

SMALL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
TEXT = Tokens.of(torch.randint(3, VOCAB, (40, 32), generator=torch.Generator().manual_seed(0)), "random")
HALF = {"sparsity": 0.5, "calibrate": TEXT, "verify": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("model"), **SMALL)


def matrices(path: Path) -> dict[str, torch.Tensor]:
    """The matrices of the blocks in a directory of floats, by safetensors alone."""
    with safe_open(path / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).float() for name in file.keys() if "_proj" in name}  # noqa: SIM118


def decoded(path: Path) -> dict[str, torch.Tensor]:
    tensors = open_checkpoint(path).tensors
    found = {name: tensors[name].load() for name in tensors if "_proj" in name}
    return {name: w.float() if isinstance(w, torch.Tensor) else w.decode() for name, w in found.items()}


def zeros(weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((w == 0).float().mean()) for name, w in weights.items()}


# ---- files --------------------------------------------------------------------------------------


def test_floats_keep_their_type_and_half_of_their_weights(model: Path, tmp_path: Path) -> None:
    receipt = fewbits.quantize(model, tmp_path / "f16", to="f16", file="native", **HALF)
    found = zeros(matrices(tmp_path / "f16"))
    assert len(found) == 14 and set(found.values()) == {0.5}
    assert not any(torch.signbit(w[w == 0]).any() for w in matrices(tmp_path / "f16").values())
    rows = {row.name: row for row in receipt.tensors if row.sparsity is not None}
    assert rows.keys() == found.keys()
    for row in rows.values():
        assert row.sparsity == {"dropped": 0.5, "not_zero": 0.0, "zeros": 0.5}
        assert row.algorithm == "gptq" and row.options["prune"] == "sparsegpt" and row.tokens == 1280
        assert row.format == "f16" and row.output_error is not None and row.relative_error is not None
    assert receipt.sparsity == {
        "asked": 0.5, "prune": "sparsegpt", "pattern": "unstructured", "covered": 1.0, "dropped": 0.5,
        "not_zero": 0.0, "zeros": 0.5,
    }  # fmt: skip
    first = receipt.table().split("\n\n")[1]
    assert first.startswith("100.0% of the weights in blocks were pruned by sparsegpt (unstructured): 50.00%")
    assert fewbits.Receipt.from_json(receipt.to_json()) == receipt


def test_without_text_it_is_magnitude_pruning_of_every_matrix(model: Path, tmp_path: Path) -> None:
    from torch.nn.utils import prune

    fewbits.quantize(
        model, tmp_path / "out", to="f32", file="native", effort="fast", sparsity=0.4, verify=False
    )
    for name, w in matrices(tmp_path / "out").items():
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        layer.weight.data.copy_(matrices(model)[name])
        prune.l1_unstructured(layer, "weight", amount=0.4)
        assert torch.equal(w, layer.weight)


@pytest.mark.parametrize(
    ("to", "more"), [("q4_0", {}), ("q4_1", {"prune": "wanda"}), ("f16", {"method": "rtn"})]
)
def test_gguf_by_another_reader(model: Path, tmp_path: Path, to: str, more: dict[str, str]) -> None:
    fewbits.quantize(model, tmp_path / "m.gguf", to=to, sparsity_pattern="2:4", **{**HALF, **more})
    found = read_by_gguf(tmp_path / "m.gguf")
    blocks = {name: w for name, (_, w, _) in found.items() if name.startswith("blk.") and w.ndim == 2}
    assert len(blocks) == 14
    for name, w in blocks.items():
        of_four = (w.reshape(len(w), -1, 4) == 0).sum(2)
        assert int(of_four.min()) >= 2, name
        assert float((of_four == 2).float().mean()) > 0.5, "kept weights are kept"


def test_a_killed_run_goes_on_only_with_its_own_sparsity(model: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"to": "int4_g32", "file": "native", **HALF}
    with pytest.raises(KeyboardInterrupt):
        fewbits.quantize(model, tmp_path / "out", progress=interrupt_at(9), **given)
    assert (tmp_path / "out.blocks").is_dir()
    with pytest.raises(FileError, match="method"):
        fewbits.quantize(model, tmp_path / "out", **{**given, "sparsity": 0.4})
    fewbits.quantize(model, tmp_path / "out", **given)
    fewbits.quantize(model, tmp_path / "whole", **given)
    one, two = (tmp_path / name / "model.safetensors" for name in ("out", "whole"))
    assert one.read_bytes() == two.read_bytes()


def test_saved_statistics_prune_without_running_the_model(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and runs away " * 200)
    given = ["calibrate", model, "--calibrate", text, "--tokens", 1024, "--context", 32, "--out"]
    for name, prune in (("s.safetensors", "sparsegpt"), ("s.gguf", "wanda")):
        assert main([str(each) for each in (*given, tmp_path / name)]) == 0
        method = "gptq" if prune == "sparsegpt" else "weighted"
        receipt = fewbits.quantize(
            model, tmp_path / f"{prune}", to="int8_g32", method=method, sparsity=0.5, verify=False,
            calibrate=tmp_path / name, sparsity_pattern="row",
        )  # fmt: skip
        assert receipt.sparsity["prune"] == prune and receipt.sparsity["covered"] == 1
        for w in decoded(tmp_path / prune).values():
            assert int((w == 0).sum(1).min()) >= w.shape[1] // 2


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "more"),
    [
        ("int4_g32", {"train": 30, "training": {"lr_codes": 0.005}}),
        ("int4_g32", {"distill": 6}),
        ("kmeans3_channel", {"distill": 6}),
        ("kmeans3_channel", {"train": 30, "training": {"lr_codes": 0.003, "lr": 3e-3, "lr_vectors": 3e-3}}),
        ("bf16", {"train": 30, "training": {"lr_codes": 0.01}}),
        ("f16", {"train": 30, "training": {"lr_codes": 0.01}}),
    ],
)
def test_pruned_weights_stay_zero_in_training(
    model: Path, tmp_path: Path, to: str, more: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"to": to, "method": "gptq", **HALF}
    # What is held out from training is not pruned by.
    seen = Tokens.of(TEXT.windows[: -DistillSettings.held_out], "seen") if "train" in more else TEXT
    fewbits.quantize(model, tmp_path / "before", **{**given, "calibrate": seen})
    receipt = fewbits.quantize(model, tmp_path / "after", **given, **more)
    before, after = decoded(tmp_path / "before"), decoded(tmp_path / "after")
    assert any(not torch.equal(before[name], after[name]) for name in before), "it was trained"
    better = receipt.training
    assert min(each["held_out"] for each in better) < better[0]["held_out"]
    for name, w in before.items():
        assert float((w == 0).float().mean()) >= 0.5
        assert not after[name][w == 0].any()
    assert receipt.sparsity["not_zero"] == 0
    if "train" in more and not before[name].equal(after[name]):
        assert [row.options["train"] for row in receipt.tensors if row.name == name] == [30]
    assert receipt.sparsity["zeros"] == pytest.approx(
        sum(int((w == 0).sum()) for w in after.values()) / sum(w.numel() for w in after.values())
    )


def test_learned_rounding_keeps_them(model: Path, tmp_path: Path) -> None:
    receipt = fewbits.quantize(model, tmp_path / "out", to="int4_g32", method="learned", **HALF)
    assert any(row.options.get("learn") for row in receipt.tensors)
    assert receipt.sparsity["not_zero"] == 0
    assert all(share >= 0.5 for share in zeros(decoded(tmp_path / "out")).values())


# ---- what is refused ----------------------------------------------------------------------------

REFUSED = {
    "share": ({"sparsity": 1.5}, "sparsity is 1.5; it is the share of weights that become 0, below 1"),
    "half": ({"sparsity": 0.6, "sparsity_pattern": "4:8"}, "sparsity 0.6 with pattern 4:8, which keeps half"),
    "alone": ({"prune": "wanda"}, "prune wanda needs a sparsity, such as 0.5"),
    "row": ({"sparsity_pattern": "row"}, "sparsity pattern row needs a sparsity"),
    "table": ({"sparsity": 0.5, "to": "iq4_nl"}, r"iq4_nl, of .*, has no value 0, so that pruned weights"),
    "offsets": ({"sparsity": 0.5, "to": "q4_1", "train": 4}, "q4_1, of .*: training moves its offsets"),
}


@pytest.mark.parametrize("case", [*REFUSED])
def test_refused_before_any_work(model: Path, tmp_path: Path, case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises(PlanError, match=message):
        fewbits.quantize(model, tmp_path / "o", **{"to": "q4_0", "calibrate": TEXT, "verify": False, **given})
    assert not [*tmp_path.iterdir()]


def test_rows_that_a_pattern_does_not_divide(tmp_path: Path) -> None:
    odd = save_tiny("LlamaForCausalLM", tmp_path / "m", hidden_size=64, intermediate_size=90, head_dim=16)
    with pytest.raises(PlanError, match=r"row length 90 is not a multiple of 4.*take pattern row"):
        fewbits.quantize(odd, tmp_path / "o", to="f16", file="native", sparsity_pattern="2:4", **HALF)


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["quantize", str(model), "--to", "int4_g32", "--effort", "fast", "--no-verify", "--out"]
    assert main([*given, str(tmp_path / "o"), "--sparsity", "0.5", "--sparsity-pattern", "2:4"]) == 0
    assert "pruned by magnitude (2:4): 50.00% of them dropped" in capsys.readouterr().out
    assert main([*given, str(tmp_path / "p"), "--sparsity", "1"]) == 1
    assert "it is the share of weights that become 0, below 1" in capsys.readouterr().err
