"""Quantized tiny models, opened by transformers and compared plane by plane."""

import torch

from fewbits import Plan, Rule
from fewbits.files.open import open_checkpoint
from fewbits.workflow.request import Request
from fewbits.workflow.run import run
from tests.tiny import save_tiny

IDS = torch.arange(1, 25).reshape(2, 12)
EVERYTHING = Plan((Rule("*embed_tokens", "q8_0"), Rule("*.v_proj", "nf4_dq"), Rule("*.down_proj", "nvfp4")))


def quantized(path, architecture="LlamaForCausalLM", to="int4_g128", plan=EVERYTHING, file="native", **given):
    """A tiny model's directory, quantized -> the new one."""
    source = save_tiny(architecture, path / "float", **given)
    out = path / ("model.gguf" if file == "gguf" else "quantized")
    run(source, out, Request(to=to, plan=plan, file=file))
    return out


def auto(path, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def planes(path):
    """(tensor, plane) -> its bytes; floats have no plane."""
    found = {}
    for name, tensor in open_checkpoint(path).tensors.items():
        value = tensor.load()
        parts = {"": value} if isinstance(value, torch.Tensor) else value.planes
        found |= {(name, p): part.reshape(-1).clone().view(torch.uint8).tolist() for p, part in parts.items()}
    return found
