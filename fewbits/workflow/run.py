"""run() and convert(): the loop that holds one tensor at a time, resumes, and writes the receipt.

    resolve (resolve.py) -> layout of the output
         -> block by block, if the method runs the model (blockwise/): the checkpoint, quantized
         -> for each tensor: load (mapped) -> encode -> measure -> write (journal)
         -> rename -> receipt -> side files

All checks run before the first byte is written. The same command resumes a killed run. Finished tensors are
recognized by digest, so the result is byte-identical to that of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..activations.record import record, record_cache
from ..adapters.as_loaded import as_loaded
from ..calibrate.statistics import coverage_notes
from ..errors import FileError
from ..files.checkpoint import Checkpoint
from ..files.filetype import FileType
from ..files.open import GGUF_FILE, as_checkpoint
from ..files.output import Job, Output
from ..formats.plain import as_format
from ..memory import peak_memory, reset_peak_memory
from ..model.sites import sites
from ..plan.carry import settled
from ..plan.choices import Decision
from ..release.publish import check_records
from ..release.receipt import Receipt, TensorRow
from ..storage.atomic import make_directory, write_atomic
from ..storage.stream import StreamFile
from ..transforms.rotate import rotate
from .as_saved import as_saved
from .blockstore import BlockStore, check_ours
from .blockwise import TRAINED, Run, quantize_blocks
from .converted import clean, needs_converter, planned, run_converted
from .coverage import coverage_of, outside_notes, trained_notes
from .memory import fitted
from .provenance import InputDigests, digest_file, fingerprint, input_files, versions
from .pruning import is_float, prunable, sparsity_of
from .read_back import read_back
from .request import Request, calibration_of, check_method, fingerprint_fields, needs_of, stats_of
from .resolve import Resolved, file_type_for, resolve
from .task import WeightRecord, Work, spec_of, write_job

Progress = Callable[[str, int, int], None]


def run(
    source: Checkpoint | str | Path, out: str | Path, request: Request, progress: Progress | None = None
) -> Receipt:
    """Quantize `source` into `out` as `request` says -> the receipt, which is also written beside it.

    progress: called with (tensor name, bytes read, bytes in all). Raises PlanError, ModelError, FormatError
    or FileError; a started output stays resumable.
    """
    checkpoint = as_loaded(as_checkpoint(source))
    out = Path(out)
    check_method(request)
    if needs_converter(checkpoint, file_type_for(request.file, out)):
        check_place(checkpoint, out, GGUF_FILE, request.overwrite)
        return run_converted(checkpoint, out, request, progress, run)
    return _run(checkpoint, out, request, progress)


def _run(checkpoint: Checkpoint, out: Path, request: Request, progress: Progress | None) -> Receipt:
    start = time.monotonic()
    reset_peak_memory()
    checkpoint, notes = rewritten(checkpoint, request)
    source = checkpoint
    checkpoint, resolved = _resolved(checkpoint, request, file_type_for(request.file, out))
    check_place(checkpoint, out, resolved.file_type, request.overwrite)
    output, decisions = resolved.lay_out(checkpoint, out), resolved.by_output(checkpoint)
    before = len(request.notes)
    request, _ = fitted(checkpoint, output, decisions, request)
    notes = (*notes, *request.notes[before:])
    identity = fingerprint(source, fingerprint_fields(request))
    folder = out.with_name(out.name + ".blocks")
    if request.tokens is not None:
        check_ours(folder)
    make_directory(output.path.parent)
    with (
        StreamFile.open(
            output.path, output.header, output.spans, identity, request.overwrite, output.align
        ) as file,
        ExitStack() as stack,
    ):
        if file.renamed and output.receipt.exists():  # only cleaning up was left
            blocks = request.tokens is not None and folder.exists()
            kept = stack.enter_context(BlockStore(folder, identity)) if blocks else None
            return _cleaned(output, file, kept)
        notes, floats = (*output.notes, *resolved.notes, *notes), checkpoint
        hashing = stack.enter_context(InputDigests(source))
        records: Mapping[str, WeightRecord] = {}
        store = None
        if request.tokens is not None:
            store = stack.enter_context(BlockStore(folder, identity, request.overwrite))
            checkpoint, records, more = _block_by_block(
                checkpoint, output, decisions, request, store, progress
            )
            notes += request.tokens.notes + more
        measured, more = _measured(checkpoint, request, resolved.runtime)
        notes += more
        output = replace(output, jobs=output.measured(measured)) if output.measured else output
        pruned = prunable(floats, request.method)
        work = Work(request.method, request.search, stats_of(request), records, pruned)
        if request.statistics is not None:
            names = _in_blocks(checkpoint, output.jobs, pruned)
            notes += coverage_notes(request.statistics, names, "hessian" in needs_of(request))
        rows = _write_all(checkpoint, output, decisions, work, file, progress)
        notes += outside_notes(floats, output.jobs, rows, None if store is None else records)
        notes += trained_notes(rows)
        for path in output.stale:
            path.unlink(missing_ok=True)
        file.finish(keep_journal=True)
        output.finish(measured)
        receipt = _receipt(floats, output, request, rows)
        receipt = replace(receipt, training=tuple(checkpoint.metadata.get(TRAINED, {}).get("history", ())))
        receipt = replace(receipt, target=str(out), inputs=hashing.result(), notes=notes)
        receipt = replace(receipt, seconds=time.monotonic() - start, peak_memory_bytes=peak_memory())
        write_atomic(output.receipt, receipt.to_json().encode())
        return _cleaned(output, file, store)


def _resolved(checkpoint: Checkpoint, request: Request, file_type: FileType) -> tuple[Checkpoint, Resolved]:
    """What each tensor gets; and the checkpoint with arrays of experts whole where they stay in float."""
    resolved = resolve(checkpoint, request, file_type)
    if not file_type.writes_gguf_names:
        kinds = {name: each.kind for name, each in resolved.by_output(checkpoint).items()}
        whole = as_saved(checkpoint, kinds)
        if whole is not checkpoint:
            checkpoint, resolved = whole, resolve(whole, request, file_type)
    return checkpoint, read_back(checkpoint, settle(checkpoint, resolved))


def _cleaned(output: Output, file: StreamFile, store: BlockStore | None) -> Receipt:
    """The receipt of a complete output, after temporary files are deleted."""
    if store is not None:
        store.remove()
    file.close_journal()
    return Receipt.from_json(output.receipt.read_text(encoding="utf-8"), str(output.receipt))


def convert(
    source: Checkpoint | str | Path,
    out: str | Path,
    file: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    requantize: bool = False,
) -> Receipt:
    """Write a checkpoint to another file type without quantizing: every tensor keeps its values.

    A format that the file type does not support becomes another one with the same values (q4_0 is int4_g32),
    if there is one; else FormatError names the nearest. requantize: quantize to the nearest and report the
    added error. A file type for floats only gets decoded values.

        >>> receipt = fewbits.quantize(tiny, out, to="int4_g32", effort="fast")
        >>> receipt = fewbits.convert(out, out.with_suffix(".gguf"))
        >>> sorted({row.format for row in receipt.tensors if row.reason})
        ['f32', 'q4_0']
    """
    receipt = run(source, out, Request(file=file, overwrite=overwrite, requantize=requantize), progress)
    clean(Path(out))
    return receipt


def rewritten(checkpoint: Checkpoint, request: Request) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint after rewrites of the whole model, and the notes of the request and of these."""
    if "rotate" not in request.method.transforms:
        return checkpoint, request.notes
    checkpoint, notes = rotate(checkpoint, request.streaming.seed)
    return checkpoint, request.notes + notes


