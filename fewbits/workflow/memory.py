"""What quantizing takes of memory: from headers alone, before a weight is read.

streaming          this process + one tensor: mapped source, planes twice, a few rows in f32
block by block     two blocks in f32 and one in its file + hidden states + 1.5 GiB, or the Hessians of the
                   widest input and what is made of them
the whole model    what writes the calibration text; or the quantized model in f32, where its scales are
                   distilled
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from ..algorithms import NEEDS
from ..algorithms.gptq import GPU_PIECE, HESSIAN_COPIES, HESSIANS
from ..calibrate.sampling import writer_of
from ..devices import AUTO, Room, free_device_memory
from ..errors import ModelError
from ..files.checkpoint import Checkpoint
from ..files.output import Job, Output
from ..formats.base import CHUNK, Format
from ..formats.plain import as_format
from ..memory import Need, free_memory, left_of, resident_memory
from ..model.sites import Site, per_block, sites
from ..plan.choices import Decision
from ..train.settings import AT_ONCE, DistillSettings
from .blockwise.settings import Streaming
from .pruning import is_float, prunable
from .request import Request
from .task import Spec, spec_of

ALLOWANCE = 3 * 2**29  # 1.5 GiB: torch, transformers, Hessians and what is quantized of a block
BESIDE = 11 * 2**26  # what is not Hessians, where these take more: torch, transformers, results
ROWS_IN_F32 = 10  # copies of CHUNK weights in f32 that an encoder holds at most
LEARNING = 48  # bytes of a weight that is learned: in f32 twice, on its grid, its step, moments and gradients
MARGIN = 64 * 2**20  # allocators keep what was freed; digests read their input in pieces
DEVICE_SPARE = 2**29  # bytes: libraries of the GPU, and what its allocator cannot use
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
    pruned = prunable(checkpoint, request.method)
    tasks = []
    for job in target.jobs:
        for name in job.sources:
            tensor = checkpoint.tensors[name]
            kind = job.kind
            new = isinstance(kind, Format) and tensor.kind != kind and len(tensor.shape) >= 2
            if not new and not (name in pruned and is_float(kind)):
                continue
            site, rule = known.get(name), decisions[job.name].rule
            spec = spec_of(as_format(kind), rule, request.method, request.search)
            inside = site is not None and site.block is not None
            walked = inside and request.tokens is not None
            if NEEDS[spec.algorithm] != "nothing" and not (inside and request.calibrated):
                spec = Spec(as_format(kind), "rtn", {"search": request.search})
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
    if walked and request.method.trains:
        whole = 4 * request.method.copies * checkpoint.numel + ALLOWANCE
        whole += _passes_nbytes(checkpoint, request)
    if walked and writes_text:
        room = Room(request.streaming.device, left_of(request.memory))
        whole = max(whole, here + writer_of(checkpoint, room).nbytes)
    return Need("whole model" if whole else way, max(peak, whole), here, scratch)


def placed(request: Request, walked: Sequence[Task], checkpoint: Checkpoint) -> tuple[Request, int]:
    """The request with batches that fit its GPU, and the bytes that the walk takes there: 0 on the CPU.

    `auto` takes the CPU, with a note, where one sequence is too much. ModelError where a GPU was named.
    """
    device = request.streaming.place
    if device.type == "cpu" or not walked:
        return request, 0
    free, batch = free_device_memory(device), request.streaming.batch
    while True:
        request = replace(request, streaming=replace(request.streaming, batch=batch))
        nbytes = _device_peak(checkpoint, walked, request)
        if free is None or nbytes <= free:  # experts go one by one where there is no memory for more
            together = nbytes + _lockstep_nbytes(walked)
            return request, together if free is None else min(free, together)
        if batch == 1:
            break
        batch //= 2
    text = f"a block with one sequence takes {nbytes / 2**30:.2f} GiB on {device}, which has "
    text += f"{free / 2**30:.2f} GiB free"
    if request.streaming.device != AUTO:
        raise ModelError(
            f"{checkpoint.path}: {text}; free memory there, take a smaller context, or --device cpu"
        )
    streaming = replace(request.streaming, device="cpu", batch=Streaming.batch, dtype=torch.float32)
    return replace(request, streaming=streaming, notes=(*request.notes, f"run on the CPU: {text}")), 0


def _device_peak(checkpoint: Checkpoint, walked: Sequence[Task], request: Request) -> int:
    """A block as modules, and as they were where they are kept; Hessians; what choosing codes for the widest
    matrix takes; the activations of a batch."""
    assert request.tokens is not None
    method, dtype = request.method, request.streaming.dtype
    copies = (2 if method.gptaq or method.learn else 1) * dtype.itemsize
    copies += 8 if method.learn or method.transforms else 0  # their floats, and as they are rewritten
    copies += LEARNING if method.learn else 0
    modules = copies * max(block_weights(checkpoint))
    widest = max((t.shape[1] for t in walked if NEEDS[t.algorithm] == "hessian"), default=0)
    largest = max(prod(task.shape) for task in walked)
    choosing = 4 * (3 * largest + ROWS_IN_F32 * min(largest, GPU_PIECE))
    context, width = request.tokens.windows.shape[1], max(task.shape[1] for task in walked)
    narrow = min(task.shape[1] for task in walked)
    rows = request.streaming.rows(context, width)
    states = rows * context * (8 * narrow + 3 * width) * 4
    return modules + 4 * 4 * widest**2 + choosing + states + DEVICE_SPARE


def _lockstep_nbytes(walked: Sequence[Task]) -> int:
    """What choosing the codes of a layer's experts together takes: copies in f32, and Hessians."""
    count = Counter(
        (task.site.block, task.shape)
        for task in walked
        if task.site is not None and task.site.expert is not None and task.algorithm == "gptq"
    )
    nbytes = [
        4 * (3 + ROWS_IN_F32) * min(GPU_PIECE, e * n * k) + min(HESSIANS, 4 * HESSIAN_COPIES * e * k * k)
        for (_, (n, k)), e in count.items()
        if e > 1
    ]
    return max(nbytes, default=0)


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
    walked = [task for task in tasks_of(checkpoint, target, decisions, request) if task.walked]
    request, there = placed(request, walked, checkpoint)
    device = (str(request.streaming.place), there) if there else None

    def need_of(request: Request) -> Need:
        need = memory_need(checkpoint, target, decisions, request, writes_text)
        return replace(need, device=device)

    need = need_of(request)
    limit = _limit(request, need.here)
    if need.peak <= limit:
        return request, need

    def holding(nbytes: int) -> tuple[Request, Need]:
        less = replace(request, streaming=replace(request.streaming, activation_memory=nbytes))
        return less, need_of(less)

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


