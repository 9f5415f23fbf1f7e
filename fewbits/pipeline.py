"""quantize() and convert(): the loop that holds one tensor at a time, resumes, and writes the receipt.

    open -> decide what each tensor gets -> lay the output out -> for each tensor:
        load (mapped) -> encode -> measure -> write (journal)      -> rename -> receipt -> side files

Everything that can be refused is refused before the first byte is written. A run killed at any point
is continued by the same command; finished tensors are recognized by digest, so the result is
byte-identical to that of a run that was never killed.
"""

from __future__ import annotations

import hashlib
import json
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from . import core
from .algorithms import ALGORITHMS
from .errors import FileError, FormatError, PlanError, raise_all
from .files.base import Checkpoint
from .files.gguf_metadata import model_name
from .files.native import INDEX, WEIGHTS
from .files.open import open_checkpoint
from .files.stream import StreamFile, make_directory, write_atomic
from .files.target import Job, Target, gguf_target, native_target
from .formats import FLOATS, FORMATS, Distortion
from .memory import peak_memory, reset_peak_memory
from .model.archs import architecture, check_complete, require_architecture
from .plan import Plan
from .plan.choices import Decision, check_feasible, decide, entries_of
from .plan.mixtures import RECIPES
from .qtensor import QTensor
from .report.receipt import FileDigest, Receipt, TensorRow
from .version import VERSION

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """What to do with a checkpoint.

    to: a llama.cpp file type (`q4_k_m`) or a format (`int4_g128`); None: only what `plan` says.
    file: "gguf" or "native"; None: gguf for a path that ends in .gguf, native otherwise.
    search: search block parameters rather than take the min-max ones. requantize: allow quantized
    input. overwrite: replace an output that exists.
    """

    to: str | None = None
    plan: Plan = field(default_factory=Plan)
    file: str | None = None
    search: bool = True
    requantize: bool = False
    overwrite: bool = False


def quantize(
    source: Checkpoint | str | Path, out: str | Path, request: Request, progress: Progress | None = None
) -> Receipt:
    """Quantize `source` into `out` as `request` says -> the receipt, which is also written beside it.

    progress: called with (tensor name, bytes read, bytes in all). Raises PlanError, ModelError,
    FormatError or FileError before or during the work; a started output stays resumable.
    """
    start = time.monotonic()
    reset_peak_memory()
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(Path(source))
    out = Path(out)
    target, decisions = prepare(checkpoint, out, request)
    identity = _fingerprint(checkpoint, request)
    hashing = _InputDigests(checkpoint)
    make_directory(target.path.parent)
    with StreamFile.open(
        target.path, target.header, target.spans, identity, request.overwrite, target.align
    ) as file:
        rows = _write_all(checkpoint, target, decisions, request, file, progress)
        for path in target.stale:
            path.unlink(missing_ok=True)
        file.finish(keep_journal=True)
        target.finish()
        receipt = Receipt(
            source=str(checkpoint.path),
            target=str(out),
            tensors=rows,
            plan=request.plan.to_toml(),
            plan_digest=request.plan.digest(),
            recipe=request.to,
            inputs=hashing.result(),
            outputs=(_digest_file(target.path),),
            seconds=time.monotonic() - start,
            peak_memory_bytes=peak_memory(),
            versions=_versions(),
        )
        write_atomic(target.receipt, receipt.to_json().encode())
        file.close_journal()
    return receipt


