"""Codes that are trained: what is written is what the last forward pass multiplied with; it gets better."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import nn

import fewbits
from fewbits.adapters.transformers import load_model
from fewbits.calibrate.tokens import Tokens
from fewbits.cli.main import main
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from fewbits.plan.method import METHODS
from fewbits.qtensor import QTensor
from fewbits.train.distill import DistillSettings, distill
from fewbits.train.rounding import gap_of, spacing_of
from fewbits.train.ste import LatentLinear
from fewbits.train.student import Student
from fewbits.workflow.blockwise.settings import BEFORE_TRAINING, Run
from fewbits.workflow.training import packed
from tests.test_distill import SMALL, TOKENS, in_format
from tests.tiny import save_tiny

KINDS = ("int4_g32", "int2_g32", "int4_g32_asym", "q4_0", "q4_1", "q8_0", "nf4", "mxfp4", "fp8_e4m3_channel")
WIDE = ("q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs", "iq3_s", "tq2_0")


def linear_of(name: str, n: int = 6) -> tuple[LatentLinear, torch.Tensor]:
    fmt = FORMATS.get(name)
    k = max(64, fmt.block)
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.1
    grid, _ = fmt.unpack(fmt.encode(w))
    return LatentLinear(grid, w.clone(), gap_of(grid, w), None), w


@pytest.mark.parametrize("name", [*KINDS, *WIDE])
def test_gradients_are_those_of_the_rounded_weight(name: str) -> None:
    """Against autograd through the same weight as a leaf; and of the block parameters, by differences."""
    linear, w = linear_of(name)
    x = torch.randn(5, w.shape[1], generator=torch.Generator().manual_seed(1))
    value = linear.grid.value(linear.grid.round(w)).requires_grad_()
    given = x.clone().requires_grad_()
    wanted = nn.functional.linear(given, value)
    wanted.square().sum().backward()
    ours = x.clone().requires_grad_()
    out = linear(ours)
    assert torch.allclose(out, wanted, rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    assert given.grad is not None and ours.grad is not None and value.grad is not None
    assert torch.allclose(ours.grad, given.grad, rtol=1e-4, atol=1e-5)
    assert linear.latent.grad is not None
    inside = linear.latent.grad != 0
    assert float(inside.double().mean()) > 0.9
    assert torch.allclose(linear.latent.grad[inside], value.grad[inside], rtol=1e-3, atol=1e-4)


def test_a_weight_beyond_its_grid_is_not_taken_farther() -> None:
    linear, w = linear_of("int4_g32")
    with torch.no_grad():
        linear.latent[0, 0], linear.latent[1, 0] = 9.0, -9.0
    for direction in (1.0, -1.0):
        linear.latent.grad = None
        (direction * linear(torch.ones(1, w.shape[1])).sum()).backward()
        assert linear.latent.grad is not None
        kept = [float(linear.latent.grad[row, 0]) for row in (0, 1)]
        # Descent moves against the gradient: only what brings them back is left.
        assert kept == ([1.0, 0.0] if direction > 0 else [0.0, -1.0])


@pytest.mark.parametrize("name", [*KINDS, *(name for name in WIDE if name != "iq3_s"), "kmeans4_channel"])
def test_every_level_can_be_reached_also_by_weights_that_lie_on_the_grid(name: str) -> None:
    """One step of descent, as large as the gradient asks for, is taken between all neighbours."""
    fmt = FORMATS.get(name)
    _, w = linear_of(name)
    grid, codes = fmt.unpack(fmt.encode(w))
    there = grid.value(codes)
    linear = LatentLinear(grid, there.clone(), spacing_of(grid, there), None)
    low, high = (grid.value(grid.round(torch.full_like(w, side))) for side in (-1e9, 1e9))
    with torch.no_grad():
        linear.latent.copy_(torch.minimum(low, high) + (high - low).abs() * torch.rand_like(w))
    for direction in (1.0, -1.0):
        linear.latent.grad = None
        (direction * linear(torch.ones(1, w.shape[1])).sum()).backward()
        assert linear.latent.grad is not None and bool((linear.latent.grad == direction).all())
    with torch.no_grad():
        linear.latent.copy_(torch.maximum(low, high) + 3 * (high - low).abs())
    linear.latent.grad = None
    (-linear(torch.ones(1, w.shape[1])).sum()).backward()
    assert linear.latent.grad is not None and not bool(linear.latent.grad.any())


@pytest.mark.parametrize("name", [*KINDS, *WIDE, "iq2_xxs", "iq1_s", "kmeans4_channel"])
def test_scales_in_a_pass_are_those_of_the_file(name: str) -> None:
    linear, w = linear_of(name)
    with torch.no_grad():
        for value in linear.block_parameters.values():
            value.mul_(1.003)
    held = packed(linear, FORMATS.get(name)).decode()
    assert torch.equal(linear(torch.eye(w.shape[1])).detach().T, held)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("latent") / "model", **SMALL)


@pytest.mark.parametrize("kind", ["int2_g32", "q4_0", "int4_g32_asym"])
def test_the_file_holds_the_weights_of_the_last_forward_pass(model: Path, kind: str) -> None:
    reference = open_checkpoint(model)
    quantized = in_format(reference, kind)
    student = Student(load_model(quantized), quantized, TOKENS[0], torch.device("cpu"), reference)
    start = student.pack(student.read())
    for name, value in start.items():  # training starts at the codes that it was given
        if isinstance(value, QTensor):
            assert torch.equal(value.decode(), quantized.tensors[name].load().decode())  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    flat = student.read()
    flat = student.rounded(flat + 0.7 * student.units() * torch.randn(len(flat), generator=generator))
    student.write(flat)
    held = student.pack(flat)
    changed = 0
    for path, module in student.halves._blocks.named_modules():
        if isinstance(module, LatentLinear):
            name = f"model.{path}.weight"
            q, before = held[name], quantized.tensors[name].load()
            assert isinstance(q, QTensor) and isinstance(before, QTensor)
            zero = 0 if module.bias is None else module.bias
            assert torch.equal((module(torch.eye(q.shape[1])) - zero).detach().T, q.decode())
            changed += int((q.decode() != before.decode()).sum())
    assert changed > 1000


@pytest.mark.parametrize("kind", ["int2_g32", "q4_0"])
def test_training_codes_gains_more_than_training_scales(model: Path, kind: str) -> None:
    reference = open_checkpoint(model)
    tokens = torch.randint(3, 500, (120, 24), generator=torch.Generator().manual_seed(0))
    settings = DistillSettings(steps=60, lr=2e-3, lr_vectors=2e-3, batch=8, held_out=8, every=20)
    quantized = in_format(reference, kind)
    scales = distill(reference, quantized, tokens, settings)
    codes = distill(reference, quantized, tokens, replace(settings, lr_codes=0.04))
    assert codes.after < 0.9 * scales.after and codes.after < 0.8 * codes.before
    again = distill(reference, quantized, tokens, replace(settings, lr_codes=0.04))
    assert again.history == codes.history


def test_the_command_trains_into_a_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "the quick brown fox jumps over the lazy dog and runs away "
    (tmp_path / "text.txt").write_text(words * 300)
    out = tmp_path / "out"
    given: list[Any] = [
        "train", model, "--to", "int2_g32", "--calibrate", tmp_path / "text.txt", "--tokens", 2048,
        "--context", 32, "--steps", 20, "--batch", 4, "--lr-codes", 0.005, "--lr", 0.003, "--out", out,
        "--no-verify",
    ]  # fmt: skip
    assert main([str(each) for each in given]) == 0
    capsys.readouterr()
    receipt = fewbits.Receipt.from_json((out / "receipt.json").read_text(), "receipt")
    assert receipt.method["train"] == 20
    assert any(note.startswith("trained: KL divergence") for note in receipt.notes)
    history = receipt.training
    assert [row["step"] for row in history] == [0, 20] and history[1]["learned"] > 0
    best = min(row["held_out"] for row in history)
    assert f"{best:.4f} (written)" in (out / "README.md").read_text()
    with PIL.Image.open(out / "training.png") as picture:  # matplotlib comes with it
        assert picture.size[0] > 400 and len(picture.convert("L").getcolors()) > 20
    assert (
        main(["train", str(model), "--to", "int2_g32", "--effort", "fast", "--out", str(tmp_path / "o")]) == 1
    )
    assert "leave out --effort fast" in capsys.readouterr().err


def test_a_run_that_trains_nothing_says_so(model: Path, tmp_path: Path) -> None:
    text = Tokens.of(TOKENS, "text")
    fewbits.quantize(model, tmp_path / "q", to="int4_g32", effort="fast", verify=False)
    training = {"held_out": 2, "batch": 2}
    receipt = fewbits.quantize(
        tmp_path / "q",
        tmp_path / "o",
        to="int4_g32",
        calibrate=text,
        train=2,
        training=training,
        verify=False,
    )
    assert any("nothing to train: no weight of a block gets a new format" in note for note in receipt.notes)


def test_a_mixture_of_llama_cpp_is_exported_to_other_file_types_too(model: Path, tmp_path: Path) -> None:
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    fewbits.prepare_qat(loaded, "q4_0")
    fewbits.export(loaded, tmp_path / "model.gguf")
    receipt = fewbits.export(loaded, tmp_path / "compressed", "compressed-tensors")
    assert {row.format for row in receipt.tensors if "_proj" in row.name} == {"int4_g32"}
    tensors = fewbits.open(tmp_path / "compressed").tensors
    for path, module in loaded.named_modules():
        if isinstance(module, LatentLinear):
            q = tensors[f"{path}.weight"].load()
            assert isinstance(q, QTensor) and torch.equal(q.decode(), module.weight), path


def test_fused_experts_and_wrong_tokens_are_named(model: Path, tmp_path: Path) -> None:
    import transformers

    experts = save_tiny("MixtralForCausalLM", tmp_path / "mixtral", **SMALL)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(experts, dtype=torch.float32)
    with pytest.raises(fewbits.ModelError, match="holds experts together, no linear layer; leave it out"):
        fewbits.prepare_qat(loaded, "int4_g32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for tokens in (TOKENS[0], TOKENS.float(), TOKENS + 10**6):
        with pytest.raises(fewbits.CalibrationError, match=r"windows \(w, t\) int64 below \d+, the size of"):
            fewbits.prepare_qat(loaded, "int8_channel", activations="int8_static", tokens=tokens)
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear


def test_too_little_text_is_said_before_anything_is_done(model: Path, tmp_path: Path) -> None:
    text = Tokens.of(TOKENS[:5], "short")
    with pytest.raises(fewbits.PlanError, match=r"train: lr_codes is 2; it is a share"):
        fewbits.quantize(
            model, tmp_path / "o", to="int2_g32", calibrate=text, train=5, training={"lr_codes": 2}
        )
    with pytest.raises(fewbits.PlanError, match="train: 5 windows are too few for batches of 2 and 8"):
        fewbits.quantize(model, tmp_path / "o", to="int2_g32", calibrate=text, train=5, verify=False)


def test_gptq_before_training_sees_the_text_but_for_what_is_held_out(model: Path) -> None:
    run = Run(open_checkpoint(model), {}, METHODS["gptq"], Tokens.of(TOKENS, "text"))
    assert torch.equal(run.calibration, TOKENS)
    trained = replace(run, method=replace(run.method, train=2, train_options={"held_out": 3}))
    assert torch.equal(trained.calibration, TOKENS[:-3])
    windows = torch.arange(4 * BEFORE_TRAINING).view(-1, 512)
    spread = replace(trained, tokens=Tokens.of(windows, "long text")).calibration
    assert spread.numel() == BEFORE_TRAINING and torch.equal(spread[:2], windows[::4][:2])
    assert len(windows) - 8 < spread[-1, 0] // 512 < len(windows) - 3
    little_more = Tokens.of(windows[: BEFORE_TRAINING // 512 + 9], "a little more")
    assert replace(trained, tokens=little_more).calibration.numel() == BEFORE_TRAINING


# ---- a loop of one's own -------------------------------------------------------------------------


@pytest.fixture
def prepared(model: Path) -> Any:
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return fewbits.prepare_qat(loaded, "int4_g32")


def test_trainer_trains_it_and_any_file_type_holds_the_last_weights(prepared: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in TOKENS.tolist()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=12, per_device_train_batch_size=3, learning_rate=3e-3,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=prepared, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    prepared.eval()
    with torch.no_grad():
        wanted = prepared(TOKENS[:2]).logits
    for out, file in (("model.gguf", None), ("native", None), ("compressed", "compressed-tensors")):
        receipt = fewbits.export(prepared, tmp_path / out, file)
        assert {row.format for row in receipt.tensors if "_proj" in row.name} <= {"q4_0", "int4_g32"}
        tensors = fewbits.open(tmp_path / out).tensors
        for path, module in prepared.named_modules():
            if isinstance(module, LatentLinear) and "q_proj" not in path and "k_proj" not in path:
                q = tensors[f"{path}.weight"].load()
                assert isinstance(q, QTensor) and torch.equal(q.decode(), module.weight), path
    found = fewbits.load(tmp_path / "compressed")
    with torch.no_grad():
        assert torch.allclose(found(TOKENS[:2]).logits, wanted, atol=1e-4)
    with torch.no_grad():  # and it goes on
        assert torch.equal(prepared(TOKENS[:2]).logits, wanted)


def test_what_cannot_be_prepared_or_exported_is_refused(prepared: Any, model: Path, tmp_path: Path) -> None:
    with pytest.raises(fewbits.ModelError, match="prepared already"):
        fewbits.prepare_qat(prepared, "q4_0")
    plain = load_model(open_checkpoint(model))
    with pytest.raises(fewbits.ModelError, match="is not prepared; call prepare_qat"):
        fewbits.export(plain, tmp_path / "out")
    prepared.config.name_or_path = "nowhere"
    with pytest.raises(fewbits.ModelError, match="nowhere: not a directory"):
        fewbits.export(prepared, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_saved_one_is_refused_and_goes_on_as_the_error_says(
    prepared: Any, model: Path, tmp_path: Path
) -> None:
    import transformers
    from safetensors.torch import load_file

    with torch.no_grad():
        for part in prepared.parameters():
            if part.ndim == 2:
                part.add_(0.05 * part.abs().mean() * torch.randn(part.shape))
    prepared.save_pretrained(tmp_path / "saved")
    with pytest.raises(fewbits.FileError, match=r"prepare_qat changed; load the model .* load_state_dict"):
        fewbits.open(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    fewbits.prepare_qat(again, "int4_g32")
    assert not torch.equal(again(TOKENS[:1]).logits, prepared(TOKENS[:1]).logits)
    again.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    for name, one in (("a.gguf", prepared), ("b.gguf", again)):
        fewbits.export(one, tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
