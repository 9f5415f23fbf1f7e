"""What quantizing itself will take: peak memory, disk, time.

    streaming          this process + one tensor: mapped source, planes twice, a few rows in f32
    block by block     two blocks in f32 + hidden states + 1.5 GiB (the bound that bench/calibrate holds; more
                       where three Hessians of the widest input are more)
    the whole model    in f32 twice and its gradients' path, where polish or writing the text needs it

    time = codes (measured, by format) + passes x 2 x weights x tokens / rate + Hessians + digests
    passes: one to measure, one through the quantized block (one for both where all batches can wait inside
    it), and the same again for the float model beside it

Times are rough: attention, norms and the disk are left out, and the machine is measured for a moment only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from ..algorithms import NEEDS
from ..calibrate.sampling import ROWS_AT_ONCE, weight_nbytes, writer_kind
from ..files.checkpoint import Checkpoint
from ..files.output import Job, Output
from ..formats.base import CHUNK, Format
from ..memory import peak_memory, reset_peak_memory
from ..model.sites import Site, sites
from ..plan.choices import Decision
from ..runtime.decode import faster_dtype
from ..train.polish import PolishSettings
from ..train.rounding import EFFORTS
from ..workflow.request import Request
from ..workflow.task import Spec, spec_of
from .sizes import file_nbytes, job_nbytes
from .speed import Encoding, digesting, encodings, multiplying

ALLOWANCE = 3 * 2**29  # 1.5 GiB: torch, transformers, Hessians and what is quantized of a block
BESIDE = 3 * 2**28  # of which this much is not Hessians
ROWS_IN_F32 = 10  # copies of CHUNK weights in f32 that an encoder holds at most
MARGIN = 64 * 2**20  # allocators keep what was freed; digests read their input in pieces
BACKWARD = 3  # a forward and a backward pass cost three forward passes


@dataclass(frozen=True)
class Work:
    """way: "streaming", "block by block" or "whole model". seconds: by what is done. All else in bytes.

    here: what this process takes already, in peak_memory. scratch: beside the output until the end.
    """

    way: str
    peak_memory: int
    here: int
    output: int
    scratch: int
    seconds: Mapping[str, float]

    @property
    def disk(self) -> int:
        return self.output + self.scratch

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Task:
    """One weight to be encoded, and how. walked: does the walk over the blocks do it?"""

    site: Site | None
    shape: tuple[int, int]
    format: str
    algorithm: str
    options: Mapping[str, Any]
    walked: bool


def tasks_of(
    checkpoint: Checkpoint, target: Output, decisions: Mapping[str, Decision], request: Request
) -> list[Task]:
    """Every weight that gets new codes."""
    known = {site.name: site for site in sites(checkpoint)}
    found = []
    for job in target.jobs:
        for name in job.sources:
            tensor = checkpoint.tensors[name]
            kind = job.kind
            if not isinstance(kind, Format) or tensor.kind == kind or len(tensor.shape) < 2:
                continue
            site, rule = known.get(name), decisions[job.name].rule
            spec = spec_of(kind, rule, request.method, request.search)
            inside = site is not None and site.block is not None
            walked = inside and request.tokens is not None
            if NEEDS[spec.algorithm] != "nothing" and not (inside and request.calibrated):
                spec = Spec(kind, "rtn", {"search": request.search})
            shape = (prod(tensor.shape[:-1]), tensor.shape[-1])
            found.append(Task(site, shape, kind.name, spec.algorithm, spec.options, walked))
    return found


def work_of(
    checkpoint: Checkpoint,
    target: Output,
    decisions: Mapping[str, Decision],
    request: Request,
    writes_text: bool = False,
) -> Work:
    """writes_text: does the model write its calibration text itself? Measures for a second or two."""
    reset_peak_memory()
    here = peak_memory()  # before anything is measured
    tasks = tasks_of(checkpoint, target, decisions, request)
    walked = [task for task in tasks if task.walked]
    blocks = _block_weights(checkpoint) if walked else [0]
    model = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    way, peak, hidden = "streaming", here + MARGIN + max(map(_job_peak(checkpoint), target.jobs)), 0
    if walked:
        hidden = _hidden_nbytes(checkpoint, request)
        way = "block by block"
        peak = max(peak, _walk_peak(walked, blocks, hidden, request))
    if walked and (request.method.polish or writes_text):
        way = "whole model"
        nbytes = 12 * model if request.method.polish else weight_nbytes(checkpoint, writer_kind(checkpoint))
        peak = max(peak, nbytes + ALLOWANCE)
    inside = {task.site.name for task in walked if task.site}
    sizes = job_nbytes(target)
    kept = sum(sizes[job.name] for job in target.jobs if inside & set(job.sources))
    beyond = max(0, hidden - request.streaming.activation_memory)
    output = file_nbytes(target)
    seconds = _seconds(tasks, walked, blocks, model, request, writes_text)
    seconds["digests and writing"] = 2 * output / digesting()
    return Work(way, peak, here, output, kept + beyond, seconds)


def _block_weights(checkpoint: Checkpoint) -> list[int]:
    """Weights of each block, norms and biases left out."""
    found: dict[int, int] = {}
    for site in sites(checkpoint):
        if site.block is not None:
            found[site.block] = found.get(site.block, 0) + prod(site.shape)
    return list(found.values()) or [0]


def _job_peak(checkpoint: Checkpoint) -> Any:
    """-> job -> bytes that its largest source holds while it is encoded."""

    def peak(job: Job) -> int:
        return max((_source_peak(checkpoint, job, name) for name in job.sources), default=0)

    return peak


def _source_peak(checkpoint: Checkpoint, job: Job, name: str) -> int:
    tensor = checkpoint.tensors[name]
    count, turned = prod(tensor.shape), job.entry is not None and (job.entry.rows or job.entry.add)
    held = tensor.nbytes * (2 if turned else 1)
    if tensor.quantized and tensor.kind != job.kind:
        held += 4 * count  # decoded
    if tensor.kind == job.kind:
        return held
    if not isinstance(job.kind, Format):
        return held + 4 * min(count, 2 * CHUNK) + 4 * count
    format, (n, k) = job.kind, (prod(tensor.shape[:-1]), tensor.shape[-1])
    inner = format.ordered or format
    if format.ordered:
        held += tensor.nbytes + 2 * count  # columns in the order of groups, and their codes put back
    alone = all(plane.flat is None and plane.rows == 1 for plane in inner.planes)
    rows = min(n, max(1, CHUNK // k)) if alone else n
    return held + 2 * format.nbytes(n, k) + ROWS_IN_F32 * 4 * rows * k


def _hidden_nbytes(checkpoint: Checkpoint, request: Request) -> int:
    """Hidden states of the text: of the quantized model, and of the float one beside it."""
    assert request.tokens is not None
    width = next((s.shape[1] for s in sites(checkpoint) if s.role == "embed"), 0)
    streams = 2 if request.method.gptaq else 1
    return request.tokens.count * width * request.streaming.dtype.itemsize * streams


def _walk_peak(walked: Sequence[Task], blocks: Sequence[int], hidden: int, request: Request) -> int:
    widest = max((t.shape[1] for t in walked if NEEDS[t.algorithm] == "hessian"), default=0)
    held = request.streaming.activation_memory if request.method.sequential else hidden
    states = min(max(hidden, _waiting(walked, request)), held)
    return 2 * 4 * max(blocks) + states + max(ALLOWANCE, 3 * 4 * widest**2 + BESIDE)


def _waiting(walked: Sequence[Task], request: Request) -> int:
    """Bytes of all batches waiting inside a block, where that is how it is walked."""
    assert request.tokens is not None
    width = max(task.shape[1] for task in walked)
    streams = 2 if request.method.gptaq else 1
    narrow = min(task.shape[1] for task in walked)
    return request.tokens.count * (6 * narrow + width) * request.streaming.dtype.itemsize * streams


def _seconds(
    tasks: Sequence[Task],
    walked: Sequence[Task],
    blocks: Sequence[int],
    model: int,
    request: Request,
    writes_text: bool,
) -> dict[str, float]:
    largest: dict[tuple[str, str], Task] = {}
    for task in tasks:
        key = (task.format, task.algorithm)
        if key not in largest or prod(task.shape) > prod(largest[key].shape):
            largest[key] = task
    wanted = {key: (task.shape, task.options) for key, task in largest.items()}
    rates = encodings(wanted, request.method.gptaq)
    seconds = {"choosing codes": sum(rates[t.format, t.algorithm].seconds(*t.shape) for t in tasks)}
    if walked:
        seconds |= _walk_seconds(walked, sum(blocks), rates, request)
        seconds |= _model_seconds(walked, sum(blocks), model, request, writes_text)
    return seconds


def _walk_seconds(
    walked: Sequence[Task], weights: int, rates: Mapping[tuple[str, str], Encoding], request: Request
) -> dict[str, float]:
    """The passes over the text, and the Hessians of what its weights read."""
    assert request.tokens is not None
    method, streaming = request.method, request.streaming
    shape = max((task.shape for task in walked), key=prod)
    rate = multiplying(shape, 1024, streaming.dtype)
    dense = not any(task.site and task.site.expert is not None for task in walked)
    through = method.sequential and not method.learn and dense
    through = through and _waiting(walked, request) <= streaming.activation_memory
    passes = (1 if through else 2) * (2 if method.gptaq else 1)
    groups = {t.site.group: t for t in walked if t.site and NEEDS[t.algorithm] == "hessian"}
    squares = sum(t.shape[1] ** 2 for t in groups.values())
    gather = request.tokens.count * squares * (3 if method.gptaq else 1)
    judge = sum(4 * t.shape[0] * t.shape[1] ** 2 for t in walked if t.site and t.site.group in groups)
    factors = sum(rates[t.format, t.algorithm].factoring(t.shape[1]) for t in groups.values())
    return {
        "passes over the text": passes * 2 * weights * request.tokens.count / rate,
        "Hessians": (gather + judge) / rate + factors,
    }


def _model_seconds(
    walked: Sequence[Task], weights: int, model: int, request: Request, writes_text: bool
) -> dict[str, float]:
    """What runs besides: writing the text, learned rounding, polish."""
    assert request.tokens is not None
    method, tokens = request.method, request.tokens
    shape, context = max((task.shape for task in walked), key=prod), tokens.windows.shape[1]
    rate, found = multiplying(shape, 1024), {}
    if writes_text:
        found["writing the text"] = (
            2 * model * tokens.count / multiplying(shape, ROWS_AT_ONCE, faster_dtype())
        )
    if method.learn:
        settings = EFFORTS[method.learn]
        seen = settings.steps * settings.batch * request.streaming.batch * context * BACKWARD
        found["learned rounding"] = 2 * weights * (seen + settings.checks * tokens.count) / rate
    if method.polish:
        polish = PolishSettings(steps=method.polish)
        judged = (1 + ceil(polish.steps / polish.every)) * polish.held_out * context
        seen = polish.steps * polish.batch * context * BACKWARD + judged + tokens.count
        found["polish"] = 2 * model * seen / rate
    return found
