"""`fewbits train`: quantization-aware training, from GPTQ's result to a file of any type."""

from __future__ import annotations

import argparse
import sys

from ..errors import PlanError
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


def arguments(parser: argparse.ArgumentParser) -> None:
    quantize.arguments(parser)
    group = parser.add_argument_group("training")
    group.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help=f"optimizer steps (default {STEPS})"
    )
    group.add_argument(
        "--batch", type=int, default=BATCH, metavar="N", help=f"windows a step (default {BATCH})"
    )
    group.add_argument(
        "--lr-codes", type=float, metavar="X",
        help="largest change of a weight in a step, in spacings of its grid (default 0.001)",
    )  # fmt: skip
    lora.arguments(parser)


def run(given: argparse.Namespace) -> int:
    if given.steps < 1 or given.batch < 1:
        raise PlanError(f"--steps {given.steps}, --batch {given.batch}: at least 1 of each")
    if lora.wanted(given):
        return lora.run(given)
    if given.effort == "fast" or given.distill:
        raise PlanError("train starts from GPTQ and trains scales: leave out --effort fast, --distill")
    given.train = given.steps
    if given.tokens is None:
        print(
            "fewbits train: 32768 tokens of text, the default, are few: give --calibrate FILE and --tokens N",
            file=sys.stderr,
        )
    return quantize.run(given)
