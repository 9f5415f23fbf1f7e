"""What quantizing takes of memory: from headers alone, before a weight is read.

streaming          this process + one tensor: mapped source, planes twice, a few rows in f32
block by block     two blocks in f32 and one in its file + hidden states + 1.5 GiB, or the Hessians of the
                   widest input and what is made of them
the whole model    what writes the calibration text; or the quantized model in f32, where its scales are
                   distilled
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ..algorithms import NEEDS
from ..calibrate.sampling import writer_of
from ..errors import ModelError
from ..files.checkpoint import Checkpoint
from ..files.output import Job, Output
from ..formats.base import CHUNK, Format
from ..memory import Need, free_memory, left_of, resident_memory
from ..model.sites import Site, per_block, sites
from ..plan.choices import Decision
from .request import Request
from .task import Spec, spec_of

ALLOWANCE = 3 * 2**29  # 1.5 GiB: torch, transformers, Hessians and what is quantized of a block
BESIDE = 11 * 2**26  # what is not Hessians, where these take more: torch, transformers, results
ROWS_IN_F32 = 10  # copies of CHUNK weights in f32 that an encoder holds at most
MARGIN = 64 * 2**20  # allocators keep what was freed; digests read their input in pieces
LEAST_STATES = 2**26  # bytes of hidden states in memory, where there is no more


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
    tasks = []
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
            tasks.append(Task(site, shape, kind.name, spec.algorithm, spec.options, walked))
    return tasks


def memory_need(
    checkpoint: Checkpoint,
    target: Output,
    decisions: Mapping[str, Decision],
    request: Request,
    writes_text: bool = False,
) -> Need:
    """writes_text: does the model write its calibration text itself? CalibrationError where there is no
    memory for that."""
    here = resident_memory()
    walked = [task for task in tasks_of(checkpoint, target, decisions, request) if task.walked]
    way, scratch = "streaming", 0
    peak = here + MARGIN + max(map(_job_peak(checkpoint), target.jobs), default=0)
    if walked:
        hidden = _hidden_nbytes(checkpoint, request)
        way, scratch = "block by block", max(0, hidden - request.streaming.activation_memory)
        peak = max(peak, _walk_peak(checkpoint, walked, hidden, request))
    whole = 0
    if walked and request.method.distill:
        whole = 8 * checkpoint.numel + ALLOWANCE
    if walked and writes_text:
        whole = max(whole, here + writer_of(checkpoint, left_of(request.memory)).nbytes)
    return Need("whole model" if whole else way, max(peak, whole), here, scratch)


def fitted(
    checkpoint: Checkpoint,
    target: Output,
    decisions: Mapping[str, Decision],
    request: Request,
    writes_text: bool = False,
) -> tuple[Request, Need]:
    """The request with as much of its hidden states in memory as fits, and what it needs then.

    The memory is that of the request, else what is free. ModelError where it does not suffice.
    """
    need = memory_need(checkpoint, target, decisions, request, writes_text)
    limit = _limit(request, need.here)
    if need.peak <= limit:
        return request, need

    def holding(nbytes: int) -> tuple[Request, Need]:
        less = replace(request, streaming=replace(request.streaming, activation_memory=nbytes))
        return less, memory_need(checkpoint, target, decisions, less, writes_text)

    least = min(LEAST_STATES, request.streaming.activation_memory)
    _, need = holding(least)
    if need.peak <= limit:
        return holding(least + limit - need.peak)
    instead = "" if need.way == "streaming" else ", or take --effort fast, which holds one tensor at a time"
    raise ModelError(
        f"{checkpoint.path}: quantizing it {need.line()}; {_have(request)}: free memory{instead}"
    )


def with_verification(need: Need, checkpoint: Checkpoint, request: Request, nbytes: int) -> Need:
    """The need of a run that ends with a forward pass of `nbytes`; ModelError where these are not there."""
    limit = _limit(request, need.here)
    peak = need.here + nbytes
    if peak > limit:
        raise ModelError(
            f"{checkpoint.path}: verifying the output needs {peak / 2**30:.2f} GiB of memory; "
            f"{_have(request)}: free memory, or leave it out (--no-verify)"
        )
    return replace(need, peak=max(need.peak, peak))


def _have(request: Request) -> str:
    """The memory that there is, in words."""
    limit = f"{_limit(request, resident_memory()) / 2**30:.2f} GiB are"
    return f"{limit} free" if request.memory is None else f"{limit} allowed (--memory)"


def _limit(request: Request, here: int) -> int:
    """Bytes that this process, which has `here` of them, may have at most."""
    return here + free_memory() if request.memory is None else request.memory


def block_weights(checkpoint: Checkpoint) -> list[int]:
    """Weights of each block, norms and biases left out."""
    return list(per_block(checkpoint, lambda site: prod(site.shape)).values()) or [0]


def _block_nbytes(checkpoint: Checkpoint) -> int:
    """Bytes that the largest block takes in its file."""
    nbytes = per_block(checkpoint, lambda site: checkpoint.tensors[site.name].nbytes)
    return max(nbytes.values(), default=0)


def _job_peak(checkpoint: Checkpoint) -> Any:
    """-> job -> bytes that its largest source holds while it is encoded."""

    def peak(job: Job) -> int:
        return max((_source_peak(checkpoint, job, name) for name in job.sources), default=0)

    return peak


def _source_peak(checkpoint: Checkpoint, job: Job, name: str) -> int:
    tensor = checkpoint.tensors[name]
    count, turned = prod(tensor.shape), job.entry is not None and (job.entry.rows or job.entry.add)
    nbytes = tensor.nbytes * (2 if turned else 1)
    if tensor.quantized and tensor.kind != job.kind:
        nbytes += 4 * count  # decoded
    if tensor.kind == job.kind:
        return nbytes
    if not isinstance(job.kind, Format):
        return nbytes + 4 * min(count, 2 * CHUNK) + 4 * count
    format, (n, k) = job.kind, (prod(tensor.shape[:-1]), tensor.shape[-1])
    inner = format.ordered or format
    if format.ordered:
        nbytes += tensor.nbytes + 2 * count  # columns in the order of groups, and their codes put back
    rows = min(n, max(1, CHUNK // k)) if inner.rows_alone else n
    return nbytes + 2 * format.nbytes(n, k) + ROWS_IN_F32 * 4 * rows * k


def _hidden_nbytes(checkpoint: Checkpoint, request: Request) -> int:
    """Hidden states of the text: of the quantized model, and of the float one beside it."""
    assert request.tokens is not None
    width = next((s.shape[1] for s in sites(checkpoint) if s.role == "embed"), 0)
    streams = 2 if request.method.gptaq else 1
    return request.tokens.count * width * request.streaming.dtype.itemsize * streams


def _walk_peak(checkpoint: Checkpoint, walked: Sequence[Task], hidden: int, request: Request) -> int:
    """Two blocks in f32, and as modules in the dtype of the computation; the pages of the file that they are
    read from; hidden states; Hessians, or what else is made of a block's inputs."""
    dtype = request.streaming.dtype
    copies = 4 + (0 if dtype.itemsize == 4 else dtype.itemsize)
    nbytes = 2 * copies * max(block_weights(checkpoint)) + _block_nbytes(checkpoint)
    widest = max((t.shape[1] for t in walked if NEEDS[t.algorithm] == "hessian"), default=0)
    states = max(hidden, waiting(walked, request)) if request.method.sequential else hidden
    states = min(states, request.streaming.activation_memory)
    squares = 4 if request.method.gptaq else 3  # the Hessian, what is made of it twice, the mismatch
    return nbytes + states + max(ALLOWANCE, squares * 4 * widest**2 + BESIDE)


def waiting(walked: Sequence[Task], request: Request) -> int:
    """Bytes of all batches waiting inside a block, where that is how it is walked."""
    assert request.tokens is not None
    width = max(task.shape[1] for task in walked)
    streams = 2 if request.method.gptaq else 1
    narrow = min(task.shape[1] for task in walked)
    return request.tokens.count * (6 * narrow + width) * request.streaming.dtype.itemsize * streams
