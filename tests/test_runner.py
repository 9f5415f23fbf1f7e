"""Every Runner gives transformers' own logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fewbits.errors import ModelError
from fewbits.files.open import open_checkpoint
from fewbits.runtime.runner import Blockwise, Whole, choose
from fewbits.workflow.request import Request
from fewbits.workflow.run import run
from tests.tiny import save_tiny

ARCHITECTURES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM"]
WINDOWS = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float_models_give_what_transformers_gives(tmp_path, architecture):
    path = save_tiny(architecture, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = model(WINDOWS).logits[:, 7:]
    checkpoint = open_checkpoint(path)
    for runner in (Whole(checkpoint), Blockwise(checkpoint)):
        for given, got in zip(wanted, runner.logits(WINDOWS, 7), strict=True):
            torch.testing.assert_close(got, given, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["q4_k_m", "int4_g32"])
def test_quantized_models_give_what_their_decoded_weights_give(tmp_path, to):
    path = save_tiny("LlamaForCausalLM", tmp_path / "m")
    run(path, tmp_path / "q", Request(to=to, file="native"))
    checkpoint = open_checkpoint(tmp_path / "q")
    wanted = list(Whole(checkpoint).logits(WINDOWS))
    for runner in (Whole(checkpoint, packed=True), Blockwise(checkpoint)):
        for given, got in zip(wanted, runner.logits(WINDOWS), strict=True):
            torch.testing.assert_close(got, given, rtol=1e-4, atol=1e-4)


def test_the_first_that_fits_is_taken_and_none_is_an_error_with_numbers(tmp_path):
    path = save_tiny("LlamaForCausalLM", tmp_path / "m")
    checkpoint = open_checkpoint(path)
    assert choose(checkpoint, 3, 40).kind == "whole, float32"
    blockwise = Blockwise(checkpoint).needs(3, 40)
    assert blockwise < Whole(checkpoint).needs(3, 40)
    assert choose(checkpoint, 3, 40, memory=blockwise).kind == "block by block"
    with pytest.raises(
        ModelError, match=r"0\.00 GiB of memory are free, running it needs whole, float32 0\.\d"
    ):
        choose(checkpoint, 3, 40, memory=2**20)
