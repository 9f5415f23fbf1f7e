"""The options that `quantize` and `plan` share, and how they become those of the workflow."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch

from ..errors import CalibrationError, FileError
from ..files.open import FILE_TYPES
from ..plan import Plan, parse_rule
from ..plan.method import EFFORTS, METHODS
from ..workflow.blockwise import Streaming
from ..workflow.options import Options
from .units import gib

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Renamed(argparse.Action):
    """An option's old name, for one version: it works, and says what it is called now."""

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
        "--file", choices=tuple(FILE_TYPES), help="output file type (default: by --to and --out)"
    )
    parser.add_argument(
        "--rule", action="append", default=[], metavar="PATTERN=FORMAT",
        help="override the type of the tensors that match, first match wins; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--plan", type=Path, metavar="FILE",
        help="TOML: rules, after those of --rule, and a [run] table with options of this command",
    )  # fmt: skip
    parser.add_argument(
        "--no-search",
        action="store_true",
        help="round to nearest with plain min-max block parameters: faster, larger error",
    )
    parser.add_argument("--requantize", action="store_true", help="accept a model that is already quantized")


def method_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how codes are chosen")
    free = " and ".join(name for name, method in METHODS.items() if not method.needs_data)
    group.add_argument(
        "--effort", choices=tuple(EFFORTS),
        help="quality for time: fast rounds to nearest, good (default) is GPTQ, best distils it as well",
    )  # fmt: skip
    group.add_argument(
        "--method", choices=tuple(METHODS),
        help=f"instead of an effort: {free} need no text, weighted a text or an importance matrix, gptq a "
        "text or Hessians, learned a text",
    )  # fmt: skip
    group.add_argument(
        "--smooth", nargs="?", type=float, const=True, metavar="ALPHA",
        help="SmoothQuant: move outliers from activations into weights (ALPHA: searched unless given)",
    )  # fmt: skip
    for name, what in (
        ("awq", "AWQ: scale up the columns that carry large activations"),
        ("rotate", "rotate the residual stream and the values (Hadamard), fused into the weights"),
        ("equalize", "even out the ranges of weights that follow one another"),
    ):
        group.add_argument(f"--{name}", action="store_true", default=None, help=what)
    group.add_argument(
        "--distill", type=int, metavar="STEPS",
        help="afterwards distil block scales and norms against the model's own logits",
    )  # fmt: skip
    group.add_argument("--polish", type=int, dest="distill", action=Renamed, help=argparse.SUPPRESS)
    group.add_argument(
        "--activations", metavar="SCHEME",
        help="activations in few bits at run time, such as int8_dynamic: compressed-tensors and native "
        "directories can say so",
    )  # fmt: skip


def text_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibrate", metavar="SOURCE",
        help="text the model is run on: a text or JSONL file, hf:NAME[:CONFIG][:SPLIT], or self (default): "
        "the model writes it; or statistics saved by `fewbits calibrate` or llama-imatrix",
    )  # fmt: skip
    group.add_argument("--tokens", type=int, metavar="N", help="how many tokens (default 32768)")
    group.add_argument("--context", type=int, metavar="N", help="tokens in a window (default 512)")
    group.add_argument("--seed", type=int, help="of sampling and shuffling (default 0)")
    group.add_argument(
        "--strict-calibration", action="store_true", help="make too few tokens for a weight an error"
    )
    group.add_argument(
        "--activation-memory", type=gib, default="2", metavar="GIB",
        help="hidden states beyond this go to a scratch file (default 2)",
    )  # fmt: skip
    group.add_argument("--scratch", type=Path, metavar="DIR", help="where that file lies (default: system's)")
    group.add_argument("--device", default="cpu", help="cpu (default) or cuda: where the model is run")
    group.add_argument(
        "--compute", choices=("auto", *DTYPES), default="auto",
        help="arithmetic of the model: auto takes bf16 with AMX or CUDA, else f32",
    )  # fmt: skip


def options_of(given: argparse.Namespace) -> Options:
    """The command line -> Options, by the same names; PlanError and FileError for a plan that cannot be read
    or followed."""
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
    device = given.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CalibrationError(f"--device {device}: torch finds no CUDA device here; use cpu")
    return Streaming(
        activation_memory=given.activation_memory,
        scratch=given.scratch,
        device=device,
        dtype=_dtype(given.compute, device),
        seed=given.seed or 0,
    )


def _dtype(name: str, device: str) -> torch.dtype:
    """auto: bf16 on CUDA and with AMX. Elsewhere f32, though some CPUs multiply bf16 faster: the check of
    AWQ, SmoothQuant and equalization keeps few pairs in bf16."""
    if name != "auto":
        return DTYPES[name]
    amx = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device != "cpu" or amx else torch.float32


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
