"""`fewbits train`: quantization-aware training, from GPTQ's result to a file of any type."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import PlanError
from ..train.objective import LOSSES
from ..train.optimizer import OPTIMIZERS
from ..train.settings import PRECISIONS
from . import lora, quantize

EXAMPLES = """Quantizes MODEL as `fewbits quantize` does (GPTQ), then trains weights, scales and norms
together so that the quantized model's next-token distributions are those of MODEL (KL divergence). The
forward pass computes with the weights as the file will hold them; gradients pass the rounding straight
through. Every format and file type of `quantize`; the best state by held-out text is written, or GPTQ's.

Memory: about 15 copies of the model in f32. A killed run goes on with the same command.

--lora RANK trains an adapter of low rank instead: MODEL, of any file type, stays packed in memory, and the
output is a directory of PEFT. `fewbits merge` joins the two.

examples:
  fewbits train demo:smollm2 --to q4_0 --calibrate wiki.txt --tokens 524288 --steps 250
  fewbits train ./Llama-3.2-1B --to q3_k_m --calibrate hf:allenai/c4:en:train --tokens 3000000 --steps 1400
  fewbits train ./Qwen3-0.6B --to int2_g64 --file compressed-tensors --calibrate c4.txt --tokens 1000000
  fewbits train Llama-3.2-1B-Q4_K_M.gguf --lora 16 --calibrate mine.txt --tokens 262144 -o mine-lora
  fewbits train ./Llama-3.2-1B --to nf4 --lora 16 --init loftq --calibrate mine.txt -o mine-lora"""

STEPS, BATCH = 100, 4
# Settings of training that have an option of the same name.
SETTINGS = (
    "batch", "micro", "lr", "lr_codes", "damp", "loss", "top_k", "temperature", "precision", "optimizer",
    "clip", "recompute", "every", "held_out", "minutes",
)  # fmt: skip
SHARED = ("batch", "lr", "loss")  # with --lora


def arguments(parser: argparse.ArgumentParser) -> None:
    quantize.arguments(parser)
    group = parser.add_argument_group("training")
    number(group, "--steps", int, f"optimizer steps (default {STEPS})", STEPS)
    number(group, "--batch", int, f"windows a step (default {BATCH})", BATCH)
    number(group, "--micro", int, "windows at once (default: 4096 tokens); gradients of a step are summed")
    number(
        group,
        "--lr",
        float,
        f"largest relative change of a scale or norm in a step (default 0.0005); with --lora {lora.LR:g}",
    )
    number(group, "--lr-codes", float, "largest change of a weight in a step, in spacings (default 0.005)")
    number(group, "--damp", float, "draw weights to what they are rounded to, against swinging (default 0)")
    group.add_argument(
        "--loss",
        choices=LOSSES,
        help="kl: divergence from MODEL (default; with --lora, where the parent is known); next-token; "
        "mix: half of each",
    )
    number(group, "--top-k", int, "keep MODEL's N most probable tokens, once (default: hidden states)")
    number(group, "--temperature", float, "of both distributions (default 1)")
    group.add_argument(
        "--precision", choices=PRECISIONS,
        help="of matrix products: f32, bf16, f16 with loss scaling; auto (default): bf16 where it is faster",
    )  # fmt: skip
    group.add_argument("--optimizer", choices=OPTIMIZERS, help="default adamw; 8 bit: of bitsandbytes")
    number(group, "--clip", float, "largest norm of the gradient (default: none)")
    group.add_argument(
        "--recompute", action="store_true", default=None,
        help="run blocks twice instead of keeping what is inside (gradient checkpointing)",
    )  # fmt: skip
    number(group, "--every", int, "steps between two evaluations on held-out text (default 25)")
    number(group, "--held-out", int, "windows of it (default 8)")
    number(group, "--minutes", float, "minutes between two saved states, at most (default 10)")
    lora.arguments(parser)


def number(group: argparse._ArgumentGroup, name: str, kind: type, help: str, default: Any = None) -> None:
    metavar = "N" if kind is int else "X"
    group.add_argument(name, type=kind, metavar=metavar, help=help, default=default)


def run(given: argparse.Namespace) -> int:
    if given.steps < 1 or given.batch < 1:
        raise PlanError(f"--steps {given.steps}, --batch {given.batch}: at least 1 of each")
    if lora.wanted(given):
        return lora.run(given, [name for name in SETTINGS if name not in SHARED])
    if given.effort == "fast" or given.distill or given.no_search:
        raise PlanError(
            "train starts from GPTQ and trains scales: leave out --effort fast, --distill, --no-search"
        )
    given.train = given.steps
    given.training = {name: getattr(given, name) for name in SETTINGS if getattr(given, name) is not None}
    if given.tokens is None:
        print(
            "fewbits train: 32768 tokens, the default, are few: give --tokens N (and --calibrate FILE)",
            file=sys.stderr,
        )
    return quantize.run(given)
