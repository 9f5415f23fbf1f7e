"""The options that `quantize` and `plan` share, and their conversion to `workflow.Options`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch

from ..algorithms.prune import PATTERNS, PRUNERS
from ..devices import AUTO, device_of, has_amx
from ..errors import FileError
from ..files.open import FILE_TYPES
from ..plan import Plan, parse_rule
from ..plan.method import EFFORTS, METHODS
from ..workflow.blockwise import Streaming
from ..workflow.options import Options
from .units import gib

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Renamed(argparse.Action):
    """The old name of an option, accepted for one version with a notice of the new name."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        given: argparse.Namespace,
        value: object,
        option: str | None = None,
    ) -> None:
        print(f"{parser.prog}: {option} is now called --{self.dest}", file=sys.stderr)
        setattr(given, self.dest, value)


def type_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", metavar="TYPE", help="file type or format (see `fewbits formats`)")
    parser.add_argument(
        "--file", choices=tuple(FILE_TYPES), help="output file type (default: from --to and --out)"
    )
    parser.add_argument(
        "--rule", action="append", default=[], metavar="PATTERN=FORMAT",
        help="override the type of matching tensors; the first match wins; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--plan", type=Path, metavar="FILE",
        help="TOML file with rules, applied after --rule, and a [run] table with options of this command",
    )  # fmt: skip
    parser.add_argument(
        "--no-search",
        action="store_true",
        help="round to nearest with min-max scales: faster, larger error",
    )
    parser.add_argument("--requantize", action="store_true", help="accept a model that is already quantized")


def method_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization method")
    free = " and ".join(name for name, method in METHODS.items() if not method.needs_data)
    group.add_argument(
        "--effort", choices=tuple(EFFORTS),
        help="fast rounds to nearest, good (default) is GPTQ, best is GPTQ and distillation",
    )  # fmt: skip
    group.add_argument(
        "--method", choices=tuple(METHODS),
        help=f"instead of --effort: {free} need no text, weighted needs text or an imatrix, gptq text "
        "or Hessians, learned text",
    )  # fmt: skip
    group.add_argument(
        "--bits-per-weight", type=float, metavar="BITS",
        help="with --method ecsq: bits that a weight takes once `fewbits pack` has coded it, on average over "
        "all weights (default 4)",
    )  # fmt: skip
    group.add_argument(
        "--smooth", nargs="?", type=float, const=True, metavar="ALPHA",
        help="SmoothQuant: move outliers from activations to weights (default ALPHA: searched)",
    )  # fmt: skip
    for name, what in (
        ("awq", "AWQ: scale up the columns that carry large activations"),
        ("rotate", "rotate the residual stream and the values by a Hadamard matrix, fused into the weights"),
        ("equalize", "equalize the ranges of consecutive weights"),
    ):
        group.add_argument(f"--{name}", action="store_true", default=None, help=what)
    group.add_argument(
        "--distill", type=int, metavar="STEPS",
        help="train scales, centroids and norms on the logits of the float model afterwards",
    )  # fmt: skip
    group.add_argument(
        "--sparsity", type=float, metavar="SHARE",
        help="prune: this share of the weights in blocks becomes 0, such as 0.5",
    )  # fmt: skip
    group.add_argument(
        "--prune", choices=tuple(PRUNERS),
        help="which weights become 0: sparsegpt (default where the method has Hessians) by what dropping one "
        "costs once later columns make up for it, wanda by |w| |x|, magnitude (default of --effort fast) by "
        "|w|",
    )  # fmt: skip
    group.add_argument(
        "--sparsity-pattern", choices=tuple(PATTERNS),
        help="unstructured (default), row: the same share in each output row, 2:4 and 4:8: half of so many "
        "neighbours",
    )  # fmt: skip
    group.add_argument("--polish", type=int, dest="distill", action=Renamed, help=argparse.SUPPRESS)
    group.add_argument(
        "--activations", metavar="SCHEME",
        help="scheme of activations at run time, such as int8_dynamic; recorded in compressed-tensors and "
        "native directories",
    )  # fmt: skip


def text_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibrate", metavar="SOURCE",
        help="calibration text: a text or JSONL file, hf:NAME[:CONFIG][:SPLIT], or self (default): generated "
        "by the model, or vocabulary (the default of models that generate no text): random tokens; or "
        "statistics saved by `fewbits calibrate` or llama-imatrix",
    )  # fmt: skip
    group.add_argument(
        "--tokens", type=int, metavar="N",
        help="number of tokens (default 32768; more lose less and take longer: docs/methods.md)",
    )  # fmt: skip
    group.add_argument("--context", type=int, metavar="N", help="tokens per window (default 512)")
    group.add_argument("--seed", type=int, help="seed of sampling and shuffling (default 0)")
    group.add_argument(
        "--strict-calibration", action="store_true", help="fail if a weight has too few tokens"
    )
    group.add_argument(
        "--activation-memory", type=gib, default="2", metavar="GIB",
        help="memory for hidden states; the rest goes to a scratch file (default 2)",
    )  # fmt: skip
    group.add_argument("--scratch", type=Path, metavar="DIR", help="folder of that file (default: system's)")
    device_argument(group)
    group.add_argument(
        "--compute", choices=("auto", *DTYPES), default="auto",
        help="arithmetic of the model: auto is bf16 on a GPU and with AMX, else f32",
    )  # fmt: skip


def device_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--device", default=AUTO, metavar="NAME",
        help="device of the model: auto (default: the GPU with the most free memory, else the CPU), cpu, "
        "cuda, cuda:1, ...",
    )  # fmt: skip


def options_of(given: argparse.Namespace) -> Options:
    """The command line -> Options of the same names; PlanError or FileError for a plan that is invalid or
    cannot be read."""
    same = {each.name: getattr(given, each.name) for each in fields(Options) if hasattr(given, each.name)}
    writes = hasattr(given, "no_verify")
    other = {
        "plan": read_plan(given.rule, given.plan),
        "search": not given.no_search,
        "streaming": streaming_of(given),
        "verify": not getattr(given, "no_verify", False),
        "memory": given.memory if writes else None,  # plan's is of the result
    }
    return Options(**same | other).filled()


def streaming_of(given: argparse.Namespace) -> Streaming:
    return Streaming(
        activation_memory=given.activation_memory,
        scratch=given.scratch,
        device=given.device,
        dtype=_dtype(given.compute, device_of(given.device)),
        seed=given.seed or 0,
    )


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on a GPU and with AMX, else f32. Some other CPUs multiply bf16 faster, but the check of AWQ,
    SmoothQuant and equalization keeps few pairs in bf16."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if device.type != "cpu" or has_amx() else torch.float32


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
