"""`fewbits quantize`: float model -> quantized model and receipt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..release.receipt import Receipt
from ..workflow.coverage import PROMISED
from ..workflow.quantize import conclude, opened, prepared
from ..workflow.run import run as quantize
from ..workflow.text import with_read_text
from .options import method_arguments, options_of, text_arguments, type_arguments
from .progress import ByteProgress, StageProgress
from .units import gib
from .verify import concluded, verify_arguments

EXAMPLES = """MODEL is a Hugging Face directory, a .gguf file, a hub name org/name[@revision], or
demo:smollm2.

--to is a llama.cpp file type (q4_k_m, iq4_xs, q8_0 ...: the tensor types of llama-quantize, written as
GGUF) or a format (int4_g128, nf4, mxfp4 ...: written as a native directory). `fewbits formats` lists both.

--effort fast rounds to nearest (seconds). good, the default, runs the model block by block over
calibration text (GPTQ). best adds distillation. Without --calibrate the model generates the text;
classifiers and embeddings cannot: give them --calibrate FILE (default: random tokens).

The same command resumes a killed run and gives a byte-identical result.

examples:
  fewbits quantize ./Llama-3.2-1B --to q4_k_m
  fewbits quantize ./Llama-3.2-1B --to q4_k_m --effort fast --rule '*.down_proj=q6_k' --rule 'lm_head=q8_0'
  fewbits quantize ./Llama-3.2-1B --to q3_k_m --calibrate c4.txt --tokens 65536
  fewbits quantize ./Llama-3.2-1B --to int4_g128 --method gptq --awq --out llama-int4 --json
  fewbits quantize ./Llama-3.2-1B --to q4_0 --method weighted --calibrate imatrix.gguf
  fewbits quantize ./Llama-3.2-1B --to int8_channel --method ecsq --bits-per-weight 3.8   # then: fewbits pack
  fewbits quantize ./Llama-3.2-1B --to int8_channel --activations int8_dynamic --smooth
  fewbits quantize ./Llama-3.2-1B --to bf16 --file huggingface --sparsity 0.5 --sparsity-pattern 2:4
  fewbits quantize ./Llama-3.2-1B --to int4_g128 --file compressed-tensors --kv-cache fp8
  fewbits quantize ./distilbert-sst2 --to int8_channel --activations int8_dynamic --calibrate reviews.txt
  fewbits quantize model-BF16.gguf --to q5_k_m --out model-Q5_K_M.gguf"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("-o", "--out", type=Path, metavar="PATH", help="output file (.gguf) or directory")
    type_arguments(parser)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="also exit with code 3 if any tensor got a fallback type, or less than 95 %% of the weights "
        "in blocks got the requested one",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--json", action="store_true", help="print the receipt as JSON")
    parser.add_argument(
        "--memory", type=gib, metavar="GIB",
        help="memory limit of this process (default: free memory); a run that needs more is refused",
    )  # fmt: skip
    method_arguments(parser)
    parser.add_argument(
        "--kv-cache", metavar="SCHEME",
        help="KV cache scheme, fp8 only so far; its scales are measured on the calibration text",
    )  # fmt: skip
    text_arguments(parser)
    verify_arguments(parser)


def run(given: argparse.Namespace) -> int:
    options = options_of(given)
    checkpoint, path = opened(given.model, given.cache_dir)
    out, request, need = prepared(checkpoint, path, given.out, options)
    print(f"fewbits {given.command}: {need.line()}", file=sys.stderr)
    with StageProgress() as stage:
        request = with_read_text(request, checkpoint, options, stage)
    for note in (*request.notes, *(request.tokens.notes if request.tokens else ())):
        print(f"fewbits {given.command}: {note}", file=sys.stderr)
    with ByteProgress("quantize") as progress:
        receipt = quantize(checkpoint, out, request, progress)
    receipt, code = concluded(*conclude(receipt, checkpoint, out, options), out, given.push)
    print(receipt.to_json() if given.json else f"{receipt.table()}\n\nwrote {out}")
    return code or verdict(receipt, given.strict, given.command)


def verdict(receipt: Receipt, strict: bool, command: str = "quantize") -> int:
    """0, or 3 if a tensor with a rule did not get its requested format; with `strict`, also if any tensor did
    not, or less than PROMISED of the weights in blocks got theirs."""
    changed = receipt.changed()
    named = [row for row in changed if row.rule is not None]
    if changed:
        print(
            f"fewbits {command}: {len(changed)} of {len(receipt.tensors)} tensors got a fallback type "
            f"({len(named)} of them named by a rule); the receipt says why",
            file=sys.stderr,
        )
    short = bool(receipt.coverage) and receipt.coverage["share"] < PROMISED
    return 3 if named or (strict and (changed or short)) else 0
