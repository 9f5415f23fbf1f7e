"""One weight: `task` chooses its codes and measures the error; `write_job` does so for a tensor of the
output.

    task(name, weight, spec, statistics) -> (QTensor, WeightRecord)    a pure function
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from inspect import signature
from typing import Any, NamedTuple

import torch

from ..algorithms import ALGORITHMS, NEEDS
from ..algorithms.hessian import DAMP, GPTAQ
from ..algorithms.prune import Pruning, kept, quantize_pruned
from ..calibrate.stats import Stats
from ..dtypes import DType
from ..errors import CalibrationError, FormatError
from ..files.checkpoint import Checkpoint
from ..files.output import Job
from ..formats import Distortion
from ..formats.base import CHUNK, Format
from ..formats.lossless import convert_lossless
from ..formats.plain import as_format, stored
from ..formats.trained import kept_codes
from ..packing.spread import coded_bits
from ..plan.choices import Decision
from ..plan.method import Method
from ..plan.rules import Rule
from ..qtensor import QTensor
from ..storage.stream import StreamFile

KEPT = "kept"  # the algorithm of codes for which a weight was trained
PIECE = 2**22  # weights whose output error is computed at once


@dataclass(frozen=True)
class Spec:
    """The format and algorithm of one weight, and how it is pruned."""

    format: Format
    algorithm: str
    options: Mapping[str, Any]
    pruning: Pruning | None = None

    @property
    def needs_hessian(self) -> bool:
        return "hessian" in (NEEDS[self.algorithm], self.pruning and self.pruning.needs)

    def with_what_is_known(self, stats: Stats | None) -> Spec:
        """Rounding to nearest, and pruning by magnitude, where they need more than `stats`."""
        known = {"nothing", *(() if stats is None else ("mean_square",))}
        known |= {"hessian"} if stats is not None and stats.hessian is not None else set()
        spec = self if NEEDS[self.algorithm] in known else replace(self, algorithm="rtn", options={})
        if spec.pruning is None or spec.pruning.needs in known:
            return spec
        return replace(spec, pruning=replace(spec.pruning, prune="magnitude"))


class Zeros(NamedTuple):
    """Of a pruned weight: how many numbers it has, how many were dropped, how many of these are not 0 as they
    are stored, and how many are 0 in all."""

    weights: int
    dropped: int
    not_zero: int
    zeros: int

    @staticmethod
    def of(q: QTensor, keep: torch.Tensor) -> Zeros:
        """Of the stored weight, and of what was kept of it, `(n, k)` bool."""
        not_zero = zeros = 0
        for rows, value in q.format.decoded_rows(q, PIECE):
            zero = value == 0
            zeros += int(zero.sum())
            not_zero += int((~zero & ~keep[rows]).sum())
        return Zeros(keep.numel(), int((~keep).sum()), not_zero, zeros)

    def trained(self, before: QTensor, after: QTensor) -> Zeros:
        """The same of a weight that was trained since."""
        was, now = before.decode() == 0, after.decode() == 0
        return self._replace(not_zero=self.not_zero + int((was & ~now).sum()), zeros=int(now.sum()))


@dataclass(frozen=True)
class WeightRecord:
    """The error of one weight. squared, energy, largest: of the error, of the values, of the largest change.
    tokens: how many reached it in calibration. output: mean square of its output's error, and of its
    output. zeros: if it was pruned. coded: bits of its codes when they are entropy-coded, and their number,
    if they were chosen for that."""

    algorithm: str
    options: Mapping[str, Any]
    squared: float
    energy: float
    largest: float
    tokens: int | None = None
    output: tuple[float, float] | None = None
    zeros: Zeros | None = None
    coded: tuple[float, int] | None = None

    @property
    def distortion(self) -> Distortion:
        return Distortion(self.squared, self.energy, self.largest)

    @property
    def output_error(self) -> float | None:
        """|(w' - w) x| / |w x|."""
        return (
            None if self.output is None or self.output[1] <= 0 else math.sqrt(self.output[0] / self.output[1])
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(row: Mapping[str, Any]) -> WeightRecord:
        pairs = {key: row[key] and tuple(row[key]) for key in ("output", "coded")}
        zeros = None if row["zeros"] is None else Zeros(*row["zeros"])
        return WeightRecord(**{**row, **pairs, "zeros": zeros})


def record_of(
    spec: Spec | None, lost: Distortion, stats: Stats | None = None, output: tuple[float, float] | None = None
) -> WeightRecord:
    """The record of one weight. spec: None if floats were cast to floats."""
    algorithm, options = ("cast", {}) if spec is None else (spec.algorithm, dict(spec.options))
    tokens = None if stats is None else stats.count
    return WeightRecord(algorithm, options, lost.squared, lost.energy, lost.largest, tokens, output)


def spec_of(format: Format, rule: Rule | None, method: Method, search: bool = True) -> Spec:
    """The algorithm and options of a weight: those of its rule, else those of the method."""
    if rule is not None and rule.algorithm is not None:
        algorithm, options = rule.algorithm, dict(rule.options)
    else:
        algorithm, options = method.algorithm, {**method.options, **(rule.options if rule else {})}
    return Spec(format, algorithm, {"search": search, **options} if "search" in takes(algorithm) else options)


def takes(algorithm: str) -> list[str]:
    """The options of an algorithm; PlanError for an unknown one."""
    return [*signature(ALGORITHMS.get(algorithm)).parameters][3:]


def task(
    name: str, w: torch.Tensor, spec: Spec, stats: Stats | None = None, keep: torch.Tensor | None = None
) -> QTensor:
    """`(n, k)` floats -> the weight in spec.format; errors name the weight. keep: what pruning keeps."""
    algorithm = ALGORITHMS.get(spec.algorithm)
    with _naming(name):
        if keep is not None:
            return quantize_pruned(algorithm, w, spec.format, stats, keep, spec.options)
        return algorithm(w, spec.format, stats, **spec.options)


def kept_of(name: str, w: torch.Tensor, spec: Spec, stats: Stats | None) -> torch.Tensor | None:
    """`(n, k)` -> bool: what pruning keeps of a weight; None if it is not pruned."""
    if spec.pruning is None:
        return None
    options: dict[str, Any] = {}
    if NEEDS[spec.algorithm] == "hessian":
        options = {"damp": spec.options.get("damp", DAMP), "gptaq": spec.options.get("gptaq", GPTAQ)}
    with _naming(name):
        return kept(w, spec.pruning, stats, **options)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors name the weight."""
    try:
        yield
    except (FormatError, CalibrationError) as error:
        raise type(error)(f"{name}: {str(error).removeprefix('tensor: ')}") from error


def chosen(
    name: str,
    w: torch.Tensor,
    spec: Spec,
    stats: Stats | None = None,
    again: bool = False,
    keep: torch.Tensor | None = None,
) -> tuple[QTensor, Spec]:
    """The codes that a weight was trained for, where the format of the spec holds them, else those of its
    algorithm; and the spec of what was done, whose option `grid` is the format that it was trained for.

    again: it was quantized before, so that its grid is known and was asked to change. keep: what pruning
    keeps of it; then no code is kept."""
    if keep is not None:
        return task(name, w, spec, stats, keep), spec
    codes, grid = (None, None) if again else kept_codes(w, spec.format)
    if codes is not None:
        return codes, Spec(spec.format, KEPT, {"grid": grid})
    options = spec.options if grid is None else {**spec.options, "grid": grid}
    return task(name, w, spec, stats), Spec(spec.format, spec.algorithm, options)


def measured(
    w: torch.Tensor, q: QTensor, spec: Spec, stats: Stats | None, keep: torch.Tensor | None = None
) -> WeightRecord:
    """The record of codes that are already chosen. keep: what was kept by pruning."""
    output = None if stats is None else output_error(w, q, stats)
    if spec.pruning is not None:
        spec = replace(spec, options={**spec.options, "prune": spec.pruning.prune})
    record = record_of(spec, q.format.distortion(w, q), stats, output)
    if spec.algorithm == "ecsq":
        codes = q.planes["codes"]
        record = replace(record, coded=(coded_bits(codes.cpu()), codes.numel()))
    return record if keep is None else replace(record, zeros=Zeros.of(q, keep))


def output_error(w: torch.Tensor, q: QTensor, stats: Stats) -> tuple[float, float]:
    """-> mean square of the output's error (q - w) x, and of the output itself."""
    error = energy = 0.0
    for rows, value in q.format.decoded_rows(q, PIECE):
        x = w[rows].float()
        error += _mean_square(value - x, stats)
        energy += _mean_square(x, stats)
    return max(error, 0.0), energy


def _mean_square(part: torch.Tensor, stats: Stats) -> float:
    if stats.hessian is None:
        return float((part.square() @ stats.mean_square).sum())
    return float(((part @ stats.hessian) * part).sum())


# ---- a tensor of the output --------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What the jobs of a run share.

    method, search: for tensors whose rule names no algorithm. stats: of a tensor's input by the tensor's
    name, if known. done: the records of tensors that are already quantized, by name. pruned: the names of
    weights that are pruned."""

    method: Method
    search: bool
    stats: Callable[[str], Stats | None]
    done: Mapping[str, WeightRecord]
    pruned: frozenset[str] = frozenset()


def write_job(checkpoint: Checkpoint, job: Job, decision: Decision, work: Work, file: StreamFile) -> None:
    """Encode one tensor and write its spans; the receipt's row goes into the journal with the last."""
    rule = decision.rule
    note: dict[str, Any] = {
        "name": job.sources[0] if len(job.sources) == 1 else job.name,
        "gguf_name": job.name if job.entry else None,
        "shape": list(job.shape),
        "source_dtype": checkpoint.tensors[job.sources[0]].kind.name if job.sources else "f32",
        "asked": decision.requested.name,
        "format": decision.kind.name,
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


def _pieces(
    checkpoint: Checkpoint, job: Job, rule: Rule | None, work: Work, note: dict[str, Any]
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The planes of each source in turn; after the last, `note` has the algorithm and the error."""
    if not job.sources:
        assert job.entry is not None
        yield (torch.tensor(job.entry.values, dtype=torch.float32),)
        return
    records: list[WeightRecord] = []
    for name in job.sources:
        value, record = _piece(name, job.shaped(checkpoint.tensors[name].load()), job, rule, work)
        records += [] if record is None else [record]
        yield job.pack(value) if isinstance(value, QTensor) else (value,)
    note.update(row_of(records))


def _piece(
    name: str, value: torch.Tensor | QTensor, job: Job, rule: Rule | None, work: Work
) -> tuple[torch.Tensor | QTensor, WeightRecord | None]:
    """The planes of one source and its record; None if it is copied."""
    again = isinstance(value, QTensor)
    if isinstance(value, QTensor):
        if value.format == job.kind:
            return value, work.done.get(name)
        same = convert_lossless(value, job.kind) if isinstance(job.kind, Format) else None
        if same is not None:
            w = same.decode()
            spec = Spec(same.format, "lossless", {})
            return same, work.done.get(name) or record_of(spec, Distortion.between(w, w))
        value = value.decode()
    pruned = name in work.pruned and name not in work.done
    if isinstance(job.kind, DType) and not pruned:
        value, record = _cast(name, value, job.kind)
        return value, work.done.get(name, record)
    stats = work.stats(name)
    spec = _outside(spec_of(as_format(job.kind), rule, work.method, work.search), rule, stats)
    spec = spec if not pruned else replace(spec, pruning=work.method.pruning).with_what_is_known(stats)
    keep = kept_of(name, value, spec, stats)
    q, done = chosen(name, value, spec, stats, again, keep)
    return stored(q), measured(value, q, done, stats, keep)


def _outside(spec: Spec, rule: Rule | None, stats: Stats | None) -> Spec:
    """The spec of a weight outside the blocks (embeddings): rounding to nearest if the method's algorithm
    needs statistics that are missing. A rule's own algorithm is never replaced."""
    needs = NEEDS[spec.algorithm]
    known = stats is not None and (needs != "hessian" or stats.hessian is not None)
    by_rule = rule is not None and rule.algorithm is not None
    return spec if known or by_rule or needs == "nothing" else Spec(spec.format, "rtn", {})


def _cast(name: str, w: torch.Tensor, dtype: DType) -> tuple[torch.Tensor, WeightRecord | None]:
    """Floats in another float type; other types are unchanged."""
    _check_finite(name, w)
    cast = w.to(dtype.torch) if dtype.weight else w
    if cast is w:
        return w, None
    _check_finite(f"{name} as {dtype.name}", cast)
    lost = Distortion(0.0, 0.0, 0.0)
    for x, y in zip(w.flatten().split(CHUNK), cast.flatten().split(CHUNK), strict=True):
        lost = lost + Distortion.between(x.float(), y.float())
    return cast, record_of(None, lost) if lost.squared > 0 else None


def row_of(records: Sequence[WeightRecord]) -> dict[str, Any]:
    """The fields of a receipt's row for a tensor made of these weights (the experts of a block)."""
    if not records:
        return {}
    lost = records[0].distortion
    for other in records[1:]:
        lost = lost + other.distortion
    tokens = [record.tokens for record in records if record.tokens is not None]
    outputs = [record.output for record in records if record.output is not None]
    coded = [record.coded for record in records if record.coded is not None]
    error, energy = (sum(part) for part in zip(*outputs, strict=True)) if outputs else (0.0, 0.0)
    return {
        "algorithm": records[0].algorithm,
        "options": dict(records[0].options),
        "relative_error": lost.relative_error,
        "sqnr_db": lost.sqnr_db,
        "max_abs_error": lost.largest,
        "tokens": min(tokens) if tokens else None,
        "output_error": math.sqrt(error / energy) if energy > 0 else None,
        "sparsity": _sparsity([record.zeros for record in records if record.zeros is not None]),
        "coded_bits": sum(bits for bits, _ in coded) / sum(n for _, n in coded) if coded else None,
    }


def _sparsity(zeros: Sequence[Zeros]) -> dict[str, float] | None:
    """Of a tensor made of pruned weights: the shares of dropped weights, of these that are not 0 in the file,
    and of all zeros."""
    if not zeros:
        return None
    weights, dropped, not_zero, zero = (sum(part) for part in zip(*zeros, strict=True))
    return {"dropped": dropped / weights, "not_zero": not_zero / max(1, dropped), "zeros": zero / weights}


def _check_finite(name: str, w: torch.Tensor) -> None:
    if not w.is_floating_point() or w.numel() == 0:
        return
    bad = sum(int((~torch.isfinite(part.float())).sum()) for part in w.flatten().split(CHUNK))
    if bad:
        raise FormatError(f"{name}: {bad} of {w.numel()} weights are NaN or infinite; repair the checkpoint")
