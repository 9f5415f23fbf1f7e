"""`fewbits pack`: a model file in fewer bytes, for download and disk."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..packing import pack_file
from ..table import size
from .progress import ByteProgress

EXAMPLES = """Entropy-codes the tensors of a .gguf or .safetensors file (rANS); `fewbits unpack` gives
back the same file, bit for bit. Download and disk get smaller; memory and tokens per second do not change,
because engines load the unpacked file. bf16 weights shrink by a third, codes of 4 bits by a few percent.

examples:
  fewbits pack model-Q4_K_M.gguf
  fewbits pack ./Llama-3.2-1B/model.safetensors --out llama.packed.safetensors
  fewbits unpack model-Q4_K_M.gguf.packed.safetensors"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")
    common(parser)


def common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="PATH", help="output file (default: beside the input)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--json", action="store_true", help="print the sizes as JSON")


def run(given: argparse.Namespace) -> int:
    with ByteProgress("pack") as progress:
        out = pack_file(given.file, given.out, given.overwrite, progress)
    before, after = given.file.stat().st_size, out.stat().st_size
    if given.json:
        print(json.dumps({"out": str(out), "nbytes": after, "unpacked": before, "share": after / before}))
        return 0
    print(f"{size(before)} -> {size(after)}, {after / before:.1%}\n\nwrote {out}")
    print("fewbits pack: engines load the unpacked file: `fewbits unpack`", file=sys.stderr)
    return 0