def settle(checkpoint: Checkpoint, resolved: Resolved) -> Resolved:
    """Decisions after formats with the same values were tried on the weights."""
    return replace(resolved, decisions=settled(checkpoint, resolved.entries, resolved.decisions))


def quantizes_blocks(checkpoint: Checkpoint, out: Path, request: Request) -> bool:
    """Whether any weight in the model's blocks gets another format, or is pruned."""
    resolved = resolve(checkpoint, *planned(checkpoint, request, file_type_for(request.file, out)))
    pruned = prunable(checkpoint, request.method)
    return bool(_in_blocks(checkpoint, resolved.lay_out(checkpoint, out).jobs, pruned))


def _measured(
    checkpoint: Checkpoint, request: Request, runtime: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The records of the runtime schemes, measured if needed, and their notes."""
    windows = None if request.tokens is None else request.tokens.windows
    measure = {"activations": record, "kv_cache": record_cache}
    trained = checkpoint.metadata.get(TRAINED, {}).get("activations")
    runtime = runtime if trained is None else {**runtime, "activations": trained}
    records = {
        kind: measure[kind](checkpoint, known, windows) if isinstance(known, str) else known
        for kind, known in runtime.items()
    }
    notes = []
    for kind, each in records.items():
        left = each.get("left", [])
        some = ", ".join(left[:3]) + (" ..." if left[3:] else "")
        kept = f"; {len(left)} inputs stay in float: {some}" if left else ""
        notes.append(f"{kind.replace('kv_', '')}: {each['scheme']}{kept}")
    return records, tuple(notes)


def _receipt(
    checkpoint: Checkpoint, output: Output, request: Request, rows: tuple[TensorRow, ...]
) -> Receipt:
    """The receipt of a finished output; the caller adds the rest."""
    return Receipt(
        source=str(checkpoint.path),
        target=str(output.path),
        tensors=rows,
        plan=request.plan.to_toml(),
        plan_digest=request.plan.digest(),
        recipe=request.to,
        inputs=(),
        outputs=(digest_file(output.path),),
        seconds=0.0,
        peak_memory_bytes=0,
        versions=versions(),
        method=request.method.settings(),
        calibration=calibration_of(request),
        coverage=coverage_of(checkpoint, output.jobs, rows, request.to),
        sparsity=sparsity_of(checkpoint, output.jobs, rows, request.method),
    )


def _in_blocks(checkpoint: Checkpoint, jobs: Sequence[Job], pruned: Set[str]) -> dict[str, Job]:
    """The weights in the model's blocks that are quantized, or pruned in a float type, and their jobs."""
    inside = {site.name for site in sites(checkpoint) if site.block is not None}
    return {
        source: job
        for job in jobs
        for source in job.sources
        if (source in inside and job.quantized and checkpoint.tensors[source].kind != job.kind)
        or (source in pruned and is_float(job.kind))
    }  # fmt: skip


def _block_by_block(
    checkpoint: Checkpoint,
    output: Output,
    decisions: Mapping[str, Decision],
    request: Request,
    store: BlockStore,
    progress: Progress | None,
) -> tuple[Checkpoint, Mapping[str, WeightRecord], tuple[str, ...]]:
    """The checkpoint with the weights of its blocks quantized, their records, notes."""
    assert request.tokens is not None
    pruned = prunable(checkpoint, request.method)
    specs = {
        source: spec_of(as_format(job.kind), decisions[job.name].rule, request.method, request.search)
        for source, job in _in_blocks(checkpoint, output.jobs, pruned).items()
    }
    pruning = request.method.pruning
    specs |= {name: replace(spec, pruning=pruning) for name, spec in specs.items() if name in pruned}
    todo = Run(
        checkpoint, specs, request.method, request.tokens, request.streaming, request.strict_calibration,
        request.activations,
    )  # fmt: skip
    return quantize_blocks(todo, store, progress)


def check_place(checkpoint: Checkpoint, out: Path, file_type: FileType, overwrite: bool) -> None:
    """FileError if the output would replace its own input or another kind of model."""
    file_type.check_kind(out)
    if out.exists() and any(out.samefile(path) for path in [checkpoint.path, *input_files(checkpoint)]):
        raise FileError(f"{out}: is the input itself; choose another output")
    file_type.check_place(out, overwrite)
    if not overwrite:
        check_records(file_type.receipt_path(out), file_type.card_path(out))


def _write_all(
    checkpoint: Checkpoint,
    output: Output,
    decisions: Mapping[str, Decision],
    work: Work,
    file: StreamFile,
    progress: Progress | None,
) -> tuple[TensorRow, ...]:
    total, read, rows = checkpoint.nbytes, 0, []
    done = file.done()
    for job in output.jobs:
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
