"""`fewbits push`: upload an output with its card and receipt to the hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..release.publish import push

EXAMPLES = """examples:
  fewbits push Llama-3.2-1B-gptq me/Llama-3.2-1B-GPTQ
  fewbits push model-Q4_K_M.gguf me/model-GGUF --private"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("repo", metavar="ORG/NAME")
    parser.add_argument("--private", action="store_true", help="create a private repository")


def run(options: argparse.Namespace) -> int:
    print(push(options.path, options.repo, options.private))
    return 0
