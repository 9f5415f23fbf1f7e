"""`fewbits merge`: a low-rank adapter into the weights of its model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..files.adapter import open_adapter
from ..files.open import FILE_TYPES
from ..workflow.blockwise import Streaming
from ..workflow.merge import MergeOptions, merge
from ..workflow.options import Options
from ..workflow.quantize import conclude, opened
from ..workflow.text import reader
from .options import device_argument
from .progress import StageProgress
from .verify import concluded, verify_arguments

EXAMPLES = """MODEL is a model of any file type, float or quantized; ADAPTER a directory that PEFT, or
`fewbits train --lora`, saved. A quantized model keeps its formats, scales and all other tensors.

Exact where the format has float offsets and the adapter is constant in their groups (train --lora-group).
Else with --calibrate GPTQ chooses codes on the same grid by the error of each output; without it they are
rounded to nearest. The receipt has the KL divergence from the unmerged model, and that of rounding alone.

examples:
  fewbits merge ./Llama-3.2-1B mine-lora -o llama-mine
  fewbits merge Llama-3.2-1B-Q4_K_M.gguf mine-lora -o mine-Q4_K_M.gguf --calibrate mine.txt
  fewbits merge llama-gptq mine-lora -o mine-gptq --calibrate mine.txt --tokens 65536"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("adapter", metavar="ADAPTER", type=Path)
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="PATH", help=".gguf file or directory"
    )
    parser.add_argument("--file", choices=tuple(FILE_TYPES), help="output file type (default: that of MODEL)")
    parser.add_argument(
        "--calibrate", metavar="SOURCE", help="text, as for quantize; its last 8 windows measure the loss"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="number of tokens (default 32768)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens per window (default 512)")
    parser.add_argument("--seed", type=int, help="seed of sampling and shuffling (default 0)")
    device_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--json", action="store_true", help="print the receipt as JSON")
    verify_arguments(parser)


def run(given: argparse.Namespace) -> int:
    adapter = open_adapter(given.adapter)
    checkpoint, _ = opened(given.model, given.cache_dir)
    streaming = Streaming(device=given.device, seed=given.seed or 0)
    options = Options(
        tokens=given.tokens, context=given.context, seed=given.seed, streaming=streaming,
        verify=not given.no_verify, verify_seconds=given.verify_seconds, verify_memory=given.verify_memory,
    )  # fmt: skip
    with StageProgress() as progress:
        text = None if given.calibrate is None else reader(checkpoint, options, progress)(given.calibrate)
        for note in text.notes if text else ():
            print(f"fewbits merge: {note}", file=sys.stderr)
        wanted = MergeOptions(given.file, text, streaming, given.overwrite, given.seed or 0)
        receipt = merge(checkpoint, adapter, given.out, wanted, progress)
    receipt, code = concluded(*conclude(receipt, checkpoint, given.out, options), given.out, given.push)
    print(receipt.to_json() if given.json else f"{receipt.table()}\n\nwrote {given.out}")
    return code
