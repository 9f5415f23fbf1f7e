"""`fewbits convert`: another file type, the same codes."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..adapters.hub import resolve
from ..files.layout import LAYOUTS
from ..files.open import open_checkpoint
from ..workflow.quantize import convert
from .progress import ByteProgress
from .verify import concluded, verify_arguments

HELP = "write a model to another file type without quantizing again"
EXAMPLES = """examples:
  fewbits convert smollm2-native smollm2.gguf
  fewbits convert ./Llama-3.2-1B Llama-3.2-1B-BF16.gguf
  fewbits convert model-Q4_0.gguf model-gptq --to gptq          q4_0 is int4_g32: not a value changes
  fewbits convert model-Q4_K_M.gguf model-gptq --to gptq --requantize"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("out", metavar="OUT", type=Path, help=".gguf file or directory")
    parser.add_argument(
        "--to", metavar="TYPE", choices=("gguf", *LAYOUTS),
        help=f"file type: gguf, {', '.join(LAYOUTS)} (default: by the name of OUT)",
    )  # fmt: skip
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="quantize again what the file type cannot carry exactly, and tell the added error",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--json", action="store_true", help="print the receipt as JSON")
    verify_arguments(parser)


def run(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(resolve(options.model, options.cache_dir))
    with ByteProgress("convert") as progress:
        receipt = convert(
            checkpoint, options.out, options.to, options.overwrite, progress, options.requantize
        )
    receipt, code = concluded(receipt, checkpoint, options.out, options)
    print(receipt.to_json() if options.json else f"{receipt.table()}\n\nwrote {options.out}")
    return code
