"""`fewbits train --lora`: a low-rank adapter beside packed weights, as a PEFT directory."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from copy import copy
from pathlib import Path

from ..adapters.peft import Shape, check_place
from ..devices import device_of
from ..errors import PlanError
from ..files.checkpoint import Checkpoint
from ..train.lora import LoraSettings
from ..workflow.lora import STARTS, Lora, Trained, Where, check_names, train_adapter
from ..workflow.quantize import opened
from ..workflow.text import reader
from . import quantize
from .exit_codes import DIFFERS, DONE
from .options import options_of
from .progress import StageProgress

LR = LoraSettings.lr
OF_QUANTIZING = (
    "effort", "method", "bits_per_weight", "smooth", "awq", "rotate", "equalize", "distill", "sparsity",
    "prune", "sparsity_pattern", "activations", "kv_cache", "file", "rule", "plan", "no_search", "strict",
    "requantize", "no_verify", "push",
)  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("low-rank adapter (LoRA): the weights of MODEL stay as they are")
    group.add_argument(
        "--lora", type=int, metavar="RANK",
        help="train an adapter of this rank instead; MODEL is quantized, or float and quantized first (--to)",
    )  # fmt: skip
    group.add_argument(
        "--lora-alpha", type=float, metavar="X", help="scale of the adapter times its rank (default 2 RANK)"
    )
    group.add_argument(
        "--lora-dropout", type=float, metavar="X", help="share of its inputs dropped in training (default 0)"
    )
    group.add_argument(
        "--lora-targets", metavar="NAMES",
        help="names of linear layers, separated by commas (default: all of the blocks)",
    )  # fmt: skip
    group.add_argument(
        "--lora-group", type=int, metavar="N",
        help="A is constant in groups of N columns, so that formats with a float offset for each group can "
        "be merged exactly (QA-LoRA)",
    )  # fmt: skip
    group.add_argument(
        "--parent", metavar="MODEL", help="the model before quantization (default with --to: MODEL)"
    )
    group.add_argument(
        "--init", choices=STARTS, help="zero (default), or loftq: begin at the quantization error W - W_q"
    )


def wanted(given: argparse.Namespace) -> bool:
    """Whether an adapter is asked for; PlanError for its options without it."""
    names = ("lora_alpha", "lora_dropout", "lora_targets", "lora_group", "parent", "init")
    alone = [f"--{name.replace('_', '-')}" for name in names if getattr(given, name) is not None]
    if given.lora is None and alone:
        raise PlanError(f"{', '.join(alone)}: of an adapter; give --lora RANK too")
    return given.lora is not None


def run(given: argparse.Namespace, of_codes: Sequence[str]) -> int:
    """of_codes: names of the options that only training of codes has."""
    if given.calibrate is None:
        raise PlanError(
            "--lora learns a text: give --calibrate FILE (or self, text that the model generates)"
        )
    other = [f"--{name.replace('_', '-')}" for name in of_codes if getattr(given, name) is not None]
    if other:
        raise PlanError(
            f"{', '.join(other)}: of training codes, which --lora leaves as they are: leave it out"
        )
    first = [f"--{name.replace('_', '-')}" for name in OF_QUANTIZING if getattr(given, name)]
    if given.to is None and first:
        raise PlanError(
            f"{', '.join(first)}: how a float model is quantized before it gets its adapter; give --to TYPE "
            "too, or leave it out"
        )
    out = given.out or Path(f"{Path(given.model).name.removesuffix('.gguf')}-lora")
    alpha = 2 * given.lora if given.lora_alpha is None else given.lora_alpha
    targets = tuple(name for name in (given.lora_targets or "").split(",") if name)
    shape = Shape(given.lora, alpha, given.lora_dropout or 0.0)
    lora = Lora(shape, targets, given.loss, given.init or "zero")
    lr = LR if given.lr is None else given.lr
    settings = LoraSettings(given.steps, lr, given.batch, seed=given.seed or 0, group=given.lora_group)
    check_place(out, given.overwrite)
    model, path = opened(given.model, given.cache_dir)
    parent = opened(given.parent, given.cache_dir)[0] if given.parent else model if given.to else None
    lora.check(parent, settings)
    check_names(model, targets)
    # One JSON document on stdout: the adapter's.
    with redirect_stdout(sys.stderr) if given.json else nullcontext():
        base, name, code = _base(given, model, path)
    if code == DIFFERS:
        return code
    with StageProgress() as progress:
        text = reader(base, options_of(given), progress)(given.calibrate)
        for note in text.notes:
            print(f"fewbits train: {note}", file=sys.stderr)
        where = Where(str(device_of(given.device)), given.overwrite, name, progress)
        trained = train_adapter(base, out, text, lora, settings, parent, where)
    print(json.dumps(trained.record(), indent=1) if given.json else _summary(trained))
    return code


def _base(given: argparse.Namespace, model: Checkpoint, path: Path) -> tuple[Checkpoint, str, int]:
    """The model that gets the adapter, quantized first where a type is given; its name; an exit code."""
    if given.to is None:
        return model, given.model, DONE
    place, _ = options_of(given).place(path, model, None)
    if place.exists() and not given.overwrite:
        raise PlanError(
            f"{place}: exists; train on it: fewbits train {place} --lora {given.lora} --parent {given.model}"
        )
    first = copy(given)
    first.out = place
    code = quantize.run(first)
    return opened(str(place))[0], str(place), code


def _summary(trained: Trained) -> str:
    first, best, last = trained.history[0], trained.best, trained.history[-1]
    what = f"held-out {trained.loss} loss {first.held_out:.4f} -> {best.held_out:.4f}"
    kept = f"after {best.step} of {last.step} steps"
    if best is first:
        kept = f"no step of {last.step} improved it: this is the adapter before training"
    size = f"{trained.parameters} numbers on {len(trained.modules)} linear layers"
    return f"{what} ({kept})\nwrote {trained.out}: {size}"
