"""One job: load the sources of a tensor, encode and measure them, write its spans and its receipt row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..algorithms import ALGORITHMS, NEEDS
from ..calibrate.stats import Stats
from ..errors import CalibrationError, FormatError
from ..files.checkpoint import Checkpoint
from ..files.layout import is_plain
from ..files.target import Job
from ..formats import FLOATS, FORMATS, Distortion
from ..formats.base import CHUNK, Format
from ..formats.lossless import convert_lossless
from ..plan.choices import Decision
from ..plan.method import Method
from ..plan.rules import Rule
from ..qtensor import QTensor
from ..storage.stream import StreamFile


@dataclass(frozen=True)
class Work:
    """What the jobs of a run share.

    method: for the tensors that no rule gives an algorithm. defaults: options of `rtn` where nothing sets
    them. stats: of a tensor's input, by the tensor's name, where they are known. done: what is known of
    tensors that come quantized already, by name (what `told_of` gives).
    """

    method: Method
    defaults: Mapping[str, Any]
    stats: Callable[[str], Stats | None]
    done: Mapping[str, Mapping[str, Any]]


def write_job(checkpoint: Checkpoint, job: Job, decision: Decision, work: Work, file: StreamFile) -> None:
    """Encode one tensor and write its spans; the receipt's row goes into the journal with the last."""
    rule = decision.rule
    note: dict[str, Any] = {
        "name": job.sources[0] if len(job.sources) == 1 else job.name,
        "gguf_name": job.name if job.entry else None,
        "shape": list(job.shape),
        "source_dtype": checkpoint.tensors[job.sources[0]].dtype if job.sources else "f32",
        "asked": decision.asked,
        "format": decision.format,
        "reason": decision.reason,
        "rule": rule.match if rule else None,
        "nbytes": sum(span.nbytes for span in file.spans_of(job.spans)),
    }
    pieces = _pieces(checkpoint, job, rule, work, note)
    if len(job.spans) == 1:
        file.write(job.spans[0], (planes[0] for planes in pieces), note)
        return
    (planes,) = pieces
    for span, plane in zip(job.spans, planes, strict=True):
        if span not in file.done():
            file.write(span, plane, note)


