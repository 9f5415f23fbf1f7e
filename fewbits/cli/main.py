"""fewbits: quantize a language model, measure what it cost, write what the runtime loads.

Exit codes: 0 all that was asked is done; 1 an error, said in one message; 2 wrong usage; 3 done, but
a tensor that a rule names did not get what the rule asks, or a plan that does not fit; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import FewbitsError
from ..storage.cache import cache_folder
from ..version import VERSION
from . import calibrate, convert, demo, evaluate, formats, inspect, lm_eval, plan, push, quantize, verify

EXAMPLES = """examples:
  fewbits quantize demo:smollm2 --to q4_k_m --out smollm2-Q4_K_M.gguf
  fewbits quantize ./Mistral-7B --to iq4_xs --rule '*.down_proj=q6_k'
  fewbits quantize Qwen/Qwen3-0.6B --to int4_g128 --out qwen3-int4
  fewbits plan ./Mistral-7B --to iq4_xs --context 8192
  fewbits calibrate ./Mistral-7B --calibrate wiki.train.raw --out imatrix.gguf
  fewbits evaluate ./Mistral-7B mistral-IQ4_XS.gguf --text wiki.test.raw
  fewbits inspect mistral-IQ4_XS.gguf
  fewbits demo

exit codes: 0 done, 1 error, 2 usage, 3 done but a rule could not be followed, 4 done but the engine that
the output is for computes something else"""

COMMANDS = (quantize, plan, calibrate, evaluate, lm_eval, inspect, convert, verify, push, formats, demo)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="fewbits",
        description="Make a language model small: quantize it, measure the cost, write what runtimes load.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fewbits {VERSION}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rsplit(".", 1)[-1].replace("_", "-")
        sub = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
        sub.add_argument(
            "--cache-dir",
            type=Path,
            metavar="DIR",
            default=cache_folder(),
            help="where downloaded models are kept (default: $FEWBITS_CACHE or ~/.cache/fewbits)",
        )
        sub.set_defaults(run=module.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command -> exit code."""
    # Threads of torch that wait would hold cores that other programs need; a setting of the user's stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = parser().parse_args(arguments)
    if options.threads is not None:
        import torch

        if options.threads < 1:
            parser().error(f"--threads {options.threads}: at least 1")
        torch.set_num_threads(options.threads)
    try:
        return int(options.run(options))
    except FewbitsError as error:
        if options.debug:
            raise
        print(f"fewbits {options.command}: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print(f"fewbits {options.command}: interrupted; run the same command to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