def convert(
    source: Checkpoint | str | Path,
    out: str | Path,
    file: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Receipt:
    """Write a checkpoint to another file type without quantizing: every tensor keeps its format.

    Raises FormatError, naming the nearest, where the file type cannot carry a format.
    """
    return quantize(source, out, Request(file=file, overwrite=overwrite), progress)


def prepare(checkpoint: Checkpoint, out: Path, request: Request) -> tuple[Target, dict[str, Decision]]:
    """Decide, check and lay out, all from headers: the target, and by job name what each gets."""
    gguf = request.file == "gguf" or (request.file is None and out.suffix == ".gguf")
    if gguf and checkpoint.kind != "gguf":
        require_architecture(checkpoint.config)
    _check_place(checkpoint, out, gguf, request.overwrite)
    arch = architecture(checkpoint.config)
    if arch is not None:
        check_complete(arch, checkpoint.config, checkpoint.tensors.keys())
    entries = entries_of(checkpoint, arch)
    recipe = RECIPES.get((request.to or "").lower())
    to = (recipe.name if recipe else None, None if request.to is None or recipe else _format(request.to))
    decisions = decide(checkpoint, entries, arch, to, request.plan, gguf)
    check_feasible(checkpoint, entries, decisions, request.requantize)
    _check_algorithms(request.plan)
    carried = None if request.to or request.plan.rules else _carried_file_type(checkpoint)
    file_type = recipe.file_type if recipe else carried
    if gguf:
        formats = {name: decision.format for name, decision in decisions.items()}
        return gguf_target(checkpoint, out, entries, formats, arch, file_type), decisions
    by_source = {source: decisions[e.name] for e in entries for source in e.sources}
    for name, tensor in checkpoint.tensors.items():
        by_source.setdefault(name, Decision(tensor.dtype, tensor.dtype, "kept: not part of the model"))
    about = {
        "name": model_name(checkpoint),
        "recipe": recipe.name if recipe else None,
        "file_type": file_type,
    }
    formats = {name: decision.format for name, decision in by_source.items()}
    return native_target(checkpoint, out, formats, about), by_source


def _check_algorithms(plan: Plan) -> None:
    """PlanError listing each rule whose algorithm is unknown, or takes no such option."""
    faults = []
    for rule in plan.rules:
        try:
            takes = [*signature(ALGORITHMS.get(rule.algorithm)).parameters][3:]
        except PlanError as error:
            faults.append(f"rule {rule.match!r}: {error}")
            continue
        faults += [
            f"rule {rule.match!r}: {rule.algorithm} has no option {name!r}; it takes {', '.join(takes)}"
            for name in rule.options
            if name not in takes
        ]
    raise_all(PlanError, "plan", faults)


def _format(name: str) -> str:
    try:
        return FORMATS.get(name).name
    except FormatError as error:
        near = get_close_matches(name.lower(), [*RECIPES, *FORMATS], n=4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise PlanError(
            f"{name!r} is neither a file type nor a format; {hint}`fewbits formats` lists both"
        ) from error


def _check_place(checkpoint: Checkpoint, out: Path, gguf: bool, overwrite: bool) -> None:
    """FileError where the output would stand on its own input, or on a model of another kind."""
    if not out.exists():
        return
    if out.is_dir() == gguf:
        raise FileError(f"{out}: exists and is {'a' if gguf else 'not a'} directory; choose another output")
    if any(out.samefile(path) for path in [checkpoint.path, *_input_files(checkpoint)]):
        raise FileError(f"{out}: is the input itself; choose another output")
    ours = [out / INDEX, out / f"{WEIGHTS}.journal"]
    if not gguf and not overwrite and (out / "config.json").exists() and not any(p.exists() for p in ours):
        raise FileError(
            f"{out}: holds a model that fewbits did not write; choose another output, or pass overwrite"
        )


def _input_files(checkpoint: Checkpoint) -> list[Path]:
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return sorted({root / tensor.file for tensor in checkpoint.tensors.values()})


def _carried_file_type(checkpoint: Checkpoint) -> int | None:
    """The mixture's number that a native directory remembers, or a GGUF file has."""
    if checkpoint.kind == "native":
        found = checkpoint.metadata.get("file_type")
        return found if isinstance(found, int) else None
    value = checkpoint.metadata.get("general.file_type")
    return None if value is None else int(value.value)


def _write_all(
    checkpoint: Checkpoint,
    target: Target,
    decisions: Mapping[str, Decision],
    request: Request,
    file: StreamFile,
    progress: Progress | None,
) -> tuple[TensorRow, ...]:
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    read, rows = 0, []
    done = file.done()
    for job in target.jobs:
        if progress:
            progress(job.name, read, total)
        if not all(span in done for span in job.spans):
            _write_job(checkpoint, job, decisions[job.name], request, file)
        digest = _digest_of([file.digests[span] for span in job.spans])
        note = file.done()[job.spans[-1]]
        rows.append(TensorRow(**(note | {"shape": tuple(note["shape"]), "digest": digest})))
        read += sum(checkpoint.tensors[name].nbytes for name in job.sources)
    if progress:
        progress("", total, total)
    return tuple(rows)


def _digest_of(digests: list[str]) -> str:
    """One digest for a tensor: its span's own, or that of its planes' digests in order."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _write_job(
    checkpoint: Checkpoint, job: Job, decision: Decision, request: Request, file: StreamFile
) -> None:
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
    algorithm = rule.algorithm if rule else "rtn"
    options = dict(rule.options) if rule else {}
    if algorithm == "rtn":
        options.setdefault("search", request.search)
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
    dtype = FLOATS.get(kind)
    if dtype is None and kind not in FORMATS and not _is_format(kind):
        dtype = w.dtype  # integers and other dtypes that only pass through
    if dtype is not None:
        _check_finite(name, w)
        cast = w.to(dtype)
        if not torch.equal(cast.to(w.dtype), w):
            _check_finite(f"{name} as {kind}", cast)
            error = cast.float() - w.float()
            energy = float(w.float().square().sum(dtype=torch.float64))
            squared = float(error.square().sum(dtype=torch.float64))
            return (cast,), Distortion(squared, energy, float(error.abs().max()))
        return (cast,), None
    fmt = FORMATS.get(kind)
    algorithm, options = method
    try:
        q = ALGORITHMS.get(algorithm)(w, fmt, None, **options)
    except FormatError as error:
        raise FormatError(f"{name}: {str(error).removeprefix('tensor: ')}") from error
    return tuple(q.planes[plane.name] for plane in fmt.planes), fmt.distortion(w, q)


def _is_format(kind: str) -> bool:
    try:
        FORMATS.get(kind)
    except FormatError:
        return False
    return True


def _check_finite(name: str, w: torch.Tensor) -> None:
    if w.is_floating_point() and not bool(torch.isfinite(w.float()).all()):
        bad = int((~torch.isfinite(w.float())).sum())
        raise FormatError(f"{name}: {bad} of {w.numel()} weights are NaN or infinite; repair the checkpoint")


def _fingerprint(checkpoint: Checkpoint, request: Request) -> str:
    """All that decides the output's bytes besides its layout."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in _input_files(checkpoint)]
    said = [stats, request.plan.digest(), request.to, request.search, request.requantize, VERSION]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _digest_file(path: Path) -> FileDigest:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(4 * 2**20):
            digest.update(piece)
    return FileDigest(path.name, path.stat().st_size, digest.hexdigest())


class _InputDigests:
    """SHA-256 of every input file, taken beside the work: the bytes are in the page cache anyway."""

    def __init__(self, checkpoint: Checkpoint):
        files = _input_files(checkpoint)
        self._found: list[FileDigest] = []
        self._failed: OSError | None = None
        self._thread = threading.Thread(target=self._run, args=(files,), daemon=True)
        self._thread.start()

    def _run(self, files: list[Path]) -> None:
        try:
            for path in files:
                self._found.append(_digest_file(path))
        except OSError as error:
            self._failed = error

    def result(self) -> tuple[FileDigest, ...]:
        self._thread.join()
        if self._failed is not None:
            raise FileError(f"input cannot be read again for its digest: {self._failed}") from self._failed
        return tuple(self._found)


def _versions() -> dict[str, str]:
    return {
        "fewbits": VERSION,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "isa": core.isa(),
    }


__all__ = ["Request", "convert", "prepare", "quantize"]
