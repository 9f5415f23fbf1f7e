"""quantize() and convert(): the loop that holds one tensor at a time, resumes, and writes the receipt.

    open -> decide what each tensor gets -> lay the output out
         -> block by block, where the method runs the model (blockwise.py): the checkpoint, quantized
         -> for each tensor: load (mapped) -> encode -> measure -> write (journal)
         -> rename -> receipt -> side files

Everything that can be refused is refused before the first byte is written. A run killed at any point
is continued by the same command; finished tensors are recognized by digest, so the result is
byte-identical to that of a run that was never killed.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..activations.record import record, record_cache, record_of
from ..calibrate.statistics import coverage_notes
from ..errors import FileError, FormatError, PlanError
from ..files.checkpoint import Checkpoint
from ..files.gguf.metadata import model_name
from ..files.layout import LAYOUTS, Layout, is_plain, others_files
from ..files.open import open_checkpoint
from ..files.target import Job, Target, directory_target, gguf_refusal, gguf_target
from ..formats import FLOATS, FORMATS
from ..memory import peak_memory, reset_peak_memory
from ..model.archs import architecture, check_complete, engine_notes, require_architecture
from ..model.sites import sites
from ..plan.carry import carried
from ..plan.choices import Decision, check_feasible, decide, entries_of
from ..plan.mixtures import RECIPES
from ..plan.recipes import needing_imatrix
from ..release.receipt import Receipt, TensorRow
from ..storage.atomic import make_directory, write_atomic
from ..storage.stream import StreamFile
from ..transforms.rotate import rotate
from .blockstore import BlockStore
from .blockwise import Asked, Run, quantize_blocks
from .provenance import InputDigests, digest_file, fingerprint, input_files, versions
from .request import Request, asked_of, calibration_of, check_algorithms, check_method, needs_of, stats_of
from .task import Work, chosen, write_job

Progress = Callable[[str, int, int], None]


def quantize(
    source: Checkpoint | str | Path, out: str | Path, request: Request, progress: Progress | None = None
) -> Receipt:
    """Quantize `source` into `out` as `request` says -> the receipt, which is also written beside it.

    progress: called with (tensor name, bytes read, bytes in all). Raises PlanError, ModelError, FormatError
    or FileError; a started output stays resumable.

        >>> receipt = fewbits.quantize(tiny, out, fewbits.Request(to="int4_g64"))
        >>> {row.format for row in receipt.tensors if row.relative_error}
        {'int4_g64'}
    """
    start = time.monotonic()
    reset_peak_memory()
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(Path(source))
    out = Path(out)
    check_method(request)
    notes = request.notes
    if "rotate" in request.method.transforms:
        checkpoint, more = rotate(checkpoint, request.streaming.seed)
        notes += more
    target, decisions = prepare(checkpoint, out, request)
    identity = fingerprint(checkpoint, asked_of(request))
    make_directory(target.path.parent)
    with (
        StreamFile.open(
            target.path, target.header, target.spans, identity, request.overwrite, target.align
        ) as file,
        ExitStack() as stack,
    ):
        hashing = InputDigests(checkpoint)
        told: Mapping[str, Mapping[str, object]] = {}
        store = None
        if request.tokens is not None and not file.renamed:
            folder = out.with_name(out.name + ".blocks")
            store = stack.enter_context(BlockStore(folder, identity, request.overwrite))
            checkpoint, told, more = _block_by_block(checkpoint, target, decisions, request, store, progress)
            notes += request.tokens.notes + more
        found, more = _measured(checkpoint, request, target.runtime)
        notes += more
        target = replace(target, jobs=target.told(found)) if target.told else target
        work = Work(request.method, {"search": request.search}, stats_of(request), told)
        if request.statistics is not None:
            names = _in_blocks(checkpoint, target.jobs)
            notes += coverage_notes(request.statistics, names, "hessian" in needs_of(request))
        rows = _write_all(checkpoint, target, decisions, work, file, progress)
        for path in target.stale:
            path.unlink(missing_ok=True)
        file.finish(keep_journal=True)
        target.finish(found)
        receipt = _receipt(checkpoint, target, request, rows)
        receipt = replace(receipt, target=str(out), inputs=hashing.result(), notes=target.notes + notes)
        seconds = time.monotonic() - start
        receipt = replace(receipt, seconds=seconds, peak_memory_bytes=peak_memory())
        write_atomic(target.receipt, receipt.to_json().encode())
        if store is not None:
            store.remove()
        file.close_journal()
    return receipt


def _measured(
    checkpoint: Checkpoint, request: Request, runtime: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the runtime is told besides the weights, as records, and the same as notes."""
    windows = None if request.tokens is None else request.tokens.windows
    measure = {"activations": record, "kv_cache": record_cache}
    found = {
        kind: measure[kind](checkpoint, said, windows) if isinstance(said, str) else said
        for kind, said in runtime.items()
    }
    notes = []
    for kind, said in found.items():
        left = said.get("left", [])
        some = ", ".join(left[:3]) + (" ..." if left[3:] else "")
        kept = f"; {len(left)} inputs stay in float: {some}" if left else ""
        notes.append(f"{kind.replace('kv_', '')}: {said['scheme']}{kept}")
    return found, tuple(notes)


