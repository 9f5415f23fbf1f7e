"""`fewbits lm-eval`: run tasks of lm-eval on a model of any file type."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..adapters.hub import resolve
from ..adapters.lm_eval import HarnessRun, score
from ..adapters.transformers import load_tokenizer
from ..dtypes import DTYPES
from ..files.open import open_checkpoint
from ..formats.base import SCALE_TYPES
from ..runtime.load import load
from ..table import table

EXAMPLES = """The model runs in transformers with packed weights, decoded at each use: less memory than a
float model, but slower. Needs `pip install 'fewbits[harness]'`. Tasks of lm-eval fetch their data from the
hub. Your own task, a YAML file in --include-path, may use a local data file and needs no network.

examples:
  fewbits lm-eval model-Q4_K_M.gguf --tasks arc_easy,piqa --limit 100
  fewbits lm-eval ./model-int4 --tasks my_task --include-path ./tasks --batch 8 --json"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="MODEL")
    parser.add_argument("--tasks", required=True, metavar="NAME,...", help="names, or patterns with *")
    parser.add_argument(
        "--include-path", type=Path, action="append", default=[], metavar="DIR", help="more tasks; repeatable"
    )
    parser.add_argument("--shots", type=int, metavar="N", help="examples in the prompt (default: the task's)")
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N documents of each task")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default 1)")
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    parser.add_argument(
        "--dtype", choices=sorted(SCALE_TYPES), default="f32", help="type of activations (default f32)"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(options: argparse.Namespace) -> int:
    tasks = tuple(name.strip() for name in options.tasks.split(",") if name.strip())
    harness_run = HarnessRun(
        tasks, tuple(options.include_path), options.shots, options.limit, options.batch, options.chat
    )
    checkpoint = open_checkpoint(resolve(options.path, options.cache_dir))
    tokenizer = load_tokenizer(checkpoint)
    with torch.no_grad():
        scores = score(load(checkpoint, DTYPES[options.dtype].torch), tokenizer, harness_run)
    if options.json:
        print(json.dumps([asdict(row) for row in scores]))
    else:
        rows = [(row.task, row.metric, row.filter, row.value, row.error) for row in scores]
        print(table(("task", "metric", "filter", "value", "+-"), rows))
    return 0
