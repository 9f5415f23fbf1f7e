"""`fewbits convert`: write the same codes as another file type."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files.open import FILE_TYPES
from ..runtime.program import SUFFIX, save_program
from ..workflow.options import Options
from ..workflow.quantize import conclude, opened
from ..workflow.request import Request
from ..workflow.run import run as convert
from .progress import ByteProgress
from .verify import concluded, verify_arguments

EXAMPLES = """examples:
  fewbits convert smollm2-native smollm2.gguf
  fewbits convert ./Llama-3.2-1B Llama-3.2-1B-BF16.gguf
  fewbits convert distilbert-int8 distilbert.pt2                a program of torch.export
  fewbits convert model-Q4_0.gguf model-gptq --to gptq          q4_0 equals int4_g32: no value changes
  fewbits convert model-Q4_K_M.gguf model-gptq --to gptq --requantize"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("out", metavar="OUT", type=Path, help=".gguf file, .pt2 file or directory")
    parser.add_argument(
        "--to", metavar="TYPE", choices=tuple(FILE_TYPES),
        help=f"file type: {', '.join(FILE_TYPES)} (default: from the name of OUT)",
    )  # fmt: skip
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="quantize again the weights that the file type cannot store exactly, and report the error",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--json", action="store_true", help="print the receipt as JSON")
    verify_arguments(parser)


def run(given: argparse.Namespace) -> int:
    checkpoint, _ = opened(given.model, given.cache_dir)
    if given.to is None and given.out.suffix == SUFFIX:
        apart = save_program(checkpoint, given.out, given.overwrite)
        print(f"wrote {given.out}; loaded again, its output is the model's within {apart:.2g} of the largest")
        return 0
    with ByteProgress("convert") as progress:
        request = Request(file=given.to, overwrite=given.overwrite, requantize=given.requantize)
        receipt = convert(checkpoint, given.out, request, progress)
    options = Options(
        verify=not given.no_verify, verify_seconds=given.verify_seconds, verify_memory=given.verify_memory
    )
    receipt, code = concluded(*conclude(receipt, checkpoint, given.out, options), given.out, given.push)
    print(receipt.to_json() if given.json else f"{receipt.table()}\n\nwrote {given.out}")
    return code
