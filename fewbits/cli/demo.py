"""`fewbits demo`: quantize, measure and run a small model, without preparation."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import FewbitsError
from ..files.checkpoint import Checkpoint
from ..files.open import open_checkpoint
from ..table import Cell, size, table
from .progress import StageProgress

EXAMPLES = """The model is SmolLM2-135M-Instruct from a package index, moved off its 4-bit grid (163M
parameters).

examples:
  fewbits demo
  fewbits demo --out demo --types q8_0 q5_k_m iq4_xs"""

TYPES = ("q8_0", "q4_k_m", "q3_k_m")
WINDOWS, CONTEXT, SEED = 8, 512, 0
PROMPT = "The three most important things to know about the Moon are"
NEW_TOKENS = 32


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="output folder")
    parser.add_argument("--types", nargs="+", default=list(TYPES), metavar="TYPE", help="file types to write")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    with StageProgress() as progress:
        note("obtaining the demo model")
        from ..adapters import smollm2

        model = smollm2.obtain(options.cache_dir, progress)
        options.out.mkdir(parents=True, exist_ok=True)
        runs = {kind: quantized(model, options.out, kind, options.cache_dir) for kind in options.types}
        result = measure(model, [Path(run["target"]) for run in runs.values()], progress)
        sentences = write_sentences(model, [Path(run["target"]) for run in runs.values()])
    rows = [
        row(result["reference"], None),
        *(row(c, r) for c, r in zip(result["quantized_models"], runs.values(), strict=True)),
    ]
    if options.json:
        print(json.dumps({"source": result["source"], "rows": rows, "sentences": sentences}, indent=1))
        return 0
    print(table(list(rows[0]), [list(line.values()) for line in rows]))
    print(f"\nKL divergence, agreement and perplexity over {result['tokens_scored']} tokens. Text: "
          f"{result['source']}; no download.")  # fmt: skip
    print("seconds and peak memory are those of `fewbits quantize`, in a separate process.\n")
    print(f"prompt: {PROMPT}")
    for name, text in sentences.items():
        print(f"  {name:24s} {text!r}")
    print(f"\nfiles and receipts are in {options.out}/; {time.monotonic() - began:.0f} s in all")
    return 0


def note(text: str) -> None:
    print(f"[demo] {text}", file=sys.stderr)


def quantized(model: Path, out: Path, kind: str, cache: Path) -> dict[str, Any]:
    """Quantize in a separate process, so that the peak memory is its own -> its receipt."""
    target = out / f"smollm2-{kind.upper()}.gguf"
    note(f"fewbits quantize demo:smollm2 --to {kind} --effort fast --out {target}")
    command = [
        sys.executable,
        "-m",
        "fewbits",
        "quantize",
        str(model),
        "--to",
        kind,
        "--effort",
        "fast",
        "--out",
        str(target),
    ]
    if any(target.with_name(target.name + end).exists() for end in (".receipt.json", ".journal")):
        command.append("--overwrite")  # the files are of an earlier demo
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise FewbitsError(
            f"quantizing to {kind} failed with exit code {done.returncode}; its message is above"
        )
    receipt: dict[str, Any] = json.loads(done.stdout)
    return receipt


def measure(model: Path, quantized_models: list[Path], progress: StageProgress) -> dict[str, Any]:
    """Evaluate all models on text that the reference generates -> `Evaluation` as data."""
    from ..evaluation import Settings, evaluate, self_text

    reference = open_checkpoint(model)
    note(f"sampling {WINDOWS * CONTEXT} tokens from the reference, then scoring all models on them")
    text = self_text(reference, WINDOWS * CONTEXT, SEED, CONTEXT, progress)
    settings = Settings(context=CONTEXT, prompts=0)
    result = evaluate(
        reference, [open_checkpoint(path) for path in quantized_models], text, settings, None, progress
    )
    data: dict[str, Any] = json.loads(result.to_json())
    return data


def write_sentences(model: Path, quantized_models: list[Path]) -> dict[str, str]:
    """The same prompt, continued greedily by every model -> name -> text."""
    import torch

    from ..adapters.transformers import load_model, load_tokenizer
    from ..evaluation.generation import greedy

    reference = open_checkpoint(model)
    tokenizer = load_tokenizer(reference)
    prompt = torch.tensor([tokenizer(PROMPT).input_ids])

    def sentence(checkpoint: Checkpoint) -> str:
        return tokenizer.decode(greedy(load_model(checkpoint), prompt, NEW_TOKENS)[0])

    return {"reference (bf16)": sentence(reference)} | {
        p.name: sentence(open_checkpoint(p)) for p in quantized_models
    }


def row(scores: dict[str, Any], receipt: dict[str, Any] | None) -> dict[str, Cell]:
    """One line of the demo's table."""
    far = scores["fidelity"]
    return {
        "model": scores["name"] if receipt else "reference (bf16)",
        "size": size(scores["nbytes"]),
        "bits/weight": scores["bits_per_weight"],
        "KL": far["kl"][0] if far else None,
        "+-": far["kl"][1] if far else None,
        "top-1 %": 100 * far["agreement"][0] if far else None,
        "perplexity": scores["perplexity"][0],
        "seconds": receipt["seconds"] if receipt else None,
        "peak memory": size(receipt["peak_memory_bytes"]) if receipt else None,
    }
