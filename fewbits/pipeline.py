"""quantize() and convert(): the loop that holds one tensor at a time, resumes, and writes the receipt.

    open -> decide what each tensor gets -> lay the output out -> for each tensor:
        load (mapped) -> encode -> measure -> write (journal)      -> rename -> receipt -> side files

Everything that can be refused is refused before the first byte is written. A run killed at any point
is continued by the same command; finished tensors are recognized by digest, so the result is
byte-identical to that of a run that was never killed.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from inspect import signature
from pathlib import Path

from .algorithms import ALGORITHMS
from .errors import FileError, FormatError, PlanError, raise_all
from .files.base import Checkpoint
from .files.gguf_metadata import model_name
from .files.native import INDEX, WEIGHTS
from .files.open import open_checkpoint
from .files.stream import StreamFile, make_directory, write_atomic
from .files.target import Target, gguf_target, native_target
from .formats import FLOATS, FORMATS
from .jobs import write_job
from .memory import peak_memory, reset_peak_memory
from .model.archs import architecture, check_complete, engine_notes, require_architecture
from .plan import Plan
from .plan.choices import Decision, check_feasible, decide, entries_of
from .plan.mixtures import RECIPES
from .plan.recipes import needing_imatrix
from .provenance import InputDigests, digest_file, fingerprint, input_files, versions
from .report.receipt import Receipt, TensorRow

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
    asked = [request.plan.digest(), request.to, request.search, request.requantize]
    identity = fingerprint(checkpoint, asked)
    make_directory(target.path.parent)
    with StreamFile.open(
        target.path, target.header, target.spans, identity, request.overwrite, target.align
    ) as file:
        hashing = InputDigests(checkpoint)
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
            outputs=(digest_file(target.path),),
            seconds=time.monotonic() - start,
            peak_memory_bytes=peak_memory(),
            versions=versions(),
            notes=target.notes,
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
        target = gguf_target(checkpoint, out, entries, formats, arch, file_type)
        notes = engine_notes(arch, checkpoint.config) if arch else []
        coarse = needing_imatrix(recipe.name, formats) if recipe else []
        if coarse:
            notes.append(f"{len(coarse)} tensors get types that llama-quantize writes only with an imatrix")
        return replace(target, notes=tuple(notes)), decisions
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
        near = get_close_matches(name.lower(), sorted({*RECIPES, *FORMATS}), n=3)
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
    if any(out.samefile(path) for path in [checkpoint.path, *input_files(checkpoint)]):
        raise FileError(f"{out}: is the input itself; choose another output")
    ours = [out / INDEX, out / f"{WEIGHTS}.journal"]
    if not gguf and not overwrite and (out / "config.json").exists() and not any(p.exists() for p in ours):
        raise FileError(
            f"{out}: holds a model that fewbits did not write; choose another output, or pass overwrite"
        )


def _carried_file_type(checkpoint: Checkpoint) -> int | None:
    """The mixture's number that a native directory remembers, a GGUF file has, or floats amount to."""
    if checkpoint.kind == "huggingface":
        kinds = Counter(t.dtype for t in checkpoint.tensors.values() for _ in t.shape[1:])
        common = kinds.most_common(1)[0][0] if kinds else ""
        return RECIPES[common].file_type if common in FLOATS else None
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
            write_job(checkpoint, job, decisions[job.name], {"search": request.search}, file)
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
