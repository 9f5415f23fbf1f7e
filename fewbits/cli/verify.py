"""`fewbits verify`: does the engine compute the same as the decoded file?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..adapters.as_loaded import as_loaded
from ..adapters.hub import resolve
from ..devices import Room, device_of
from ..errors import PlanError
from ..files.open import open_checkpoint
from ..memory import left_of
from ..release.publish import push
from ..release.receipt import Receipt
from ..release.verify import Outcome, verification_need, verify
from ..storage.packed import SUFFIX, is_packed
from .exit_codes import DIFFERS, DONE, NOT_AS_REQUESTED
from .options import device_argument
from .units import gib

EXAMPLES = """examples:
  fewbits verify model-Q4_K_M.gguf
  fewbits verify model-gptq --json
  fewbits verify model-gptq --reference ./Llama-3.2-1B
  fewbits verify model-compressed-tensors --engine vllm

exit code 4: the engine computes something else, or cannot load the file; or fewbits reads the reference
otherwise than its own engine does. 3: the reference cannot be run"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH")
    limits(parser)
    parser.add_argument(
        "--reference", metavar="MODEL",
        help="what PATH was made of: is run in its own engine, and compared with both",
    )  # fmt: skip
    parser.add_argument(
        "--engine", metavar="NAME", help="another that reads the file type: transformers, vllm, ..."
    )
    parser.add_argument(
        "--memory", type=gib, metavar="GIB",
        help="memory this process may take, besides the engine (default: what is free)",
    )  # fmt: skip
    device_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify-seconds", type=float, default=600, metavar="S", help="the engine's time limit (default 600)"
    )
    parser.add_argument("--verify-memory", type=gib, metavar="GIB", help="the engine's memory limit")


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """For the commands that write a model."""
    parser.add_argument(
        "--no-verify", action="store_true", help="do not load the output in its engine at the end"
    )
    limits(parser)
    parser.add_argument("--push", metavar="ORG/NAME", help="upload the output to the hub at the end")


def run(options: argparse.Namespace) -> int:
    if is_packed(options.path) or (options.path.is_dir() and any(options.path.glob(f"*{SUFFIX}"))):
        raise PlanError(
            f"{options.path}: is packed, and engines read no packed files; `fewbits unpack` it first"
        )
    device_of(options.device)  # an unknown one is an error here, not a file that is not checked
    memory = left_of(options.memory)
    need = verification_need(options.path, options.engine, memory)
    if need is not None:
        print(f"fewbits verify: {need.line()}, the engine's process besides", file=sys.stderr)
    named = options.reference
    reference = None if named is None else as_loaded(open_checkpoint(resolve(named)))
    limits = options.verify_seconds, options.verify_memory
    room = Room(options.device, memory)
    outcome = verify(options.path, *limits, options.engine, room, reference=reference)
    print(json.dumps(outcome.to_dict()) if options.json else "\n".join(outcome.lines()))
    return code_of(outcome)


def code_of(outcome: Outcome) -> int:
    if outcome.verdict in ("differs", "failed"):
        return DIFFERS
    return DONE if outcome.with_reference else NOT_AS_REQUESTED


def concluded(receipt: Receipt, outcome: Outcome | None, out: Path, repo: str | None) -> tuple[Receipt, int]:
    """Print the Outcome of a new output, upload it if `repo` names where -> the receipt, exit code."""
    if outcome is not None:
        for line in outcome.lines():
            print(f"fewbits: {line}", file=sys.stderr)
        if not outcome.with_reference:
            print("fewbits: exit code 3 says that; --no-verify accepts it", file=sys.stderr)
    code = 0 if outcome is None else code_of(outcome)
    if repo and code == DONE:
        print(f"fewbits: uploaded to {push(out, repo)}", file=sys.stderr)
    return receipt, code
