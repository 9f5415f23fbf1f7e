"""What training minimizes, and with what arithmetic: gradients are those of autograd of the plain formula."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional

from fewbits.adapters.transformers import load_model
from fewbits.errors import CalibrationError, FileError
from fewbits.files.checkpoint import Checkpoint
from fewbits.files.open import open_checkpoint
from fewbits.runtime.runner import Blockwise
from fewbits.train import loop as training
from fewbits.train.distill import DistillSettings, distill
from fewbits.train.objective import Distributions, loss_and_gradient
from fewbits.train.optimizer import OPTIMIZERS, optimizer_of
from tests.test_distill import SMALL, TOKENS, equal, in_format, off, stop_at
from tests.tiny import save_tiny

MAKE = torch.Generator().manual_seed(0)
PARENT = 3 * torch.randn(7, 50, generator=MAKE)
LOGITS = PARENT + torch.randn(7, 50, generator=MAKE)
WINDOW = torch.randint(50, (7,), generator=MAKE)
ALL = slice(0, 7)
SHORT = DistillSettings(steps=6, lr=4e-3, lr_vectors=4e-3, batch=4, held_out=3, every=3, lr_codes=0.03)


def plain(logits: torch.Tensor, share: float, temperature: float) -> torch.Tensor:
    """The loss by torch's own functions."""
    log_q = (logits / temperature).log_softmax(-1)
    kl = functional.kl_div(
        log_q, (PARENT / temperature).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return share * temperature**2 * kl + (1 - share) * functional.cross_entropy(logits[:-1], WINDOW[1:])


@pytest.mark.parametrize(("share", "temperature"), [(1.0, 1.0), (1.0, 2.5), (0.0, 1.0), (0.5, 2.0)])
def test_loss_and_gradient_are_those_of_autograd(share: float, temperature: float) -> None:
    leaf = LOGITS.clone().requires_grad_()
    wanted = plain(leaf, share, temperature)
    wanted.backward()
    parent = Distributions.of(PARENT, temperature, 0)
    loss, gradient = loss_and_gradient(LOGITS, parent, WINDOW, ALL, share, temperature)
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert leaf.grad is not None and torch.allclose(gradient, leaf.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("share", "k"), [(1.0, 0), (1.0, 5), (0.0, 0), (0.5, 5)])
def test_a_window_in_parts_is_the_same(share: float, k: int) -> None:
    whole, wanted = loss_and_gradient(LOGITS, Distributions.of(PARENT, 2.0, k), WINDOW, ALL, share, 2.0)
    parts = [
        loss_and_gradient(LOGITS[at], Distributions.of(PARENT[at], 2.0, k), WINDOW, at, share, 2.0)
        for at in (slice(0, 3), slice(3, 6), slice(6, 7))
    ]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole, rel=1e-5)
    assert torch.allclose(torch.cat([gradient for _, gradient in parts]), wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_rest_of_the_mass_is_one_event(temperature: float) -> None:
    """KL over k + 1 events, by autograd; at most that of all, which it is where k is the vocabulary."""
    parent = Distributions.of(PARENT, temperature, 5)
    assert parent.ids is not None
    leaf = LOGITS.clone().requires_grad_()

    def events(z: torch.Tensor) -> torch.Tensor:
        p = (z / temperature).softmax(-1)
        top = p.gather(-1, parent.ids)  # type: ignore[arg-type]
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)

    p, q = events(PARENT), events(leaf)
    wanted = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    wanted.backward()
    loss, gradient = loss_and_gradient(LOGITS, parent, WINDOW, ALL, 1.0, temperature)
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert leaf.grad is not None and torch.allclose(gradient, leaf.grad, rtol=1e-3, atol=1e-6)
    whole, _ = loss_and_gradient(
        LOGITS, Distributions.of(PARENT, temperature, 0), WINDOW, ALL, 1.0, temperature
    )
    assert 0 < loss < whole
    every, _ = loss_and_gradient(
        LOGITS, Distributions.of(PARENT, temperature, 50), WINDOW, ALL, 1.0, temperature
    )
    assert every == pytest.approx(whole, rel=1e-4)