def chosen(
    rule: Rule | None, method: Method, defaults: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """The algorithm of a weight and its options: the rule's where it names one, else the method's."""
    if rule is not None and rule.algorithm is not None:
        algorithm, options = rule.algorithm, dict(rule.options)
    else:
        algorithm, options = method.algorithm, {**method.options, **(rule.options if rule else {})}
    return algorithm, {**(defaults or {}), **options} if algorithm == "rtn" else options


def _pieces(
    checkpoint: Checkpoint, job: Job, rule: Rule | None, work: Work, note: dict[str, Any]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The planes of each source in turn; when the last is out, `note` has the algorithm and the error."""
    if not job.sources:
        assert job.entry is not None
        yield (torch.tensor(job.entry.values, dtype=torch.float32),)
        return
    told: list[Mapping[str, Any]] = []
    for name in job.sources:
        value = job.shaped(checkpoint.tensors[name].load())
        if isinstance(value, QTensor) and value.format.name == job.format:
            told += [work.done[name]] if name in work.done else []
            yield job.pack(value)
            continue
        if isinstance(value, QTensor) and not is_plain(job.format):
            same = convert_lossless(value, FORMATS.get(job.format))
            if same is not None:
                w = same.decode()
                told += [work.done.get(name) or told_of("recoded", {}, Distortion.between(w, w))]
                yield job.pack(same)
                continue
        w = value.decode() if isinstance(value, QTensor) else value
        stats = work.stats(name)
        value, lost = _encode(name, w, job.format, _method(rule, work, stats), stats)
        told += [lost] if lost else []
        yield job.pack(value) if isinstance(value, QTensor) else (value,)
    note.update(summed(told))


def _method(rule: Rule | None, work: Work, stats: Stats | None) -> tuple[str, dict[str, Any]]:
    """What a weight outside the walk gets: the run's method, or rounding to nearest where that
    needs statistics and there are none (embeddings). A rule's own algorithm is never exchanged."""
    algorithm, options = chosen(rule, work.method, work.defaults)
    by_rule = rule is not None and rule.algorithm is not None
    needs = NEEDS[algorithm]
    known = stats is not None and (needs != "hessian" or stats.hessian is not None)
    if not known and not by_rule and needs != "nothing":
        return "rtn", dict(work.defaults)
    return algorithm, options


def _encode(
    name: str, w: torch.Tensor, kind: str, method: tuple[str, dict[str, Any]], stats: Stats | None
) -> tuple[torch.Tensor | QTensor, dict[str, Any] | None]:
    """One float weight -> what becomes of it and what that cost; None where not a bit changed."""
    if is_plain(kind):
        _check_finite(name, w)
        cast = w.to(FLOATS.get(kind, w.dtype))  # integers and the like only pass through
        if cast is w:
            return w, None
        _check_finite(f"{name} as {kind}", cast)
        lost = _cast_distortion(w, cast)
        return cast, None if lost is None else told_of("cast", {}, lost)
    fmt = FORMATS.get(kind)
    algorithm, options = method
    q = quantized(name, w, fmt, method, stats)
    return q, told_of(algorithm, options, fmt.distortion(w, q), stats)


def quantized(
    name: str, w: torch.Tensor, fmt: Format, method: tuple[str, dict[str, Any]], stats: Stats | None
) -> QTensor:
    """One weight through an algorithm; its errors name the weight."""
    algorithm, options = method
    try:
        return ALGORITHMS.get(algorithm)(w, fmt, stats, **options)
    except (FormatError, CalibrationError) as error:
        raise type(error)(f"{name}: {str(error).removeprefix('tensor: ')}") from error


def told_of(
    algorithm: str,
    options: Mapping[str, Any],
    lost: Distortion,
    stats: Stats | None = None,
    output: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """What a receipt will say of one weight. output: squared error and energy of its output."""
    return {
        "algorithm": algorithm,
        "options": dict(options),
        "lost": [lost.squared, lost.energy, lost.largest],
        "tokens": None if stats is None else stats.count,
        "output": output,
    }


def summed(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of a receipt's row for a tensor made of these weights (the experts of a block)."""
    if not told:
        return {}
    lost = Distortion(*told[0]["lost"])
    for other in told[1:]:
        lost = lost + Distortion(*other["lost"])
    row = {
        "algorithm": told[0]["algorithm"],
        "options": told[0]["options"],
        "relative_error": lost.relative_error,
        "sqnr_db": lost.sqnr_db,
        "max_abs_error": lost.largest,
    }
    tokens = [one["tokens"] for one in told if one["tokens"] is not None]
    outputs = [one["output"] for one in told if one["output"] is not None]
    error, energy = (sum(part) for part in zip(*outputs, strict=True)) if outputs else (0.0, 0.0)
    return row | {
        "tokens": min(tokens) if tokens else None,
        "output_error": math.sqrt(error / energy) if energy > 0 else None,
    }


def _cast_distortion(w: torch.Tensor, cast: torch.Tensor) -> Distortion | None:
    """What a change of dtype cost; None where not a bit changed."""
    lost = Distortion(0.0, 0.0, 0.0)
    for x, y in zip(w.flatten().split(CHUNK), cast.flatten().split(CHUNK), strict=True):
        lost = lost + Distortion.between(x.float(), y.float())
    return lost if lost.squared > 0 else None


def _check_finite(name: str, w: torch.Tensor) -> None:
    if not w.is_floating_point() or w.numel() == 0:
        return
    bad = sum(int((~torch.isfinite(part.float())).sum()) for part in w.flatten().split(CHUNK))
    if bad:
        raise FormatError(f"{name}: {bad} of {w.numel()} weights are NaN or infinite; repair the checkpoint")