def _hidden_width(checkpoint: Checkpoint) -> int:
    return next((site.shape[1] for site in sites(checkpoint) if site.role == "embed"), 0)


def _hidden_nbytes(checkpoint: Checkpoint, request: Request) -> int:
    """Hidden states of the text: of the quantized model, and of the float one beside it."""
    assert request.tokens is not None
    width = _hidden_width(checkpoint)
    streams = 2 if request.method.gptaq else 1
    return request.tokens.count * width * request.streaming.dtype.itemsize * streams


def _passes_nbytes(checkpoint: Checkpoint, request: Request) -> int:
    """What training holds of its text: the parent's last hidden states in f32, if it is asked, and what the
    backward pass of the windows at once needs, three numbers for each output of a weight in f32 (2.4 were
    measured)."""
    assert request.tokens is not None
    settings = DistillSettings(steps=request.method.trains, **request.method.training())
    context = request.tokens.windows.shape[1]
    micro = min(settings.batch, settings.micro or max(1, AT_ONCE // context))
    found = [site for site in sites(checkpoint) if site.block is not None]
    outputs = sum(site.shape[0] for site in found)
    if settings.recompute:  # of one block at a time
        outputs //= max(1, len({site.block for site in found}))
    kept = 2 * 4 * settings.top_k if settings.top_k else 4 * _hidden_width(checkpoint)
    hidden = request.tokens.count * kept if settings.share else 0
    return 12 * micro * context * outputs + hidden


def _walk_peak(checkpoint: Checkpoint, walked: Sequence[Task], hidden: int, request: Request) -> int:
    """Two blocks in f32, and as modules in the dtype of the computation; the pages of the file that they are
    read from; hidden states; Hessians, or what else is made of a block's inputs, learning its rounding
    among it."""
    dtype = request.streaming.dtype
    copies = 4 + (0 if dtype.itemsize == 4 else dtype.itemsize)
    blocks = 2 if request.streaming.place.type == "cpu" else 3  # beside a GPU, one more is read ahead
    nbytes = blocks * copies * max(block_weights(checkpoint)) + _block_nbytes(checkpoint)
    widest = max((t.shape[1] for t in walked if NEEDS[t.algorithm] == "hessian"), default=0)
    states = max(hidden, waiting(walked, request)) if request.method.sequential else hidden
    states = min(states, request.streaming.activation_memory)
    squares = 4 if request.method.gptaq else 3  # the Hessian, what is made of it twice, the mismatch
    masked = 3 * 4 + 1  # bytes of a weight that is pruned: three in f32, a mask
    pruned = masked * max(prod(task.shape) for task in walked) if request.method.pruning else 0
    learned = LEARNING * max(block_weights(checkpoint)) if request.method.learn else 0
    return nbytes + states + pruned + max(ALLOWANCE + learned, squares * 4 * widest**2 + BESIDE)


def waiting(walked: Sequence[Task], request: Request) -> int:
    """Bytes of all batches waiting inside a block, where that is how it is walked."""
    assert request.tokens is not None
    width = max(task.shape[1] for task in walked)
    streams = 2 if request.method.gptaq else 1
    narrow = min(task.shape[1] for task in walked)
    return request.tokens.count * (6 * narrow + width) * request.streaming.dtype.itemsize * streams
