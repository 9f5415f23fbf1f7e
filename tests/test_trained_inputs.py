"""Activations that are quantized while a model is trained: gradients, learned ranges, the file's record."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbits
from fewbits.activations.integer import IntegerModule
from fewbits.activations.quantizers import SCHEMES, Affine, Quantizer
from fewbits.activations.record import activations_of, record
from fewbits.adapters.transformers import load_model
from fewbits.blocks.simulate import changed_inputs
from fewbits.calibrate.tokens import Tokens
from fewbits.files.checkpoint import Checkpoint
from fewbits.files.open import open_checkpoint
from fewbits.train.distill import DistillSettings, distill
from fewbits.train.inputs import FakeInput
from fewbits.train.ste import LatentLinear
from tests.test_distill import SMALL, TOKENS, holding, in_format, off
from tests.test_integer import reference_scaled
from tests.tiny import save_tiny

INTEGERS = ("weight", "bias", "multiplier", "shift")
SHORT = DistillSettings(steps=30, lr=1e-2, lr_vectors=4e-3, batch=4, held_out=3, every=10)


@pytest.mark.parametrize("name", ["int8_static", "int8_asymmetric_static"])
def test_gradients_are_those_of_lsq(name: str) -> None:
    """Against autograd through torch's own fake quantization with a learned step."""
    x = torch.randn(40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    zero, scheme = (0.0 if name == "int8_static" else 20.0), SCHEMES.get(name)
    module = FakeInput(
        Quantizer(scheme, Affine(torch.tensor(0.013), torch.tensor(zero))), torch.device("cpu")
    )
    weight = torch.arange(40.0) - 17
    (module(x) * weight).sum().backward()
    other = x.detach().clone().requires_grad_()
    step, at = torch.tensor([0.013], requires_grad=True), torch.tensor([zero], requires_grad=True)
    wanted = torch._fake_quantize_learnable_per_tensor_affine(
        other, step, at, int(scheme.smallest), int(scheme.largest), 1.0
    )
    assert torch.allclose(module(x), wanted, atol=1e-6)
    (wanted * weight).sum().backward()
    assert module.scale is not None and module.scale.grad is not None
    assert torch.allclose(x.grad, other.grad) and 0 < float((x.grad == 0).double().mean()) < 0.5  # type: ignore[arg-type,union-attr]
    assert torch.allclose(module.scale.grad, step.grad, rtol=1e-4)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("reference"), **SMALL))


def narrow(model: Checkpoint, scheme: str, windows: torch.Tensor | None) -> dict[str, Any]:
    """The record of a scheme with ranges twice too narrow, which training must mend."""
    said = record(model, scheme, windows)
    said["ranges"] = {site: [step / 2, zero] for site, (step, zero) in said["ranges"].items()}
    return said


def simulated(reference: Checkpoint, model: Checkpoint, said: dict[str, object]) -> float:
    """KL on the windows held out, with inputs quantized as the record says, by the code that evaluates."""
    loaded, activations = load_model(model), activations_of(said)
    with torch.no_grad():
        p = load_model(reference)(TOKENS[-3:], use_cache=False).logits.log_softmax(-1)
        with changed_inputs(loaded, activations.change):
            q = loaded(TOKENS[-3:], use_cache=False).logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("scheme", ["int8_static", "int8_asymmetric_static", "fp8_static", "int4_dynamic"])
def test_a_model_is_trained_as_it_will_run(reference: Checkpoint, scheme: str) -> None:
    quantized = off(in_format(reference, "int4_g32"))
    said = narrow(quantized, scheme, TOKENS) if scheme.endswith("static") else record(quantized, scheme, None)
    done = distill(reference, quantized, TOKENS, replace(SHORT, lr_codes=0.05), activations=said)
    assert done.activations is not None and done.after < 0.9 * done.before
    assert simulated(reference, quantized, said) == pytest.approx(done.before, rel=1e-3)
    better = holding(quantized, done.tensors)
    assert simulated(reference, better, done.activations) == pytest.approx(done.after, rel=1e-3)
    if "ranges" in said:
        moved = [done.activations["ranges"][site][0] / step for site, (step, _) in said["ranges"].items()]
        assert sum(moved) / len(moved) > 1.02