def test_the_rest_of_a_sure_student_is_exact() -> None:
    """Of 1 - the sum of its k largest probabilities, f32 would have nothing left."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(7, 4000, generator=generator)
    z[:, :4] += torch.tensor([34.0, 33.0, 32.0, 31.0])
    parent = torch.randn(7, 4000, generator=generator)
    parent[:, :4] += torch.tensor([22.0, 21.0, 20.0, 19.0])
    given = Distributions.of(parent, 1.0, 4)
    assert given.ids is not None and set(given.ids.flatten().tolist()) <= set(range(4))
    _, gradient = loss_and_gradient(z, given, torch.zeros(7, dtype=torch.int64), ALL, 1.0)
    p, q = parent.double().softmax(-1), z.double().softmax(-1)
    r, s = p[:, 4:].sum(-1, keepdim=True), q[:, 4:].sum(-1, keepdim=True)
    assert float(s.max()) < 1e-7 < float(r.min())
    wanted = torch.cat([q[:, :4] - p[:, :4], q[:, 4:] * (1 - r / s)], -1) / 7
    assert float((gradient - wanted).abs().sum()) < 1e-3 * float(wanted.abs().sum()) + 1e-6


@pytest.mark.parametrize("loss", ["next-token", "mix"])
def test_what_is_trained_is_what_decides(
    reference: Checkpoint, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loss == "next-token":
        monkeypatch.setattr("fewbits.train.distill.teacher_of", None)  # the parent is not run
    quantized = in_format(reference, "q4_0")
    rows = TOKENS[:3].repeat(4, 1)  # a text to learn
    settings = replace(SHORT, steps=12, every=4, loss=loss, lr=2e-2, lr_vectors=2e-2)
    done = distill(reference, quantized, rows, settings)
    assert done.after < done.before and done.tensors
    whole = load_model(quantized)
    with torch.no_grad():
        nll = functional.cross_entropy(whole(rows[-3:]).logits[:, :-1].flatten(0, 1), rows[-3:, 1:].flatten())
    if loss == "next-token":
        assert done.before == pytest.approx(float(nll), rel=1e-4)
        assert "next-token loss" in done.notes[0]


def test_an_overflow_of_f16_names_its_module(reference: Checkpoint) -> None:
    tensors = dict(reference.tensors)
    for name, factor in (("up_proj", 1e6), ("down_proj", 1e-6)):
        name = f"model.layers.0.mlp.{name}.weight"
        w = tensors[name].load()
        assert isinstance(w, torch.Tensor)
        tensors[name] = replace(tensors[name], load=partial(torch.mul, w, factor))
    large = replace(reference, tensors=tensors)
    quantized = in_format(large, "int8_channel")
    assert distill(large, quantized, TOKENS, replace(SHORT, steps=1)).before < 1
    with pytest.raises(
        CalibrationError, match=r"not finite is that of model.*up_proj; f16 ends at 65504: use"
    ):
        distill(large, quantized, TOKENS, replace(SHORT, precision="f16"))


def test_a_head_that_asks_the_decoder_inside(tmp_path: Path) -> None:
    """OPT's."""
    config = transformers.OPTConfig(
        vocab_size=600, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=64, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    opt = open_checkpoint(tmp_path / "opt")
    done = distill(opt, in_format(opt, "int2_g32"), TOKENS, replace(SHORT, steps=12, every=6, lr_codes=0.02))
    assert done.after < done.before


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("reference"), **SMALL))


