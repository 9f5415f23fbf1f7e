"""`fewbits convert`: another file type, the same codes."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..adapters.hub import resolve
from ..files.open import open_checkpoint
from ..pipeline import convert
from .progress import ByteProgress

HELP = "write a model to another file type without quantizing again"
EXAMPLES = """examples:
  fewbits convert smollm2-native --out smollm2.gguf
  fewbits convert ./Llama-3.2-1B --out Llama-3.2-1B-BF16.gguf
  fewbits convert model-Q4_K_M.gguf --out model-native"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--out", type=Path, metavar="PATH", required=True, help=".gguf file or directory")
    parser.add_argument("--file", choices=("gguf", "native"), help="output file type (default: by --out)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--json", action="store_true", help="print the receipt as JSON")


def run(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(resolve(options.model, options.cache_dir))
    with ByteProgress("convert") as progress:
        receipt = convert(checkpoint, options.out, options.file, options.overwrite, progress)
    print(receipt.to_json() if options.json else f"{receipt.table()}\n\nwrote {options.out}")
    return 0
