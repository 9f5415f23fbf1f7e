"""Requirements of quantizing: memory (workflow/memory.py), disk, time.

    time = codes (measured, by format) + passes x 2 x weights x tokens / rate + Hessians + digests
    passes: one to measure, one through the quantized block (one for both if all batches fit inside it), and
    the same again for the float model

Times are rough: they exclude attention, norms and the disk, and the machine is measured only briefly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch

from ..algorithms import NEEDS
from ..calibrate.capture import MANY
from ..calibrate.sampling import ROWS_AT_ONCE
from ..devices import has_amx
from ..files.checkpoint import Checkpoint
from ..files.output import Output
from ..plan.choices import Decision
from ..runtime.decode import faster_dtype
from ..train.rounding import EFFORTS
from ..train.settings import DistillSettings
from ..workflow.memory import Task, block_weights, memory_need, tasks_of, waiting
from ..workflow.request import Request
from .sizes import file_nbytes, job_nbytes
from .speed import Encoding, digesting, encodings, multiplying

BACKWARD = 3  # a forward and a backward pass cost three forward passes


@dataclass(frozen=True)
class Work:
    """way: "streaming", "block by block" or "whole model". seconds: by task. The rest in bytes. here: what
    this process already uses, part of peak_memory. scratch: on disk until the end."""

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


def work_of(
    checkpoint: Checkpoint,
    target: Output,
    decisions: Mapping[str, Decision],
    request: Request,
    writes_text: bool = False,
) -> Work:
    """writes_text: whether the model generates its calibration text. Measures for a second or two."""
    need = memory_need(checkpoint, target, decisions, request, writes_text)  # before any measurement
    tasks = tasks_of(checkpoint, target, decisions, request)
    walked = [task for task in tasks if task.walked]
    blocks = block_weights(checkpoint) if walked else [0]
    model = checkpoint.numel
    inside = {task.site.name for task in walked if task.site}
    sizes = job_nbytes(target)
    kept = sum(sizes[job.name] for job in target.jobs if inside & set(job.sources))
    output = file_nbytes(target)
    seconds = _seconds(tasks, walked, blocks, model, request, writes_text)
    seconds["digests and writing"] = 2 * output / digesting()
    return Work(need.way, need.peak, need.here, output, kept + need.scratch, seconds)


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
    """The passes over the text, and the Hessians."""
    assert request.tokens is not None
    method, streaming = request.method, request.streaming
    shape = max((task.shape for task in walked), key=prod)
    rate = multiplying(shape, 1024, streaming.dtype)
    dense = not any(task.site and task.site.expert is not None for task in walked)
    through = method.sequential and not method.learn and dense
    through = through and waiting(walked, request) <= streaming.activation_memory
    passes = (1 if through else 2) * (2 if method.gptaq else 1)
    groups = {t.site.group: t for t in walked if t.site and NEEDS[t.algorithm] == "hessian"}
    squares = sum(t.shape[1] ** 2 for t in groups.values())
    gather = request.tokens.count * squares * (3 if method.gptaq else 1)
    judge = sum(4 * t.shape[0] * t.shape[1] ** 2 for t in walked if t.site and t.site.group in groups)
    sums = torch.bfloat16 if has_amx() else torch.float32
    factors = sum(rates[t.format, t.algorithm].factoring(t.shape[1]) for t in groups.values())
    return {
        "passes over the text": passes * 2 * weights * request.tokens.count / rate,
        "Hessians": gather / multiplying(shape, MANY, sums) + judge / rate + factors,
    }


def _model_seconds(
    walked: Sequence[Task], weights: int, model: int, request: Request, writes_text: bool
) -> dict[str, float]:
    """The other tasks: generating text, learned rounding, distillation."""
    assert request.tokens is not None
    method, tokens = request.method, request.tokens
    shape, context = max((task.shape for task in walked), key=prod), tokens.windows.shape[1]
    rate, seconds = multiplying(shape, 1024), {}
    if writes_text:
        seconds["writing the text"] = (
            2 * model * tokens.count / multiplying(shape, ROWS_AT_ONCE, faster_dtype())
        )
    if method.learn:
        settings = EFFORTS[method.learn]
        each = request.streaming.batch * context
        steps = settings.steps_for(ceil(tokens.count / each))
        seen = steps * settings.batch * each * BACKWARD
        seconds["learned rounding"] = 2 * weights * seen / rate
    if method.trains:
        distill = DistillSettings(steps=method.trains, **method.training())
        judged = (1 + ceil(distill.steps / distill.every)) * distill.held_out * context
        seen = distill.steps * distill.batch * context * BACKWARD + judged + tokens.count
        seconds[method.training_name] = 2 * model * seen / rate
    return seconds
