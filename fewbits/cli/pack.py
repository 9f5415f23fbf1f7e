"""`fewbits pack`: a model file in fewer bytes, for download and disk."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..files.packed import pack_model
from ..packing import CODERS
from ..table import size
from .progress import ByteProgress

EXAMPLES = """Entropy-codes the tensors of a .gguf or .safetensors file, or of each in a directory, whose
other files are copied. `fewbits unpack` gives back the same files, bit for bit. Download and disk get
smaller; memory and tokens per second do not change. Every command of fewbits opens packed models; engines
need them unpacked. bf16 weights shrink by a third, codes of 4 bits by a few percent, those of
`fewbits quantize --method ecsq` to the bits that were asked.

examples:
  fewbits pack model-Q4_K_M.gguf
  fewbits pack ./llama-ecsq --out ./llama-packed
  fewbits pack ./Llama-3.2-1B/model.safetensors --out llama.packed.safetensors --coder huffman
  fewbits unpack model-Q4_K_M.gguf.packed.safetensors"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="PATH")
    common(parser)
    parser.add_argument(
        "--coder", choices=tuple(CODERS), default="rans",
        help="rans (default): near the entropy; huffman: as in Deep Compression, larger and slower",
    )  # fmt: skip


def common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="PATH", help="output file (default: beside the input)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--json", action="store_true", help="print the sizes as JSON")


def nbytes_of(path: Path) -> int:
    """Of a file, or of all in a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def run(given: argparse.Namespace) -> int:
    with ByteProgress("pack") as progress:
        out = pack_model(given.file, given.out, given.overwrite, given.coder, progress)
    before, after = nbytes_of(given.file), nbytes_of(out)
    if given.json:
        print(json.dumps({"out": str(out), "nbytes": after, "unpacked": before, "share": after / before}))
        return 0
    print(f"{size(before)} -> {size(after)}, {after / before:.1%}\n\nwrote {out}")
    print("fewbits pack: engines load the unpacked files: `fewbits unpack`", file=sys.stderr)
    return 0
