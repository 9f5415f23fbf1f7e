"""`fewbits evaluate`: what quantizing cost, measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.hub import resolve
from ..devices import Room
from ..errors import FileError, PlanError
from ..files.open import open_checkpoint
from ..memory import left_of
from .options import device_argument
from .progress import StageProgress
from .units import gib

if TYPE_CHECKING:
    from ..evaluation import Evaluation, ModelScores, Settings, Simulation, Text
    from ..files.checkpoint import Checkpoint

CALIBRATION, WINDOW = 4096, 512  # tokens to calibrate activations on, and in a window
EXAMPLES = """Windows and scoring are those of llama-perplexity: windows of --context tokens, the second half
scored. Classifiers, masked models and embeddings are compared on single texts, one a line of --text, or in
--labels. REFERENCE and QUANTIZED are Hugging Face or native directories, .gguf files, hub names, in any
combination.

examples:
  fewbits evaluate ./Llama-3.2-1B Llama-3.2-1B-Q4_K_M.gguf --text wiki.test.raw
  fewbits evaluate demo:smollm2 smollm2-Q4_K_M.gguf smollm2-Q3_K_M.gguf --sample 4096 --json
  fewbits evaluate ./Llama-3.2-1B Llama-3.2-1B-Q4_K_M.gguf --text wiki.test.raw --engine llama.cpp
  fewbits evaluate REFERENCE QUANTIZED --text wiki.test.raw --activations int8_dynamic
  fewbits evaluate REFERENCE QUANTIZED --text wiki.test.raw --context 2048 --kv-cache int4
  fewbits evaluate ./distilbert-sst2 distilbert-int8 --labels dev.jsonl
  fewbits evaluate ./all-MiniLM-L6-v2 minilm-int4 --text sentences.txt"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REFERENCE")
    parser.add_argument("quantized_models", metavar="QUANTIZED", nargs="+")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", type=Path, metavar="FILE", help="text to score, UTF-8")
    text.add_argument(
        "--sample", type=int, metavar="N", help="score N tokens sampled from the reference itself"
    )
    text.add_argument(
        "--labels", type=Path, metavar="FILE",
        help='of a classifier of texts: JSON lines, {"text": ..., "label": name or number of a class}; '
        '"text_pair": a second text',
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of --sample (default 0)")
    parser.add_argument(
        "--context", type=int, default=512, metavar="N", help="tokens in a window (default 512)"
    )
    parser.add_argument(
        "--score-from", type=int, metavar="N", help="first position scored (default: half the context)"
    )
    parser.add_argument("--windows", type=int, metavar="N", help="score at most N windows (default: all)")
    parser.add_argument(
        "--prompts", type=int, default=4, metavar="N", help="greedy continuations (default 4)"
    )
    parser.add_argument(
        "--engine", metavar="NAME", help="run the quantized models in it: llama.cpp, transformers, ..."
    )
    _simulation_arguments(parser)
    device_argument(parser)
    parser.add_argument(
        "--memory", type=gib, metavar="GIB",
        help="memory to take (default: what is free); what does not fit runs block by block, side by side",
    )  # fmt: skip
    parser.add_argument("--show", action="store_true", help="print the continuations side by side")
    parser.add_argument(
        "--record", action="store_true", help="keep the figures in the quantized models' receipts and cards"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")


def _simulation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantized models with quantized activations or cache, simulated")
    group.add_argument(
        "--activations", metavar="SCHEME", help="of each weight's input: int8_dynamic, fp8_dynamic, ..."
    )
    group.add_argument("--kv-cache", metavar="SCHEME", help="of keys and values: int8, int4, int2, fp8")
    group.add_argument(
        "--activation-text",
        metavar="FILE",
        help="calibrate activations on this text, or on the reference's own with `self`: fixes the ranges of "
        "static schemes and of a cache in fp8, and leaves sites that cannot bear it in float (default: none "
        "is left)",
    )
    group.add_argument(
        "--activation-limit", type=float, metavar="DB", help="what a site must keep (default 35)"
    )
    group.add_argument("--observer", default="mse", metavar="RULE", help="of static ranges (default mse)")


def _simulation(options: argparse.Namespace) -> Simulation:
    """The options of `_simulation_arguments`, without their calibration text."""
    from ..evaluation import Simulation

    given = Simulation(options.activations, options.kv_cache, observer=options.observer)
    return given if options.activation_limit is None else replace(given, limit_db=options.activation_limit)


def _calibrated(
    given: Simulation, options: argparse.Namespace, reference: Checkpoint, progress: StageProgress
) -> Simulation:
    """The same with its calibration text as windows of 512 tokens, if it has one."""
    from ..evaluation import read_text, self_text

    if options.activation_text is None:
        return given
    if options.activation_text == "self":
        room = Room(options.device, left_of(options.memory))
        tokens = self_text(reference, CALIBRATION, options.seed + 1, WINDOW, progress, room).tokens
    else:
        tokens = read_text(reference, read_file(Path(options.activation_text)), "calibration").tokens[
            :CALIBRATION
        ]
    width = max(1, min(WINDOW, len(tokens)))
    windows = tokens[: len(tokens) // width * width].view(-1, width)
    return replace(given, calibration=windows)


def _announce(models: Sequence[Checkpoint], text: Text, settings: Settings, writes: bool) -> None:
    """Say what memory the evaluation needs. writes: does the reference write text first?"""
    from ..calibrate.sampling import writer_of
    from ..evaluation import memory_need

    need = memory_need(models, text, settings)
    if writes:
        nbytes = writer_of(models[0], Room(settings.device, left_of(settings.memory))).nbytes
        need = replace(need, peak=max(need.peak, need.here + nbytes))
    print(f"fewbits evaluate: {need.line()}", file=sys.stderr)


def run(options: argparse.Namespace) -> int:
    from ..adapters.forward import GENERATES
    from ..adapters.transformers import head_of, load_tokenizer
    from ..evaluation import Settings, blank_text, evaluate, read_text, self_text

    reference = open_checkpoint(resolve(options.reference, options.cache_dir))
    quantized_models = [
        open_checkpoint(resolve(quantized, options.cache_dir)) for quantized in options.quantized_models
    ]
    settings = Settings(
        context=options.context,
        score_from=options.score_from,
        max_windows=options.windows,
        prompts=options.prompts,
        simulation=_simulation(options),
        memory=options.memory,
        engine=options.engine,
        device=options.device,
    )
    if (head := head_of(reference)) not in GENERATES:
        return _run_head(options, reference, quantized_models, settings)
    if options.labels is not None:
        raise PlanError(f"--labels is for classifiers; {reference.path} generates text: --text, or --sample")
    if options.text is None and head != "causal":
        raise PlanError(f"{reference.path} writes nothing without an input: give a text (--text)")
    if options.text is not None:
        text = read_text(reference, read_file(options.text), str(options.text))
    else:
        text = blank_text(options.sample, options.context)
    samples = options.text is None or options.activation_text == "self"
    _announce([reference, *quantized_models], text, settings, samples)
    with StageProgress() as progress:
        simulation = _calibrated(settings.simulation, options, reference, progress)
        settings = replace(settings, simulation=simulation)
        if options.text is None:
            room = Room(options.device, left_of(options.memory))
            text = self_text(reference, options.sample, options.seed, options.context, progress, room)
        tokenizer = load_tokenizer(reference)
        result = evaluate(reference, quantized_models, text, settings, tokenizer.decode, progress)
    if options.record:
        for path, quantized in zip(options.quantized_models, result.quantized_models, strict=True):
            record(Path(path), result, quantized)
    print(result.to_json() if options.json else result.table())
    if options.show and not options.json:
        print(f"\n{result.samples()}")
    return 0


def _run_head(
    options: argparse.Namespace, reference: Checkpoint, models: Sequence[Checkpoint], settings: Settings
) -> int:
    """A model without a language model's head: texts one by one."""
    from ..evaluation import evaluate_head, head_memory_need, labelled, lines_of
    from ..release.publish import measured

    path = options.labels or options.text
    if path is None:
        raise PlanError(f"--sample: {reference.path} generates no text; give --text FILE, a text a line")
    examples = (labelled if options.labels else lines_of)(read_file(path), str(path))
    need = head_memory_need([reference, *models], len(examples.texts), settings)
    print(f"fewbits evaluate: {need.line()}", file=sys.stderr)
    with StageProgress() as progress:
        simulation = _calibrated(settings.simulation, options, reference, progress)
        result = evaluate_head(
            reference, models, examples, replace(settings, simulation=simulation), progress
        )
    if options.record:
        for place, found in zip(options.quantized_models, result.quantized_models, strict=True):
            about = {"text": result.source, "texts": result.texts, "rows": result.rows}
            measured(Path(place), {**about, "figures": dict(found.figures)})
    print(result.to_json() if options.json else result.table())
    return 0


def record(path: Path, result: Evaluation, quantized: ModelScores) -> None:
    """Keep a quantized model's figures in its receipt and card."""
    from ..release.publish import measured

    if quantized.fidelity is None:
        return
    figures = {
        "text": result.source,
        "ran": quantized.ran,
        "tokens": result.tokens_scored,
        "context": result.context,
        "kl": quantized.fidelity.kl.value,
        "kl_error": quantized.fidelity.kl.error,
        "agreement": quantized.fidelity.agreement.value,
        "perplexity": quantized.perplexity.value,
        "reference_perplexity": result.reference.perplexity.value,
    }
    measured(path, figures)


def read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: is not UTF-8 (byte {error.start}); convert it, e.g. with iconv") from error
