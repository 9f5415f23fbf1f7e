"""Request: the input of `quantize`, and the checks that need no open file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..algorithms import NEEDS
from ..calibrate.statistics import Statistics, content_digest, stats_for
from ..calibrate.stats import Stats
from ..calibrate.tokens import Tokens
from ..devices import device_name
from ..errors import PlanError, raise_all
from ..plan import Plan, Rule
from ..plan.method import Method
from ..train.settings import DistillSettings, settings_faults
from .blockwise.settings import Streaming
from .task import takes


@dataclass(frozen=True)
class CommonOptions:
    """The options that Options and Request share and that a run uses unchanged.

    to: a llama.cpp file type (`q4_k_m`) or a format (`int4_g128`); None: only the rules of `plan`, which
    precede `to`. file: the output's file type; None: gguf for a path that ends in .gguf, native otherwise.
    search: search scales and offsets instead of using min-max ones. requantize: accept a quantized model.
    overwrite: replace an existing output. strict_calibration: too few tokens are an error. streaming: device
    of a calibrated run. memory: limit in bytes (None: free memory); a run that needs more is refused at the
    start. activations, kv_cache: schemes that native and compressed-tensors directories record for the
    runtime."""

    to: str | None = None
    plan: Plan = field(default_factory=Plan)
    file: str | None = None
    search: bool = True
    requantize: bool = False
    overwrite: bool = False
    strict_calibration: bool = False
    streaming: Streaming = field(default_factory=Streaming)
    activations: str | None = None
    kv_cache: str | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Request(CommonOptions):
    """How to quantize a checkpoint.

    method: how codes are chosen. tokens: calibration text for a method that runs the model. statistics: saved
    ones, for a method that needs no text. notes: for the receipt."""

    method: Method = field(default_factory=Method)
    tokens: Tokens | None = None
    statistics: Statistics | None = None
    notes: tuple[str, ...] = ()

    @property
    def needs_text(self) -> bool:
        """Whether runtime schemes need calibration text: static ranges, or scales of a KV cache."""
        return self.kv_cache is not None or "static" in (self.activations or "").split("_")

    @property
    def calibrated(self) -> bool:
        """Whether there is calibration text or statistics."""
        return self.tokens is not None or self.statistics is not None


def check_algorithms(request: Request) -> None:
    """PlanError that lists each rule (and the method) with an unknown algorithm or an unknown option."""
    method = request.method
    faults = _algorithm_faults("method", method.algorithm, method.options, request.search)
    for rule in request.plan.rules:
        algorithm = _algorithm(rule, method)
        search = request.search or rule.algorithm is None  # the method's own fault is already listed
        faults += _algorithm_faults(f"rule {rule.match!r}", algorithm, rule.options, search)
    raise_all(PlanError, "plan", faults)


def _algorithm(rule: Rule | None, method: Method) -> str:
    return (rule.algorithm if rule else None) or method.algorithm


def _algorithm_faults(where: str, algorithm: str, options: Mapping[str, object], search: bool) -> list[str]:
    try:
        known = takes(algorithm)
    except PlanError as error:
        return [f"{where}: {error}"]
    faults = [
        f"{where}: {algorithm} has no option {name!r}; it takes {', '.join(known)}"
        for name in options
        if name not in known
    ]
    if not search and "search" not in known:
        faults.append(
            f"{where}: {algorithm} always searches block parameters; leave out search=False (--no-search), "
            "or round to nearest (--effort fast)"
        )
    return faults


def check_method(request: Request) -> None:
    """PlanError if a method lacks the text or statistics that it needs."""
    needs = needs_of(request)
    faults = []
    if (needs or request.method.streams) and not request.calibrated:
        pruning = request.method.pruning
        who = next(iter(_needing(request)), pruning.prune if pruning else "this method")
        free = ", ".join(name for name, its in NEEDS.items() if its == "nothing")
        faults.append(
            f"{who} needs calibration data; give tokens, saved statistics, or a method without data ({free})"
        )
    if request.method.streams and request.tokens is None and request.statistics is not None:
        faults.append(
            "this method runs the model block by block, so saved statistics are not enough; give a text, or "
            "turn off the options that need it (sequential, gptaq, learn, distill, smooth, awq, equalize)"
        )
    if "rotate" in request.method.transforms and request.tokens is None and request.statistics is not None:
        faults.append("rotate changes the inputs of weights, so saved statistics do not apply; give a text")
    if "hessian" in needs and request.statistics is not None and "hessian" not in request.statistics.knows:
        faults.append(
            f"{request.statistics.source}: has no Hessian, which {_hungry(request)} needs; use "
            "--method weighted, or calibrate again"
        )
    if request.method.trains and request.tokens is not None:
        settings = DistillSettings(steps=request.method.trains, **request.method.training())
        name, windows = request.method.training_name, len(request.tokens.windows)
        faults += [f"{name}: {fault}" for fault in settings_faults(settings, windows)]
    raise_all(PlanError, "method", faults)


def needs_of(request: Request) -> set[str]:
    """The calibration data that the algorithms of the method and of the rules, and pruning, need."""
    pruning = request.method.pruning
    return {NEEDS[name] for name in _needing(request)} | ({pruning.needs} if pruning else set()) - {"nothing"}


def _hungry(request: Request) -> str:
    """What needs a Hessian: the algorithm, or else the choice of what is pruned."""
    pruning = request.method.pruning
    if NEEDS[request.method.algorithm] != "hessian" and pruning and pruning.needs == "hessian":
        return f"--prune {pruning.prune}"
    return request.method.algorithm


def _needing(request: Request) -> list[str]:
    """The algorithms of the method and of the rules that need calibration."""
    algorithms = (_algorithm(rule, request.method) for rule in (None, *request.plan.rules))
    return [name for name in dict.fromkeys(algorithms) if NEEDS.get(name, "nothing") != "nothing"]


def fingerprint_fields(request: Request) -> dict[str, object]:
    """The options that decide the output's bytes, by the names in the error of a refused resume."""
    fields: dict[str, object] = {
        "plan": request.plan.digest(),
        "type": request.to,
        "search": request.search,
        "requantize": request.requantize,
        "activations": request.activations,
        "kv_cache": request.kv_cache,
        "method": request.method.settings(),
    }
    if not request.method.settings() and not request.calibrated:
        return fields
    streaming, statistics = request.streaming, request.statistics
    return fields | {
        "text": None if request.tokens is None else request.tokens.digest,
        "statistics": None if statistics is None else statistics.digest or content_digest(statistics),
        "batch": streaming.batch,
        "device": device_name(streaming.place),
        "dtype": str(streaming.dtype),
        "seed": streaming.seed,
        "strict calibration": request.strict_calibration,
        "threads": torch.get_num_threads(),
    }


def calibration_of(request: Request) -> dict[str, object]:
    """The calibration text or statistics, for the receipt."""
    if request.tokens is not None:
        windows = request.tokens.windows
        about = {"source": request.tokens.source, "sha256": request.tokens.digest}
        return about | {"windows": windows.shape[0], "context": windows.shape[1], "tokens": windows.numel()}
    if request.statistics is not None:
        known = request.statistics
        digest = {"sha256": known.digest} if known.digest else {}
        return {"source": known.source, "tokens": known.tokens} | digest
    return {}


def stats_of(request: Request) -> Callable[[str], Stats | None]:
    """Saved statistics by tensor name, for the algorithms that need them."""
    saved, hessian = request.statistics, "hessian" in needs_of(request)
    return lambda name: None if saved is None else stats_for(saved, name, hessian)
