"""`fewbits convert`: write the same codes as another file type."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import ModelError, PlanError
from ..files.adapter import is_adapter, open_adapter
from ..files.gguf.adapter import write_adapter
from ..files.open import FILE_TYPES
from ..runtime.program import SUFFIX, save_program
from ..table import size
from ..workflow.adapted import check_base
from ..workflow.blockwise import Streaming
from ..workflow.options import Options
from ..workflow.quantize import conclude, opened
from ..workflow.request import Request
from ..workflow.run import run as convert
from .options import device_argument
from .progress import ByteProgress
from .verify import concluded, verify_arguments

EXAMPLES = """examples:
  fewbits convert smollm2-native smollm2.gguf
  fewbits convert ./Llama-3.2-1B Llama-3.2-1B-BF16.gguf
  fewbits convert distilbert-int8 distilbert.pt2                a program of torch.export
  fewbits convert model-Q4_0.gguf model-gptq --to gptq          q4_0 equals int4_g32: no value changes
  fewbits convert model-Q4_K_M.gguf model-gptq --to gptq --requantize
  fewbits convert mine-lora mine-lora.gguf                      an adapter of PEFT, for llama.cpp's --lora"""


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
    parser.add_argument(
        "--base", metavar="MODEL", help="of an adapter: the model it belongs to (default: what it names)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--json", action="store_true", help="print the receipt as JSON")
    verify_arguments(parser)
    device_argument(parser)


def run(given: argparse.Namespace) -> int:
    if is_adapter(Path(given.model)):
        return _convert_adapter(given)
    if given.base is not None:
        raise PlanError(f"--base is of an adapter, and {given.model} is none: leave it out")
    checkpoint, _ = opened(given.model, given.cache_dir)
    if given.to is None and given.out.suffix == SUFFIX:
        apart = save_program(checkpoint, given.out, given.overwrite)
        print(f"wrote {given.out}; loaded again, its output is the model's within {apart:.2g} of the largest")
        return 0
    options = Options(
        verify=not given.no_verify,
        verify_seconds=given.verify_seconds,
        verify_memory=given.verify_memory,
        streaming=Streaming(device=given.device),
    )
    with ByteProgress("convert") as progress:
        request = Request(file=given.to, overwrite=given.overwrite, requantize=given.requantize)
        receipt = convert(checkpoint, given.out, request, progress)
    receipt, code = concluded(*conclude(receipt, checkpoint, given.out, options), given.out, given.push)
    print(receipt.to_json() if given.json else f"{receipt.table()}\n\nwrote {given.out}")
    return code


def _convert_adapter(given: argparse.Namespace) -> int:
    """The directory of a low-rank adapter -> GGUF."""
    adapter = open_adapter(given.model)
    if given.out.suffix != ".gguf" or given.to not in (None, "gguf"):
        raise PlanError(f"{given.out}: an adapter is converted to GGUF only; name a .gguf file")
    base = given.base or adapter.base
    if not base:
        raise ModelError(f"{given.model}: names no model that it belongs to; give it (--base)")
    checkpoint = opened(base, given.cache_dir)[0]
    note = check_base(adapter, checkpoint)
    nbytes = write_adapter(adapter, checkpoint, given.out, given.overwrite)
    if note:
        print(f"fewbits convert: {note}", file=sys.stderr)
    print(f"wrote {given.out}: {size(nbytes)}, {len(adapter.weights)} weights")
    return 0
