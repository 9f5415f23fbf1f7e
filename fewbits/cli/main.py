"""fewbits: quantize a language model, measure the loss, write the file that the runtime loads.

A command is a module of this folder (EXAMPLES, `arguments`, `run`) and a row of COMMANDS. Only the module of
the called command is imported, so help is fast.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ..errors import FewbitsError
from ..storage.cache import cache_folder
from ..version import VERSION
from .exit_codes import ERROR, INTERRUPTED, TEXT

EXAMPLES = f"""examples:
  fewbits quantize demo:smollm2 --to q4_k_m --out smollm2-Q4_K_M.gguf
  fewbits quantize ./Mistral-7B --to iq4_xs --rule '*.down_proj=q6_k'
  fewbits quantize Qwen/Qwen3-0.6B --to int4_g128 --out qwen3-int4
  fewbits plan ./Mistral-7B --to iq4_xs --context 8192
  fewbits calibrate ./Mistral-7B --calibrate wiki.train.raw --out imatrix.gguf
  fewbits evaluate ./Mistral-7B mistral-IQ4_XS.gguf --text wiki.test.raw
  fewbits inspect mistral-IQ4_XS.gguf
  fewbits demo

{TEXT}"""

COMMANDS = {
    "quantize": "quantize a model into a GGUF file or a directory",
    "train": "quantize a model, then train it for its few bits (quantization-aware training)",
    "plan": "predict size, memory, time and engines of a quantization before it runs",
    "calibrate": "measure activation statistics of a model, for quantize --calibrate",
    "evaluate": "compare quantized models with the original: KL divergence, agreement, perplexity, text",
    "lm-eval": "run tasks of lm-eval (the evaluation harness) on a model of any file type",
    "inspect": "show the tensors, types, bits and metadata of a model",
    "convert": "write a model to another file type without quantizing again",
    "merge": "join a low-rank adapter (LoRA) with the weights of its model, packed or float",
    "pack": "entropy-code a model file: smaller to store and to send",
    "unpack": "the file that pack was given, bit for bit",
    "verify": "load an output in its engine and compare logits and greedy tokens",
    "push": "upload a model that fewbits wrote, with its card and receipt",
    "formats": "list number formats and file types",
    "demo": "quantize a small model to three types, measure each, and generate a sentence with each",
}


def parser(called: Sequence[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The parser of all commands, with the options of those that are called."""
    top = argparse.ArgumentParser(
        prog="fewbits",
        description="Quantize a language model, measure the loss, and write the file that runtimes load.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fewbits {VERSION}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        module = import_module(f".{name.replace('-', '_')}", __package__) if name in called else None
        sub = subparsers.add_parser(
            name,
            help=help,
            description=help,
            epilog=module.EXAMPLES if module else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module is None:
            continue
        module.arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
        sub.add_argument(
            "--cache-dir",
            type=Path,
            metavar="DIR",
            default=cache_folder(),
            help="folder of downloaded models (default: $FEWBITS_CACHE or ~/.cache/fewbits)",
        )
        sub.set_defaults(run=module.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command -> exit code."""
    # Otherwise waiting threads of torch keep cores busy. A setting of the user has priority.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:] if arguments is None else arguments
    called = parser([word for word in arguments if word in COMMANDS][:1])
    options = called.parse_args(arguments)
    if options.threads is not None:
        import torch

        if options.threads < 1:
            called.error(f"--threads {options.threads}: at least 1")
        torch.set_num_threads(options.threads)
    try:
        return int(options.run(options))
    except FewbitsError as error:
        if options.debug:
            raise
        print(f"fewbits {options.command}: error: {error}", file=sys.stderr)
        return ERROR
    except BrokenPipeError:
        sys.stderr.close()
        return ERROR
    except KeyboardInterrupt:
        print(f"fewbits {options.command}: interrupted; run the same command to resume", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
