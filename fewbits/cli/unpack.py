"""`fewbits unpack`: the file that `fewbits pack` was given."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..files.packed import unpack_model
from ..table import size
from .pack import common, nbytes_of
from .progress import ByteProgress

EXAMPLES = """Checks the digest of the file that `fewbits pack` was given; of a damaged one nothing is left.

examples:
  fewbits unpack model-Q4_K_M.gguf.packed.safetensors
  fewbits unpack ./llama-packed --out ./llama-ecsq
  fewbits unpack llama.packed.safetensors --out ./Llama-3.2-1B/model.safetensors"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="PATH")
    common(parser)


def run(given: argparse.Namespace) -> int:
    with ByteProgress("unpack") as progress:
        out = unpack_model(given.file, given.out, given.overwrite, progress)
    nbytes = nbytes_of(out)
    print(json.dumps({"out": str(out), "nbytes": nbytes}) if given.json else f"{size(nbytes)}\n\nwrote {out}")
    return 0