def _told(
    checkpoint: Checkpoint, request: Request, file: str
) -> tuple[Layout | None, dict[str, Any], list[str]]:
    """The layout (None: GGUF) that says what the runtime is to do, what that is, and what it cannot say.

    What is asked for must be said, else PlanError. What the input says of weights that keep their formats is
    said again where the file type can; where it cannot, that is a note.
    """
    layout = None if file == "gguf" else LAYOUTS.get(file)
    asked = {"activations": request.activations, "kv_cache": request.kv_cache}
    names = {kind: name for kind, name in asked.items() if name is not None}
    if layout is None and names:
        raise PlanError("a GGUF file says nothing of activations or a cache; use a native directory")
    whole = None if layout is None else layout.told(**names)
    found: dict[str, Any] = dict(names)
    notes = [f"the input: {line}" for line in checkpoint.metadata.get("unread", ())]
    for kind in (kind for kind in asked if kind not in names and checkpoint.kind != "gguf"):
        known = record_of(checkpoint.metadata, kind)
        if known is None:
            continue
        scheme = str(known["scheme"])
        try:
            if request.to or request.plan.rules:
                raise PlanError("its weights are quantized anew")
            if layout is None:
                raise PlanError("a GGUF file says nothing of it")
            whole = layout.told(**names, **{kind: scheme})
        except PlanError as error:
            notes.append(f"the input's {kind} in {scheme}: not kept; {error}")
        else:
            names[kind], found[kind] = scheme, known
    return whole, found, notes


def _receipt(
    checkpoint: Checkpoint, target: Target, request: Request, rows: tuple[TensorRow, ...]
) -> Receipt:
    """What is known when the output lies in its place; the rest is the caller's."""
    return Receipt(
        source=str(checkpoint.path),
        target=str(target.path),
        tensors=rows,
        plan=request.plan.to_toml(),
        plan_digest=request.plan.digest(),
        recipe=request.to,
        inputs=(),
        outputs=(digest_file(target.path),),
        seconds=0.0,
        peak_memory_bytes=0,
        versions=versions(),
        method=request.method.asked(),
        calibration=calibration_of(request),
    )


def convert(
    source: Checkpoint | str | Path,
    out: str | Path,
    file: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    requantize: bool = False,
) -> Receipt:
    """Write a checkpoint to another file type without quantizing: every tensor keeps its values.

    A format that the file type lacks becomes another with the same values (q4_0 is int4_g32) where there
    is one; else FormatError names the nearest. requantize: quantize to that, and tell the added error.

        >>> receipt = fewbits.quantize(tiny, out, fewbits.Request(to="int4_g32"))
        >>> receipt = fewbits.convert(out, out.with_suffix(".gguf"))
        >>> sorted({row.format for row in receipt.tensors if row.reason})
        ['f32', 'q4_0']
    """
    return quantize(source, out, Request(file=file, overwrite=overwrite, requantize=requantize), progress)