def test_the_file_records_the_trained_ranges(
    reference: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbits.workflow.blockwise.run.record", narrow)
    receipt = fewbits.quantize(
        reference.path, tmp_path / "out", to="int8_channel", activations="int8_static",
        calibrate=Tokens.of(TOKENS, "test"), file="compressed-tensors", verify=False, train=15,
        training={"batch": 4, "held_out": 3, "every": 5, "lr": 0.01},
    )  # fmt: skip
    assert any("trained: KL" in note for note in receipt.notes)
    start = narrow(fewbits.open(tmp_path / "out"), "int8_static", TOKENS)
    trained = fewbits.open(tmp_path / "out").metadata["activations"]
    assert trained["scheme"] == "int8_static" and trained["ranges"].keys() == start["ranges"].keys()
    wider = [trained["ranges"][site][0] / step for site, (step, _) in start["ranges"].items()]
    assert 1.02 < sum(wider) / len(wider) < 2


@pytest.mark.parametrize(("scheme", "least"), [("int8_asymmetric_static", -128), ("int8_static", -127)])
def test_a_prepared_model_ends_as_integers(
    reference: Checkpoint, tmp_path: Path, scheme: str, least: int
) -> None:
    """Trained by a plain loop with int8 in- and outputs; then each layer's integers are those of the rule of
    Jacob et al. in Python's own, and within one of the fake-quantized pass; the file has the same ranges."""
    import transformers
    from safetensors.torch import load_file, save_file

    model = transformers.AutoModelForCausalLM.from_pretrained(reference.path, dtype=torch.float32)
    fewbits.prepare_qat(model, "int8_channel", activations=scheme, tokens=TOKENS, outputs=True)
    parameters = [p for name, p in model.named_parameters() if "_proj" in name]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    fewbits.export(model, tmp_path / "out", "compressed-tensors")
    ranges = fewbits.open(tmp_path / "out").metadata["activations"]["ranges"]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    paths = [path for path, module in model.named_modules() if isinstance(module, LatentLinear)]

    def watch(path: str) -> Any:
        return lambda module, given, out: seen.update({path: (given[0].detach(), out.detach())})

    hooks = [model.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
    with torch.no_grad():
        model(TOKENS[:2])
    for handle in hooks:
        handle.remove()
    fewbits.integer_only(model)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "state")
    state = load_file(tmp_path / "state")
    lowest = []
    for path in paths:
        module = model.get_submodule(path)
        assert isinstance(module, IntegerModule)
        x, y = seen[path]
        scale, zero, out_scale, out_zero, smallest = state[f"{path}.ranges"].tolist()
        assert smallest == least
        assert ranges[f"{path}.weight"] == [scale, int(zero)]
        for given in (x, 4 * x):  # the second saturates
            codes = (given / scale).round().add(zero).clamp(least, 127)[0, :3].to(torch.int64).tolist()
            layer = [state[f"{path}.{name}"].tolist() for name in INTEGERS]
            rows = [reference_layer(row, *layer, (int(zero), int(out_zero)), least) for row in codes]
            assert module.codes(given)[0, :3].tolist() == rows
            lowest.append(min(min(row) for row in (*codes, *rows)))
        off = (module(x) - y) / out_scale
        assert float(off.abs().max()) < 1.001 and float((off.abs() > 0.5).double().mean()) < 0.01
    assert min(lowest) == least


def reference_layer(
    x: list[int], weight: list[list[int]], bias: list[int], multiplier: list[int], shift: list[int],
    zeros: tuple[int, int], least: int,
) -> list[int]:  # fmt: skip
    """Jacob et al., section 2.2 to 2.4, in Python's integers."""
    out = []
    for row, b, m, n in zip(weight, bias, multiplier, shift, strict=True):
        total = sum(w * (each - zeros[0]) for w, each in zip(row, x, strict=True)) + b
        out.append(max(least, min(127, reference_scaled(total, m, n) + zeros[1])))
    return out


def test_what_is_not_all_integers_is_refused(reference: Checkpoint) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(reference.path, dtype=torch.float32)
    with pytest.raises(fewbits.ModelError, match="has no prepared layer; call prepare_qat first"):
        fewbits.integer_only(model)
    with pytest.raises(
        fewbits.CalibrationError, match="int8_static: its ranges come from a text; give tokens"
    ):
        fewbits.prepare_qat(model, "int8_channel", activations="int8_static")
    fewbits.prepare_qat(model, "int8_channel", activations="int8_dynamic")
    with pytest.raises(
        fewbits.ModelError, match="with int8_dynamic is not all integers; prepare it with int8"
    ):
        fewbits.integer_only(model)
