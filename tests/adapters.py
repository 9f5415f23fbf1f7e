"""Adapters made and applied by PEFT, to compare with."""

import warnings
from pathlib import Path

import torch

from fewbits.adapters.transformers import load_model
from fewbits.files.open import open_checkpoint

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_adapter(model, seed=0, size=0.3, **given):
    """A transformers model with a new adapter of PEFT whose B is not 0."""
    import peft

    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **given}
    torch.manual_seed(seed)
    with quietly():
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn_like(parameter) / parameter.shape[1])
    return model.eval()


def save_adapter(base: Path, out: Path, seed=0, **given) -> Path:
    """The directory of an adapter of a model on disk, as PEFT saves it."""
    with quietly():
        with_adapter(load_model(open_checkpoint(base)), seed, **given).save_pretrained(
            out, save_embedding_layers=False
        )
    return out


def load_adapter(model, path: Path):
    import peft

    with quietly():
        return peft.PeftModel.from_pretrained(model, path).eval()


def quietly():
    """Without what PEFT says of transformers' newer names, and of a base model that is no directory."""
    caught = warnings.catch_warnings()

    class Quiet:
        def __enter__(self):
            caught.__enter__()
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
            warnings.filterwarnings("ignore", message=".*Could not find a config file")

        def __exit__(self, *given):
            caught.__exit__(*given)

    return Quiet()
