"""The options that say how codes are chosen: one word of effort, or the parts by name."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ..errors import PlanError
from ..plan.method import EFFORTS, METHODS, Method


def method_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how codes are chosen")
    group.add_argument(
        "--effort", choices=tuple(EFFORTS),
        help="quality for time: fast rounds to nearest, good (default) is GPTQ, best distils it as well",
    )  # fmt: skip
    group.add_argument(
        "--method", choices=tuple(METHODS),
        help="instead of an effort: rtn and hqq need no text, weighted a text or an importance matrix, gptq "
        "a text or Hessians, learned a text",
    )  # fmt: skip
    group.add_argument(
        "--smooth", nargs="?", type=float, const=-1.0, metavar="ALPHA",
        help="SmoothQuant: move outliers from activations into weights (ALPHA: searched unless given)",
    )  # fmt: skip
    for name, what in (
        ("awq", "AWQ: scale up the columns that carry large activations"),
        ("rotate", "rotate the residual stream and the values (Hadamard), fused into the weights"),
        ("equalize", "even out the ranges of weights that follow one another"),
    ):
        group.add_argument(f"--{name}", action="store_true", default=None, help=what)
    group.add_argument(
        "--polish", type=int, metavar="STEPS",
        help="afterwards distil block scales and norms against the model's own logits",
    )  # fmt: skip
    group.add_argument(
        "--activations", metavar="SCHEME",
        help="what a runtime is to do with activations, int8_dynamic for one: told by compressed-tensors and "
        "native directories",
    )  # fmt: skip


def method_of(options: argparse.Namespace) -> Method:
    if options.effort and options.method:
        raise PlanError("--effort and --method say two things; give one of them")
    plain = options.no_search and not options.effort
    base = (
        METHODS[options.method] if options.method else EFFORTS["fast" if plain else options.effort or "good"]
    )
    transforms = [*base.transforms]
    transforms += [n for n in ("rotate", "awq", "equalize") if getattr(options, n) and n not in transforms]
    details = {}
    if options.smooth is not None:
        transforms.append("smooth")
        if options.smooth >= 0:
            details["alpha"] = options.smooth
    polish = base.polish if options.polish is None else options.polish
    return replace(base, transforms=tuple(transforms), transform_options=details, polish=polish)
