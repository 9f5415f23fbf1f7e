"""Low-rank adapters over packed weights: PEFT's own, and those of `train --lora`."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import fewbits
from fewbits import Plan
from fewbits.adapters.peft import Factors, Shape, add_adapter, factors_of
from fewbits.adapters.transformers import load_model
from fewbits.calibrate.tokens import Tokens
from fewbits.cli.main import main
from fewbits.errors import CalibrationError, FileError, ModelError, PlanError
from fewbits.files.open import open_checkpoint
from fewbits.runtime.packed import FREED, packed_modules
from fewbits.train.lora import LoraSettings, fit_adapter, next_token, start_from_error
from fewbits.workflow.lora import Lora, Where, train_adapter
from tests.adapters import load_adapter, quietly, with_adapter
from tests.packed_models import IDS, logits, quantized
from tests.tiny import CORPUS, VOCAB

CASES = [("nf4", "native"), ("nf4_dq", "native"), ("q4_k", "gguf"), ("q4_0", "native"), ("int4_g32", "gptq")]
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
BLOCKS_OF_256 = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
WINDOWS = torch.randint(3, VOCAB, (6, 24), generator=torch.Generator().manual_seed(0)).repeat(2, 1)
SHORT = LoraSettings(steps=8, lr=2e-2, batch=2, held_out=6, every=4)
RANK = Lora(Shape(4, 8.0))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """In q4_0; its float parent is `float` beside it."""
    return quantized(tmp_path_factory.mktemp("lora"), to="q4_0", plan=Plan(), **SMALL)


def packed_bytes(model):
    return {
        (name, key): plane.clone()
        for name, _, weight in packed_modules(model)
        for key, plane in weight.named_buffers()
    }


def same_bytes(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


# ---- PEFT over packed weights --------------------------------------------------------------------


@pytest.mark.parametrize(("to", "file"), CASES)
def test_gradients_are_those_of_the_decoded_float_model(tmp_path, to, file):
    """The same adapter of PEFT on the packed model and on its decoded weights as plain parameters."""
    path = quantized(tmp_path, to=to, plan=Plan(), file=file, **(BLOCKS_OF_256 if to == "q4_k" else SMALL))
    packed, plain = (with_adapter(each) for each in (fewbits.load(path), load_model(open_checkpoint(path))))
    blocks = packed.config.num_hidden_layers
    assert len(list(packed_modules(packed))) >= 7 * blocks and not list(packed_modules(plain))
    before = packed_bytes(packed)
    losses = [each(input_ids=IDS, labels=IDS).loss for each in (packed, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in packed.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and len(wanted) == 14 * blocks
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert same_bytes(before, packed_bytes(packed))


@pytest.mark.parametrize(("to", "file"), [("nf4_dq", "native"), ("q4_k", "gguf")])
def test_a_trainer_trains_it_and_peft_loads_what_it_saves(tmp_path, to, file):
    from transformers import Trainer, TrainingArguments

    path = quantized(tmp_path, to=to, plan=Plan(), file=file, **(BLOCKS_OF_256 if to == "q4_k" else SMALL))
    model = with_adapter(fewbits.load(path))
    before = packed_bytes(model)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    settings = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    first = model(input_ids=IDS, labels=IDS).loss
    Trainer(model, settings, train_dataset=rows).train()
    model.eval()
    assert model(input_ids=IDS, labels=IDS).loss < first - 0.1
    assert same_bytes(before, packed_bytes(model))
    with quietly():
        model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(path)
    again = load_adapter(fewbits.load(path), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(fewbits.load(path)))


SCRIPT = """
import sys, warnings, torch, peft, fewbits
from fewbits.adapters.transformers import load_model
from fewbits.files.open import open_checkpoint
from fewbits.memory import peak_memory, reset_peak_memory, resident_memory, return_freed_memory
warnings.simplefilter("ignore")
def took(load, steps):
    return_freed_memory()
    reset_peak_memory()
    before = resident_memory()
    config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.arange(3, 19)[None]
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return peak_memory() - before
fewbits.load(sys.argv[2])(torch.tensor([[1, 2]]))  # libraries are in memory
print(took(lambda: fewbits.load(sys.argv[1]), 2), took(lambda: load_model(open_checkpoint(sys.argv[1])), 0))
"""


def test_memory_is_that_of_packed_weights_and_adapters(tmp_path, model):
    """The peak of two steps, in a process of its own; that of a float model shows that it can fail."""
    path = quantized(
        tmp_path, to="q4_0", plan=Plan(), hidden_size=512, intermediate_size=1536, num_hidden_layers=8
    )
    tensors = open_checkpoint(path).tensors.values()
    floats, held = sum(4 * torch.Size(t.shape).numel() for t in tensors), sum(t.nbytes for t in tensors)
    script = [sys.executable, "-c", SCRIPT, path, model]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    packed, plain = map(int, done.stdout.split()[-2:])
    adapters = 4 * 4 * 8 * 8 * (6 * (512 + 512) + 3 * (512 + 1536))  # values, gradients, two moments
    assert held < packed < held + adapters + FREED + 16 * 2**20 < floats < plain


# ---- train --lora --------------------------------------------------------------------------------


def test_a_trained_adapter_is_one_of_peft(tmp_path, model):
    """The loss that is reported is that of plain PEFT on what was written."""
    out, base = tmp_path / "adapter", open_checkpoint(model)
    before = model.joinpath("model.safetensors").read_bytes()
    trained = train_adapter(base, out, Tokens.of(WINDOWS, "random"), RANK, SHORT)
    assert model.joinpath("model.safetensors").read_bytes() == before
    again = load_adapter(fewbits.load(model), out)
    losses = [float(again(input_ids=row[None], labels=row[None]).loss) for row in WINDOWS[6:]]
    assert trained.best.held_out == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert trained.best.held_out < trained.history[0].held_out - 0.3
    assert trained.loss == "next-token" and len(trained.modules) == 14
    with pytest.raises(FileError, match="exists; choose another output"):
        train_adapter(base, out, Tokens.of(WINDOWS, "random"), RANK, SHORT)


def test_towards_the_parent_the_loss_is_the_kl_divergence(tmp_path, model):
    out, parent = tmp_path / "adapter", open_checkpoint(model.parent / "float")
    settings = LoraSettings(steps=6, lr=2e-3, batch=2, held_out=6, every=6)
    trained = train_adapter(
        open_checkpoint(model),
        out,
        Tokens.of(WINDOWS, "random"),
        Lora(Shape(16, 16.0), start="loftq"),
        settings,
        parent,
    )
    assert trained.loss == "kl" and trained.best.held_out < trained.history[0].held_out
    again, floats = load_adapter(fewbits.load(model), out), load_model(parent)
    with torch.no_grad():
        p, q = (each(WINDOWS[6:]).logits.double().log_softmax(-1) for each in (floats, again))
        plain = fewbits.load(model)(WINDOWS[6:]).logits.double().log_softmax(-1)
    assert trained.best.held_out == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    # LoftQ's start is nearer to the parent than no adapter
    assert trained.history[0].held_out < float((p.exp() * (p - plain)).sum(-1).mean())


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_loftq_begins_at_the_best_approximation_of_its_rank(shape):
    """Eckart and Young: the truncated SVD, by torch."""
    n, k = shape
    error = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    found = Factors(torch.nn.Parameter(torch.zeros(5, k)), torch.nn.Parameter(torch.zeros(n, 5)), 2.5)
    start_from_error(found, error)
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    torch.testing.assert_close(2.5 * found.b @ found.a, u[:, :5] * s[:5] @ v[:5], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.a.norm(), found.b.norm(), rtol=1e-4, atol=1e-4)  # as LoftQ splits it


def test_a_group_adapter_sees_sums_and_its_gradient_is_theirs(model):
    """A of (r, k / group) on sums of x, by autograd, beside one step of SGD's gradient here."""
    made = add_adapter(fewbits.load(model), Shape(2, 2.0), ["model.layers.0.mlp.up_proj"])
    settings = LoraSettings(steps=3, lr=1e-2, batch=2, held_out=6, every=3, group=32)
    fit_adapter(made, WINDOWS, next_token(WINDOWS), settings)
    [(_, found)] = factors_of(made)
    a = found.a.detach()
    assert torch.equal(a, a[:, ::32].repeat_interleave(32, 1)) and bool(found.b.any())
    layer = made.get_base_model().model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    small = a[:, ::32].clone().requires_grad_()
    added = (x.view(3, 2, 32).sum(2) @ small.T) @ found.b.detach().T
    torch.testing.assert_close(layer(x) - layer.base_layer(x), added.detach(), rtol=1e-3, atol=1e-4)
    added.square().sum().backward()
    found.a.grad = None
    (layer(x) - layer.base_layer(x)).square().sum().backward()
    from fewbits.train.lora import summed

    summed(found.a.grad, 32)
    torch.testing.assert_close(found.a.grad[:, ::32], small.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head")])
@pytest.mark.parametrize("group", [None, 32])
def test_an_adapter_of_the_output_layer_is_trained_too(tmp_path, model, targets, group):
    out, settings = tmp_path / "adapter", replace(SHORT, group=group)
    lora = Lora(Shape(4, 8.0), targets)
    trained = train_adapter(open_checkpoint(model), out, Tokens.of(WINDOWS, "random"), lora, settings)
    assert trained.best.held_out < trained.history[0].held_out
    tensors = load_file(out / "adapter_model.safetensors")
    assert all(bool(value.any()) for name, value in tensors.items() if "lora_B" in name)
    assert any("lm_head" in name for name in tensors)


# ---- what is refused -----------------------------------------------------------------------------


def adapter_bytes(path):
    return (path / "adapter_model.safetensors").read_bytes()


def stop_at(step):
    def progress(stage, done, total):
        if stage.startswith("lora") and done == step:
            raise KeyboardInterrupt

    return progress


def test_killed_at_any_step_it_ends_as_if_it_had_not_been(tmp_path, model):
    """With dropout, whose random numbers go on too."""
    base, text = open_checkpoint(model), Tokens.of(WINDOWS, "random")
    lora = Lora(Shape(4, 8.0, 0.1))
    train_adapter(base, tmp_path / "whole", text, lora, SHORT)
    for step in (2, 4, 6, 8):
        out = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            train_adapter(base, out, text, lora, SHORT, where=Where(progress=stop_at(step)))
        state = tmp_path / f"{step}.state"
        assert state.exists() == (step >= 4) and not out.exists()
        train_adapter(base, out, text, lora, SHORT)
        assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole") and not state.exists()


def test_a_state_of_another_run_is_refused(tmp_path, model):
    base, text = open_checkpoint(model), Tokens.of(WINDOWS, "random")
    with pytest.raises(KeyboardInterrupt):
        train_adapter(base, tmp_path / "a", text, RANK, SHORT, where=Where(progress=stop_at(4)))
    for other in (Tokens.of(WINDOWS.flip(0), "flipped"), text):
        settings = replace(SHORT, seed=1) if other is text else SHORT
        with pytest.raises(FileError, match="another model, text or settings"):
            train_adapter(base, tmp_path / "a", other, RANK, settings)
    for shape in (Shape(4, 9.0), Shape(4, 8.0, 0.5)):
        with pytest.raises(FileError, match="another model, text or settings"):
            train_adapter(base, tmp_path / "a", text, Lora(shape), SHORT)
    assert not (tmp_path / "a").exists() and (tmp_path / "a.state").exists()


@pytest.mark.parametrize(
    ("lora", "settings", "error", "said"),
    [
        (Lora(Shape(4, 8.0), ("q_prj",)), SHORT, PlanError, r"called 'q_prj'; there are .*down_proj.*q_proj"),
        (Lora(Shape(4, 8.0), loss="kl"), SHORT, PlanError, r"--parent"),
        (Lora(Shape(4, 8.0), start="loftq"), SHORT, PlanError, r"W - W_q.*--parent"),
        (Lora(Shape(0, 8.0)), SHORT, PlanError, "rank 0"),
        (RANK, LoraSettings(held_out=11), CalibrationError, "12 windows of text, at least 15 .*--context"),
        (RANK, LoraSettings(lr=2.0, held_out=6), PlanError, "lr is 2.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_said(tmp_path, model, lora, settings, error, said):
    with pytest.raises(error, match=said):
        train_adapter(open_checkpoint(model), tmp_path / "out", Tokens.of(WINDOWS, "random"), lora, settings)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_by_name(tmp_path, model):
    base = open_checkpoint(model)
    base.tensors["model.norm.weight"].load()  # fine; the objective is what breaks
    made = add_adapter(fewbits.load(model), Shape(4, 8.0), ["model.layers.0.mlp.up_proj"])

    def broken(i, logits):
        return logits.sum() * (float("nan") if i < 6 else 1.0)

    with pytest.raises(CalibrationError, match=r"the loss of step 1 is nan; use a smaller --lr than 0.02"):
        fit_adapter(made, WINDOWS, broken, SHORT)


def test_a_model_of_another_vocabulary_is_no_parent(tmp_path, model):
    other = quantized(tmp_path, to="q8_0", plan=Plan(), vocab_size=608, **SMALL)
    with pytest.raises(ModelError, match=r"a vocabulary of 608, that of .* has 600; it is not its parent"):
        train_adapter(
            open_checkpoint(model),
            tmp_path / "out",
            Tokens.of(WINDOWS, "random"),
            RANK,
            SHORT,
            open_checkpoint(other),
        )


def test_the_command_quantizes_first_and_names_what_it_trained_on(tmp_path, monkeypatch, capsys, model):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text(CORPUS * 4, encoding="utf-8")
    run = ["--calibrate", str(text), "--tokens", "1024", "--context", "32", "--steps", "4", "--lr", "0.01"]
    first = ["train", str(model.parent / "float"), "--to", "int4_g32", "--effort", "fast", "--no-verify"]
    assert main([*first, "--lora", "4", "--batch", "2", "-o", "adapter", *run]) == 0
    said = capsys.readouterr().out
    assert "held-out kl loss" in said and "wrote adapter: 8192 numbers on 14 linear layers" in said
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "float-int4_g32")
    load_adapter(fewbits.load("float-int4_g32"), tmp_path / "adapter")
    assert main([*first, "--lora", "4", "-o", "other", *run]) == 1
    assert "float-int4_g32: exists; train on it: fewbits train float-int4_g32" in capsys.readouterr().err
    assert main(["train", "float-int4_g32", "--init", "loftq", *run[:2]]) == 1
    assert "--init: of an adapter; give --lora RANK too" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--lora", "4", "--loss", "mix"], "loss 'mix' is unknown"),
        (["--lora", "0"], "rank 0"),
        (["--lora", "4", "--lora-dropout", "2"], "dropout 2"),
        (["--lora", "4", "--lora-targets", "q_prj"], "no linear layer is called 'q_prj'"),
        (
            ["--lora", "4", "--lora-group", "32", "--init", "loftq"],
            "leave one of --init loftq, --lora-group out",
        ),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_quantized(
    tmp_path, monkeypatch, capsys, model, wrong, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(CORPUS, encoding="utf-8")
    given = ["train", str(model.parent / "float"), "--to", "int4_g32", "--calibrate", "text.txt", *wrong]
    assert main(given) == 1
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_json_is_one_document(tmp_path, monkeypatch, capsys, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(CORPUS * 4, encoding="utf-8")
    run = ["--calibrate", "text.txt", "--tokens", "1024", "--context", "32", "--steps", "2", "--lora", "4"]
    first = ["train", str(model.parent / "float"), "--to", "int4_g32", "--effort", "fast", "--no-verify"]
    for out, given in (("a", first), ("b", ["train", "float-int4_g32"])):
        assert main([*given, *run, "-o", out, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["out"], found["parameters"]) == (out, 8192) and found["history"][0]["step"] == 0
    assert main(["train", "float-int4_g32", *run, "-o", "c", "--no-verify"]) == 1
    assert "--no-verify: how a float model is quantized" in capsys.readouterr().err


def test_an_adapter_is_replaced_only_when_asked(tmp_path, model):
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "mine.txt").write_text("kept", encoding="utf-8")
    where = Where(overwrite=True)
    with pytest.raises(FileError, match="exists; not an adapter"):
        train_adapter(open_checkpoint(model), out, Tokens.of(WINDOWS, "random"), RANK, SHORT, None, where)
    assert (out / "mine.txt").read_text() == "kept"
