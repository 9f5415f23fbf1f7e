"""`fewbits plan`: size, memory, time and engines of a quantization before it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite

from ..errors import PlanError
from ..preflight import Preflight, parameters, preflight
from ..preflight.cache import KINDS
from ..table import Cell, size, table
from ..workflow.quantize import opened
from ..workflow.text import stand_in, with_text, writes_text
from .options import method_arguments, options_of, type_arguments
from .units import gib

EXAMPLES = """Reads headers and measures this machine for a second or two. Sizes are exact, memory is an
upper bound, times are rough, tokens/s are the limit set by memory bandwidth.

The exit code is 3 if --engine NAME[=VERSION] cannot load the result (llama.cpp=b4000: that build, installed
or not), or if running the result needs more than --memory.

examples:
  fewbits plan ./Llama-3.2-1B --to q4_k_m --context 8192 --batch 4
  fewbits plan Qwen/Qwen3-0.6B --to int4_g128 --file gptq --engine vllm
  fewbits plan ./Llama-3.2-1B --to q8_0 --engine llama.cpp=b4000 --memory 8 --json
  fewbits plan --params 65e9"""
NOT = 3


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?")
    type_arguments(parser)
    parser.add_argument("--params", type=float, metavar="N", help="without MODEL: bytes of N parameters")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    result = parser.add_argument_group("running the result")
    result.add_argument(
        "--context", type=int, default=4096, dest="run_context", metavar="N", help="tokens (default 4096)"
    )
    result.add_argument("--batch", type=int, default=1, metavar="B", help="sequences at once (default 1)")
    result.add_argument("--kv-cache", choices=KINDS, default="f16", dest="run_cache", help="(default f16)")
    result.add_argument(
        "--engine", action="append", default=[], metavar="NAME[=VERSION]", help="must load it; repeatable"
    )
    result.add_argument("--memory", type=gib, metavar="GIB", help="memory limit for running the result")
    method_arguments(parser)
    text = parser.add_argument_group("calibration")
    text.add_argument("--calibrate", metavar="SOURCE", help="as in quantize; text is not read")
    text.add_argument("--tokens", type=int, metavar="N", help="number of tokens (default 32768)")
    text.add_argument("--activation-memory", type=gib, default="2", metavar="GIB", help="(default 2)")
    parser.set_defaults(context=None, seed=None, scratch=None, device="auto", compute="auto")


def run(options: argparse.Namespace) -> int:
    if options.params is not None:
        return show_parameters(options)
    if options.model is None:
        raise PlanError("nothing to plan: give MODEL and --to TYPE, or --params N")
    if options.run_context < 1 or options.batch < 1:
        raise PlanError(f"--context {options.run_context} --batch {options.batch}: each is at least 1")
    choices = options_of(options)
    checkpoint, path = opened(options.model, options.cache_dir)
    file_type = choices.place(path, checkpoint, None)[1]
    request = replace(choices.request(), file=file_type.name)
    request = with_text(request, checkpoint, choices, stand_in(choices))
    stated = dict(engine_of(text) for text in options.engine)
    place = options.run_context, options.batch, options.run_cache
    report = preflight(checkpoint, request, place, stated, writes_text(request))
    unfit = objections(report, stated, options.memory)
    if options.json:
        print(json.dumps(report.as_dict() | {"unfit": unfit}, indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(sections(report)))
    for line in unfit:
        print(f"fewbits plan: {line}", file=sys.stderr)
    return NOT if unfit else 0


def engine_of(text: str) -> tuple[str, str | None]:
    """`llama.cpp=b4000` -> (name, version)."""
    name, _, version = text.partition("=")
    return name, version or None


def objections(report: Preflight, stated: dict[str, str | None], memory: int | None) -> list[str]:
    """What speaks against it: a named engine that cannot load the result, memory that does not suffice."""
    lines = [
        f"{verdict.engine} {verdict.version or ''} cannot load this: {verdict.why}".replace("  ", " ")
        for verdict in report.engines
        if verdict.engine in stated
        and (verdict.loads is False or (stated[verdict.engine] is None and not verdict.installed))
    ]
    if memory is not None and report.run_memory > memory:
        lines.append(f"running the result takes {size(report.run_memory)}, more than {memory / 2**30:g} GiB")
    return lines


def sections(report: Preflight) -> list[str]:
    """The estimate as text."""
    return [
        output_table(report),
        cache_table(report),
        work_table(report),
        speed_table(report),
        engine_table(report),
        *(f"fused group of two formats: {mixed}" for mixed in report.fused),
        *(f"note: {note}" for note in report.notes),
    ]


def output_table(report: Preflight) -> str:
    rows: list[list[Cell]] = [
        [part.name, part.weights, size(part.nbytes), part.bits_per_weight if part.weights else None]
        for part in report.parts
    ]
    rows.append([f"file ({report.file})", report.weights, size(report.output), report.bits_per_weight])
    return table(["output", "weights", "size", "bits/weight"], rows)


def cache_table(report: Preflight) -> str:
    if report.kv is None:
        return "key-value cache: not known"
    head = ["key-value cache", "bits", "a token", f"{report.context} tokens x {report.batch}"]
    rows: list[list[Cell]] = []
    for kind in KINDS:
        whole = report.kv.nbytes(kind, report.context, report.batch)
        rows.append([kind, report.kv.bits(kind), size(report.kv.per_token(kind)), size(whole)])
    return table(head, rows)


def work_table(report: Preflight) -> str:
    work = report.work
    times: list[list[Cell]] = [[what, rounded(spent)] for what, spent in work.seconds.items()]
    rows: list[list[Cell]] = [
        ["quantize: peak memory", size(work.peak_memory), work.way],
        ["quantize: disk", size(work.disk), f"{size(work.output)} to stay"],
        ["run: memory", size(report.run_memory), f"weights + {size(report.cache)} {report.kind} cache + "
         f"{size(report.overhead)} overhead"],
    ]  # fmt: skip
    times.append(["in all, roughly", rounded(work.total_seconds)])
    need = table(["need", "bytes", ""], rows)
    return f"{need}\n\n{table(['time to quantize', 'seconds'], times, digits=2)}"


def speed_table(report: Preflight) -> str:
    rows: list[list[Cell]] = [
        [name, rounded(rate), bound and rounded(bound), {True: "yes", False: "no", None: ""}[fits]]
        for name, rate, bound, fits in report.speeds()
    ]
    return table(["machine", "GB/s", "tokens/s at most", "fits"], rows, digits=3)


def rounded(value: float) -> float | int:
    return round(value) if value >= 10 else value


def engine_table(report: Preflight) -> str:
    words = {True: "yes", False: "no", None: "?"}
    rows: list[list[Cell]] = [[v.engine, v.version, words[v.loads], v.why] for v in report.engines]
    return table(["engine", "version", "loads", "why"], rows)


def show_parameters(options: argparse.Namespace) -> int:
    """--params: bytes by format, of a number alone."""
    if options.model is not None or options.to is not None:
        raise PlanError("--params needs no model; leave out MODEL and --to")
    if not isfinite(options.params) or options.params < 1:
        raise PlanError(f"--params {options.params:g}: at least 1 parameter")
    sizes = parameters(options.params)
    if options.json:
        rows = [dict(zip(("format", "bits_per_weight", "nbytes"), row, strict=True)) for row in sizes]
        print(json.dumps({"parameters": options.params, "rows": rows}, indent=1))
        return 0
    lines: Sequence[Sequence[Cell]] = [[name, bits, size(nbytes)] for name, bits, nbytes in sizes]
    print(table([f"{options.params:g} parameters", "bits/weight", "size"], lines))
    return 0