def prepare(checkpoint: Checkpoint, out: Path, request: Request) -> tuple[Target, dict[str, Decision]]:
    """Decide, check and lay out, all from headers: the target, and by job name what each gets."""
    file = request.file or ("gguf" if out.suffix == ".gguf" else "native")
    gguf = file == "gguf"
    layout, runtime, unsaid = _told(checkpoint, request, file)
    if gguf and checkpoint.kind != "gguf":
        require_architecture(checkpoint.config)
    _check_place(checkpoint, out, layout, request.overwrite)
    arch = architecture(checkpoint.config)
    if arch is not None:
        check_complete(arch, checkpoint.config, checkpoint.tensors.keys())
    entries = entries_of(checkpoint, arch)
    recipe = RECIPES.get((request.to or "").lower())
    to = (recipe.name if recipe else None, None if request.to is None or recipe else _format(request.to))
    decisions = decide(checkpoint, entries, arch, to, request.plan, gguf, request.calibrated)
    refusal = gguf_refusal if layout is None else layout.refusal
    tables = layout is None or layout.tables
    decisions = carried(checkpoint, entries, decisions, refusal, request.requantize, tables)
    check_feasible(checkpoint, entries, decisions, request.requantize)
    check_algorithms(request)
    known = None if request.to or request.plan.rules else _carried_file_type(checkpoint)
    file_type = recipe.file_type if recipe else known
    if layout is None:
        formats = {name: decision.format for name, decision in decisions.items()}
        target = gguf_target(checkpoint, out, entries, formats, arch, file_type)
        notes = unsaid + (engine_notes(arch, checkpoint.config) if arch else [])
        coarse = needing_imatrix(recipe.name, formats) if recipe and not request.calibrated else []
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
    target = directory_target(checkpoint, out, formats, layout, about)
    return replace(target, runtime=runtime, notes=(*target.notes, *unsaid)), by_source


def quantizes_blocks(checkpoint: Checkpoint, out: Path, request: Request) -> bool:
    """Does any weight of the model's blocks get another format than it has?"""
    target, _ = prepare(checkpoint, out, request)
    return bool(_in_blocks(checkpoint, target.jobs))


def _in_blocks(checkpoint: Checkpoint, jobs: Sequence[Job]) -> dict[str, Job]:
    """The weights of the model's blocks that are to be quantized, and the jobs that they belong to."""
    inside = {site.name for site in sites(checkpoint) if site.block is not None}
    return {
        source: job
        for job in jobs
        for source in job.sources
        if source in inside and not is_plain(job.format) and checkpoint.tensors[source].dtype != job.format
    }


def _block_by_block(
    checkpoint: Checkpoint,
    target: Target,
    decisions: Mapping[str, Decision],
    request: Request,
    store: BlockStore,
    progress: Progress | None,
) -> tuple[Checkpoint, Mapping[str, Mapping[str, object]], tuple[str, ...]]:
    """The checkpoint with the weights of its blocks quantized, what each cost, notes."""
    assert request.tokens is not None
    asked = {}
    for source, job in _in_blocks(checkpoint, target.jobs).items():
        algorithm, options = chosen(decisions[job.name].rule, request.method, {"search": request.search})
        asked[source] = Asked(FORMATS.get(job.format), algorithm, options)
    run = Run(checkpoint, asked, request.method, request.tokens, request.streaming, request.strict)
    return quantize_blocks(run, store, progress)


def _format(name: str) -> str:
    try:
        return FORMATS.get(name).name
    except FormatError as error:
        near = get_close_matches(name.lower(), sorted({*RECIPES, *FORMATS}), n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise PlanError(
            f"{name!r} is neither a file type nor a format; {hint}`fewbits formats` lists both"
        ) from error


def _check_place(checkpoint: Checkpoint, out: Path, layout: Layout | None, overwrite: bool) -> None:
    """FileError where the output would stand on its own input, or on a model of another kind."""
    if not out.exists():
        return
    if out.is_dir() == (layout is None):
        kind = "a" if layout is None else "not a"
        raise FileError(f"{out}: exists and is {kind} directory; choose another output")
    if any(out.samefile(path) for path in [checkpoint.path, *input_files(checkpoint)]):
        raise FileError(f"{out}: is the input itself; choose another output")
    if layout is None or overwrite:
        return
    ours = [out / "receipt.json", out / f"{layout.weights}.journal"]
    if (out / "config.json").exists() and not any(p.exists() for p in ours):
        raise FileError(
            f"{out}: holds a model that fewbits did not write; choose another output, or pass overwrite"
        )
    for name in others_files(layout):
        if (out / name).exists():
            raise FileError(f"{out / name}: exists; choose another output or pass overwrite")


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
    work: Work,
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
            write_job(checkpoint, job, decisions[job.name], work, file)
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