def test_the_parent_is_not_run_again_where_its_tokens_are_kept(
    reference: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = off(in_format(reference, "q4_0"))
    settings = replace(SHORT, top_k=20, state=tmp_path / "state")
    whole = distill(reference, quantized, TOKENS, replace(settings, state=None))
    assert whole.after < whole.before
    assert equal(distill(reference, quantized, TOKENS, settings), whole)
    (tmp_path / "state").unlink()

    def run_again(self: Blockwise, i: int) -> None:
        raise AssertionError("the parent is run")

    monkeypatch.setattr(Blockwise, "step", run_again)
    assert equal(distill(reference, quantized, TOKENS, settings), whole)
    with pytest.raises(FileError, match="other text or settings"):
        distill(reference, quantized, TOKENS, replace(settings, top_k=10))
    kept = tmp_path / "state.teacher"
    kept.write_bytes(kept.read_bytes()[:500])
    with pytest.raises(FileError, match="not a parent's distributions"):
        distill(reference, quantized, TOKENS, settings)


def test_windows_at_once_do_not_change_the_result_and_neither_does_recomputing(reference: Checkpoint) -> None:
    quantized = off(in_format(reference, "q4_0"))
    whole = distill(reference, quantized, TOKENS, replace(SHORT, steps=3))
    for other in (replace(SHORT, steps=3, micro=1), replace(SHORT, steps=3, recompute=True)):
        found = distill(reference, quantized, TOKENS, other)
        # The same sums in another order; Adam's first steps are the sign of each.
        assert found.after == pytest.approx(whole.after, rel=2e-2)
        assert found.history[-1].learned == pytest.approx(whole.history[-1].learned, rel=2e-2)
    assert whole.after < whole.before


@pytest.mark.parametrize("loss", ["next-token", "mix"])
def test_other_losses_fall(reference: Checkpoint, loss: str) -> None:
    tokens = (torch.arange(24) % 7 + 5).expand(20, 24).contiguous()  # a text that can be learned
    settings = replace(SHORT, steps=20, every=5, loss=loss)
    learned = [j.learned for j in distill(reference, in_format(reference, "q4_0"), tokens, settings).history]
    assert learned[1] is not None and learned[-1] is not None and learned[-1] < 0.8 * learned[1]


def test_bf16_gains_what_f32_gains(reference: Checkpoint) -> None:
    quantized = off(in_format(reference, "int4_g32"))
    gains = []
    for precision in ("f32", "bf16"):
        done = distill(reference, quantized, TOKENS, replace(SHORT, steps=12, precision=precision))
        gains.append(done.before - done.after)
    assert gains[1] == pytest.approx(gains[0], rel=0.1) and gains[0] > 0


def test_f16_scales_its_loss_and_skips_steps_that_overflow(
    reference: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micikevicius et al., arXiv 1710.03740: a factor too large overflows f16 and is halved, the step left
    out; after four good steps it is doubled."""
    quantized = off(in_format(reference, "int4_g32"))
    runs: list[training.Loop] = []
    made = training.Loop.__init__

    def watched(self: training.Loop, *given: object) -> None:
        made(self, *given)  # type: ignore[arg-type]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=4)
        runs.append(self)

    monkeypatch.setattr(training.Loop, "__init__", watched)
    scales: list[tuple[float, bool]] = []
    advance = training.Loop.advance

    def stepped(self: training.Loop) -> None:
        before = self.a.clone()
        advance(self)
        scales.append((self.scaler.get_scale(), torch.equal(before, self.a)))

    monkeypatch.setattr(training.Loop, "advance", stepped)
    done = distill(reference, quantized, TOKENS, replace(SHORT, steps=40, every=10, precision="f16"))
    assert done.after < done.before
    scale, good, doubled = 2.0**40, 0, 0
    for found, skipped in scales:
        scale, good = (scale / 2, 0) if skipped else (scale, good + 1)
        if good == 4:
            scale, good, doubled = 2 * scale, 0, doubled + 1
        assert found == scale
    assert doubled > 1 and runs[0].skipped == sum(skipped for _, skipped in scales) > 3


def codes_of(run: training.Loop) -> list[torch.Tensor]:
    with torch.no_grad():
        return [module.grid_now().round(module.latent) for module in run.student.latents.values()]


def test_weights_that_are_drawn_to_their_codes_swing_less(reference: Checkpoint) -> None:
    quantized = off(in_format(reference, "int2_g32"))
    tokens = torch.randint(3, 500, (40, 24), generator=torch.Generator().manual_seed(0))
    changes = []
    for damp in (0.0, 20.0):
        settings = replace(SHORT, steps=30, every=30, held_out=8, lr_codes=0.05, damp=damp)
        flips: list[int] = []
        advance = training.Loop.advance

        def counted(self: training.Loop, advance=advance, flips=flips) -> None:  # type: ignore[no-untyped-def]
            codes = codes_of(self)
            advance(self)
            self.student.write(self.start + self.unit * self.a)
            pairs = zip(codes, codes_of(self), strict=True)
            flips.append(sum(int((a != b).sum()) for a, b in pairs))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.Loop, "advance", counted)
            distill(reference, quantized, tokens, settings)
        changes.append(sum(flips[15:25]))
    assert changes[1] < 0.7 * changes[0]


def test_a_loss_that_is_not_finite_names_step_and_site(
    reference: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = training.Loop.advance

    def broken(self: training.Loop) -> None:
        if self.step == 2:
            linear = self.student.latents["model.layers.1.mlp.up_proj.weight"]
            linear.bias = torch.nn.Parameter(torch.full((96,), float("nan")))
        advance(self)

    monkeypatch.setattr(training.Loop, "advance", broken)
    with pytest.raises(
        CalibrationError, match=r"the loss of step 3 is nan; .* model\.layers\.1\.mlp\.up_proj"
    ):
        distill(reference, in_format(reference, "q4_0"), TOKENS, SHORT)


@pytest.mark.engine
def test_an_8_bit_optimizer_trains_and_goes_on_after_a_kill(reference: Checkpoint, tmp_path: Path) -> None:
    """bitsandbytes keeps moments in 8 bits where a part has 4096 numbers or more."""
    pytest.importorskip("bitsandbytes")
    quantized = off(in_format(reference, "int4_g32"))
    plain = distill(reference, quantized, TOKENS, SHORT)
    settings = replace(SHORT, optimizer="adamw_8bit", state=tmp_path / "state")
    whole = distill(reference, quantized, TOKENS, replace(settings, state=None))
    assert whole.before - whole.after > 0.8 * (plain.before - plain.after) > 0
    with pytest.raises(KeyboardInterrupt):
        distill(reference, quantized, TOKENS, settings, stop_at(4))
    assert equal(distill(reference, quantized, TOKENS, settings), whole)


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind])
def test_an_optimizer_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(CalibrationError, match=f"{name} is of bitsandbytes, which is not installed"):
        optimizer_of(name, [{"params": [torch.nn.Parameter(torch.ones(3))]}], torch.device("cpu"))


def test_senseless_settings_are_listed(reference: Checkpoint) -> None:
    wrong = replace(SHORT, loss="l2", precision="int8", optimizer="lion", temperature=0.0, top_k=-1, micro=0)
    with pytest.raises(CalibrationError) as e:
        distill(reference, reference, TOKENS, wrong)
    for text in (
        "loss is 'l2'",
        "precision is 'int8'",
        "'lion'; known: adamw",
        "temperature",
        "top_k",
        "micro",
    ):
        assert text in str(e.value)
