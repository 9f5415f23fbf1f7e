"""`fewbits quantize`: a float model in, a small one and a receipt out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..adapters.hub import resolve
from ..errors import FileError, PlanError
from ..files.checkpoint import Checkpoint
from ..files.layout import LAYOUTS
from ..files.open import open_checkpoint
from ..model.archs import architecture
from ..plan import Plan, parse_rule
from ..plan.mixtures import RECIPES
from ..release.receipt import Receipt
from ..workflow.quantize import Request, quantize
from .calibration import calibrated, text_arguments
from .method import method_arguments, method_of
from .progress import ByteProgress
from .verify import concluded, verify_arguments

HELP = "quantize a model into a GGUF file or a native directory"
EXAMPLES = """MODEL is a Hugging Face directory, a .gguf file, a hub name org/name[@revision], or
demo:smollm2.

--to takes a llama.cpp file type (q4_k_m, iq4_xs, q8_0 ...: the same mixture as llama-quantize, written
as GGUF) or a format (int4_g128, nf4, mxfp4 ...: written as a native directory). `fewbits formats` lists both.

--effort says how much work goes into the codes: fast rounds to nearest (seconds); good, the default, runs
the model block by block over calibration text (GPTQ); best distils the result as well. Without
--calibrate the model writes its own text.

A killed run is continued by the same command, with a byte-identical result.

examples:
  fewbits quantize ./Llama-3.2-1B --to q4_k_m
  fewbits quantize ./Llama-3.2-1B --to q4_k_m --effort fast --rule '*.down_proj=q6_k' --rule 'lm_head=q8_0'
  fewbits quantize ./Llama-3.2-1B --to q3_k_m --calibrate c4.txt --tokens 65536
  fewbits quantize ./Llama-3.2-1B --to int4_g128 --method gptq --awq --out llama-int4 --json
  fewbits quantize ./Llama-3.2-1B --to q4_0 --method weighted --calibrate imatrix.gguf
  fewbits quantize ./Llama-3.2-1B --to int8_channel --activations int8_dynamic --smooth
  fewbits quantize ./Llama-3.2-1B --to int4_g128 --file compressed-tensors --kv-cache fp8
  fewbits quantize model-BF16.gguf --to q5_k_m --out model-Q5_K_M.gguf"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--to", metavar="TYPE", help="file type or format (see `fewbits formats`)")
    parser.add_argument("--out", type=Path, metavar="PATH", help="output file (.gguf) or directory")
    parser.add_argument(
        "--file", choices=("gguf", *LAYOUTS), help="output file type (default: by --to and --out)"
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=FORMAT",
        help="override the type of the tensors that match, first match wins; repeatable",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="TOML: rules, after those of --rule, and a [run] table with options of this command",
    )
    parser.add_argument(
        "--no-search", action="store_true", help="plain min-max block parameters: faster, larger error"
    )
    parser.add_argument(
        "--strict", action="store_true", help="make a fall-back type an error (exit code 3) too"
    )
    parser.add_argument("--requantize", action="store_true", help="accept a model that is already quantized")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--json", action="store_true", help="print the receipt as JSON")
    method_arguments(parser)
    parser.add_argument(
        "--kv-cache", metavar="SCHEME",
        help="and with keys and values, told likewise: fp8, its steps from the calibration text",
    )  # fmt: skip
    text_arguments(parser)
    verify_arguments(parser)


def run(options: argparse.Namespace) -> int:
    checkpoint, out, request = requested(options)
    request = calibrated(request, checkpoint, out, options)
    with ByteProgress("quantize") as progress:
        receipt = quantize(checkpoint, out, request, progress)
    receipt, code = concluded(receipt, checkpoint, out, options)
    print(receipt.to_json() if options.json else f"{receipt.table()}\n\nwrote {out}")
    return code or verdict(receipt, options.strict)


def requested(options: argparse.Namespace) -> tuple[Checkpoint, Path, Request]:
    """The model, where its output goes, and what is asked for, but for calibration data."""
    plan = read_plan(options.rule, options.plan)
    follow_plan(options, plan)
    if options.to is None and not plan.rules:
        raise PlanError("nothing asked for: give --to TYPE, --rule or --plan")
    path = resolve(options.model, options.cache_dir)
    checkpoint = open_checkpoint(path)
    out, file = output_of(options, path, checkpoint)
    request = Request(
        to=options.to,
        plan=plan,
        file=file,
        search=not options.no_search,
        requantize=options.requantize,
        overwrite=options.overwrite,
        method=method_of(options),
        activations=options.activations,
        kv_cache=options.kv_cache,
        strict=options.strict_calibration,
    )
    return checkpoint, out, request


def output_of(options: argparse.Namespace, path: Path, checkpoint: Checkpoint) -> tuple[Path, str | None]:
    """-> where the output goes, and which file type it has (None: its name says)."""
    recipe = RECIPES.get((options.to or "").lower())
    as_gguf = recipe is not None and (
        checkpoint.kind == "gguf" or architecture(checkpoint.config) is not None
    )
    kind = options.file or ("gguf" if as_gguf else "native")
    out = options.out or default_out(path, options.to or "plan", kind)
    return out, options.file or (kind if options.out is None else None)


RUN_KEYS = (
    "to", "effort", "method", "smooth", "awq", "rotate", "equalize", "polish", "activations",
    "kv_cache", "calibrate", "tokens", "context", "seed",
)  # fmt: skip


def follow_plan(options: argparse.Namespace, plan: Plan) -> None:
    """Options that the command line leaves open become those of the plan's [run] table."""
    unknown = [key for key in plan.run if key not in RUN_KEYS]
    if unknown:
        raise PlanError(f"{options.plan}: [run] has no key {unknown[0]!r}; known: {', '.join(RUN_KEYS)}")
    for key, value in plan.run.items():
        if getattr(options, key) is None:
            setattr(options, key, value)


def read_plan(rules: list[str], file: Path | None) -> Plan:
    """--rule and --plan -> Plan, the command line's rules first."""
    given = tuple(parse_rule(rule) for rule in rules)
    if file is None:
        return Plan(given)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{file}: the plan cannot be read: {error}") from error
    read = Plan.from_toml(text, str(file))
    return Plan(given + read.rules, read.run)


def default_out(path: Path, to: str, file: str) -> Path:
    """`Model-Q4_K_M.gguf`, as llama.cpp's users name files, or a directory `Model-int4_g128`."""
    stem = path.resolve().name.removesuffix(".gguf")
    return Path(f"{stem}-{to.upper()}.gguf" if file == "gguf" else f"{stem}-{to}")


def verdict(receipt: Receipt, strict: bool) -> int:
    """0, or 3 if a tensor that a rule names (with `strict`: any tensor) is not what was asked."""
    changed = receipt.changed()
    named = [row for row in changed if row.rule is not None]
    if changed:
        print(
            f"fewbits quantize: {len(changed)} of {len(receipt.tensors)} tensors got a fall-back type "
            f"({len(named)} of them named by a rule); the receipt says why",
            file=sys.stderr,
        )
    return 3 if named or (strict and changed) else 0
