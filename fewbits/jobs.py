"""One job: load the sources of a tensor, encode and measure them, write its spans and its receipt row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .algorithms import ALGORITHMS
from .errors import FormatError
from .files.base import Checkpoint
from .files.stream import StreamFile
from .files.target import Job, is_plain
from .formats import FLOATS, FORMATS, Distortion
from .formats.base import CHUNK
from .plan.choices import Decision
from .qtensor import QTensor


def write_job(
    checkpoint: Checkpoint, job: Job, decision: Decision, defaults: Mapping[str, Any], file: StreamFile
) -> None:
    """Encode one tensor and write its spans; the receipt's row goes into the journal with the last.

    defaults: options of `rtn` where no rule sets them.
    """
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
    algorithm = rule.algorithm if rule else "rtn"
    options = dict(rule.options) if rule else {}
    if algorithm == "rtn":
        options = {**defaults, **options}
    pieces = _pieces(checkpoint, job, (algorithm, options), note)
    if len(job.spans) == 1:
        file.write(job.spans[0], (planes[0] for planes in pieces), note)
        return
    (planes,) = pieces
    for span, plane in zip(job.spans, planes, strict=True):
        if span not in file.done():
            file.write(span, plane, note)


def _pieces(
    checkpoint: Checkpoint, job: Job, method: tuple[str, dict[str, Any]], note: dict[str, Any]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The planes of each source in turn; when the last is out, `note` has the algorithm and the error."""
    if not job.sources:
        assert job.entry is not None
        yield (torch.tensor(job.entry.values, dtype=torch.float32),)
        return
    lost: Distortion | None = None
    for name in job.sources:
        value = job.shaped(checkpoint.tensors[name].load())
        if isinstance(value, QTensor) and value.format.name == job.format:
            yield tuple(value.planes[plane.name] for plane in value.format.planes)
            continue
        w = value.decode() if isinstance(value, QTensor) else value
        planes, cost = _encode(name, w, job.format, method)
        if cost is not None:
            lost = cost if lost is None else lost + cost
        yield planes
    if lost is not None:
        algorithm, options = method
        note.update(
            algorithm=algorithm if job.format not in FLOATS else "cast",
            options=options if job.format not in FLOATS else {},
            relative_error=lost.relative_error,
            sqnr_db=lost.sqnr_db,
            max_abs_error=lost.largest,
        )


def _encode(
    name: str, w: torch.Tensor, kind: str, method: tuple[str, dict[str, Any]]
) -> tuple[tuple[torch.Tensor, ...], Distortion | None]:
    """One float weight -> its planes and what that cost; None where not a bit changed."""
    if is_plain(kind):
        _check_finite(name, w)
        cast = w.to(FLOATS.get(kind, w.dtype))  # integers and the like only pass through
        if cast is w:
            return (w,), None
        _check_finite(f"{name} as {kind}", cast)
        return (cast,), _cast_distortion(w, cast)
    fmt = FORMATS.get(kind)
    algorithm, options = method
    try:
        q = ALGORITHMS.get(algorithm)(w, fmt, None, **options)
    except FormatError as error:
        raise FormatError(f"{name}: {str(error).removeprefix('tensor: ')}") from error
    return tuple(q.planes[plane.name] for plane in fmt.planes), fmt.distortion(w, q)


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
