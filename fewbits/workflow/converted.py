"""GGUF of architectures that only llama.cpp's own converter knows.

the model  -> its converter -> float GGUF           OUT.converting/float-KEY.gguf; provenance of its rows
resolve    -> the format of each of its tensors     as for any GGUF input
the model  -> run -> a native directory             OUT.converting/codes: only calibrated runs; resumable
its rows, gathered under GGUF names -> run -> OUT   what was not found is rounded to nearest from the floats
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..adapters.llamacpp_convert import check_converts, convert_float
from ..adapters.older_config import full_config, with_old_names
from ..dtypes import BF16, DTYPES, F16, F32
from ..errors import FileError, ModelError, PlanError
from ..files.checkpoint import Checkpoint
from ..files.filetype import FileType
from ..files.gguf.converted import Converted, open_converted
from ..files.gguf.model import open_gguf
from ..files.huggingface import HUGGINGFACE
from ..files.native import NATIVE
from ..files.open import GGUF_FILE, open_checkpoint
from ..formats import Distortion
from ..formats.base import Format
from ..model.archs import architecture, own_entries, own_names
from ..model.pretokenizers import pretokenizer_name
from ..model.sites import sites
from ..plan import Plan, Rule
from ..plan.choices import entries_of
from ..plan.method import Method
from ..qtensor import QTensor
from ..release.receipt import Receipt, TensorRow
from ..storage.atomic import make_directory, write_atomic
from ..storage.json import read_json_object
from .coverage import coverage_of
from .provenance import fingerprint
from .request import Request, calibration_of
from .resolve import Resolved, resolve

Progress = Callable[[str, int, int], None]
Run = Callable[[Checkpoint, Path, Request, "Progress | None"], Receipt]
NOTE = "hyperparameters, tokenizer and names by llama.cpp's own converter"
OWN = "rounded to nearest from the converter's floats: its rows are not rows of the model"


def needs_converter(checkpoint: Checkpoint, file_type: FileType) -> bool:
    """Is the output a GGUF file of an architecture that our own table lacks?"""
    own = checkpoint.gguf_keys or architecture(checkpoint.config)
    return file_type.writes_gguf_names and not own


def planned(checkpoint: Checkpoint, request: Request, file_type: FileType) -> tuple[Request, FileType]:
    """What is resolved before a run: the request itself, or all weights in a format that fits any of them,
    where the file's names are not known yet. ModelError if the converter is needed and missing, or does not
    know the architecture."""
    if not needs_converter(checkpoint, file_type):
        return request, file_type
    check_model(checkpoint)
    _check_method(checkpoint, request)
    return replace(request, to=None, plan=Plan((Rule("*", "int8_channel"),)), file=NATIVE.name), NATIVE


def check_model(model: Checkpoint) -> None:
    """ModelError where the converter is missing, or does not take the model."""
    check_converts(model.config)
    if not any("token" in name or "vocab" in name for name in model.side_files):
        raise ModelError(
            f"{model.path}: no tokenizer files, which llama.cpp's converter needs; copy the model's there"
        )


def _check_method(model: Checkpoint, request: Request) -> None:
    """PlanError for pruning, which the converter's floats do not take part in."""
    if request.method.pruning is not None:
        raise PlanError(
            f"{model.path}: a GGUF file that llama.cpp's own converter makes is not pruned; prune the model "
            "into a directory of floats first (--to bf16 --file huggingface --sparsity ...)"
        )


def run_converted(
    model: Checkpoint, out: Path, request: Request, progress: Progress | None, run: Run
) -> Receipt:
    """`run` for such an output, by the converter. Its folder stays, for another try or for `restored`, until
    `clean`."""
    check_model(model)
    _check_method(model, request)
    if out.exists() and not request.overwrite:
        raise FileError(f"{out}: exists; choose another output or pass overwrite")
    folder = _folder(out)
    make_directory(folder)
    plain = _in_floats(model, folder, run)
    converted = open_converted(_float_file(plain, folder), plain)
    base = converted.view(model, _common_formats(model, converted))
    request, spelled = replace(request, file=GGUF_FILE.name), request
    request = replace(request, plan=_by_gguf_names(base, converted, request.plan))
    if request.calibrated:
        receipt = _calibrated(model, base, converted, out, request, progress, run)
    else:
        receipt = run(base, out, request, progress)
    source, plan = str(model.path), spelled.plan
    receipt = replace(receipt, source=source, plan=plan.to_toml(), plan_digest=plan.digest())
    receipt = replace(receipt, notes=(*receipt.notes, *_own_notes(converted, receipt)))
    write_atomic(GGUF_FILE.receipt_path(out), receipt.to_json().encode())
    return receipt


@dataclass(frozen=True)
class Restored:
    """values: of an output of `run_converted`, under the model's names. floats: the float file. computed:
    quantized tensors whose values have no place in the model."""

    values: Checkpoint
    floats: Path
    computed: tuple[str, ...]


def restored(model: Checkpoint, out: Path) -> Restored | None:
    """From what `run` left; None for other outputs."""
    found = sorted((_folder(out)).glob("float-*.gguf"))
    if not found:
        return None
    converted = open_converted(found[0], model)
    tensors = open_gguf(out, own_names=True).tensors
    lost = [name for name, tensor in tensors.items() if tensor.quantized and name not in converted.parts]
    names = tuple(entry.name for entry in own_entries(lost))
    return Restored(converted.restored(model, out), found[0], names)


def clean(out: Path) -> None:
    """Delete what is not needed any more when such an output is complete and verified."""
    shutil.rmtree(_folder(out), ignore_errors=True)


def _folder(out: Path) -> Path:
    return out.with_name(out.name + ".converting")


def _calibrated(
    model: Checkpoint,
    base: Checkpoint,
    converted: Converted,
    out: Path,
    request: Request,
    progress: Progress | None,
    run: Run,
) -> Receipt:
    """Codes chosen for the model's own weights, under GGUF names."""
    resolved = resolve(base, request, GGUF_FILE)
    moved = bool(request.method.transforms) or bool(request.method.trains)
    if moved:
        _check_all_found(base, converted)
    plan = Plan(_model_rules(model, converted, resolved))
    folder = _folder(out) / "codes"
    first = run(model, folder, replace(request, to=None, plan=plan, file=NATIVE.name), progress)
    codes = open_checkpoint(folder)
    kinds = {name: resolved.decisions[e.name].kind for e in resolved.entries for name in e.sources}
    take: dict[str, Format | None] = dict.fromkeys(converted.parts) if moved else {}
    for name, kind in kinds.items():
        sources = converted.sources(name)
        if sources and isinstance(kind, Format) and all(codes.tensors[s].kind == kind for s in sources):
            take[name] = kind
    view = converted.view(codes, take, resolved.mixture)
    rules = tuple(
        Rule(glob.escape(entry.name), resolved.decisions[entry.name].kind.name)
        for entry in resolved.entries
        if any(kinds[name] != view.tensors[name].kind for name in entry.sources)
    )
    last = replace(request, to=None, plan=Plan(rules), method=Method(), tokens=None, statistics=None)
    receipt = run(view, out, last, progress)
    errors = {} if moved else _errors(converted.floats, view, resolved)
    rows = _rows(receipt, first, converted, resolved, errors)
    by_name = {row.gguf_name or row.name: row for row in rows}
    jobs = [job for job in resolved.lay_out(base, out).jobs if job.name in by_name]
    return replace(
        receipt,
        tensors=rows,
        coverage=coverage_of(base, jobs, [by_name[job.name] for job in jobs], request.to),
        recipe=request.to,
        method=request.method.settings(),
        calibration=calibration_of(request),
        notes=(*first.notes, *resolved.notes, *receipt.notes),
        seconds=first.seconds + receipt.seconds,
        peak_memory_bytes=max(first.peak_memory_bytes, receipt.peak_memory_bytes),
    )


# ---- the converter's float file ----------------------------------------------------------------------


def _in_floats(model: Checkpoint, folder: Path, run: Run) -> Checkpoint:
    """The model as a directory of floats, which the converter reads."""
    if model.file_type is HUGGINGFACE:
        return model
    run(model, folder / "floats", Request(file=HUGGINGFACE.name, overwrite=True), None)
    return open_checkpoint(folder / "floats")


def float_dtype(model: Checkpoint) -> str:
    """The number type of the converter's file: that of all matrices, or f32."""
    known = {tensor.kind for tensor in model.tensors.values() if len(tensor.shape) > 1}
    kind = next(iter(known)) if len(known) == 1 else F32
    return kind.name if kind in (BF16, F16) else F32.name


def float_nbytes(model: Checkpoint) -> int:
    """Bytes of the converter's file."""
    return model.numel * DTYPES[float_dtype(model)].itemsize


def _float_file(model: Checkpoint, folder: Path) -> Path:
    """The float GGUF of a directory, made unless an earlier try left it."""
    dtype = float_dtype(model)
    about = json.dumps(fingerprint(model, {"dtype": dtype}), sort_keys=True)
    path = folder / f"float-{hashlib.sha256(about.encode()).hexdigest()[:16]}.gguf"
    if path.exists():
        return path
    for old in folder.glob("float-*"):
        old.unlink()
    need, free = float_nbytes(model), shutil.disk_usage(folder).free
    if need > free:
        raise FileError(
            f"{path}: the converter's float file takes {need / 2**30:.2f} GiB of disk, "
            f"{free / 2**30:.2f} GiB are free; free some, or choose an output on another disk"
        )
    config = with_old_names(full_config(model))
    convert_float(model.path, config, path, dtype, _pretokenizer(model))
    return path


def _pretokenizer(model: Checkpoint) -> str | None:
    """The name of the tokenizer's rules of splitting text; None if they are in no table."""
    try:
        return pretokenizer_name(read_json_object(model.side_files["tokenizer.json"]))
    except (KeyError, ModelError):
        return None


# ---- names and formats -------------------------------------------------------------------------------


def _common_formats(model: Checkpoint, converted: Converted) -> dict[str, Format | None]:
    """The GGUF tensors whose rows are all quantized, in one format."""
    found: dict[str, Format | None] = {}
    for name in converted.parts:
        kinds = {model.tensors[source].kind for source in converted.sources(name)}
        kind = kinds.pop()
        if not kinds and isinstance(kind, Format):
            found[name] = kind
    return found


def _by_gguf_names(base: Checkpoint, converted: Converted, plan: Plan) -> Plan:
    """The user's rules, which may name the model's tensors, for those of the file."""
    rules: list[Rule] = []
    used: list[Rule] = []
    for entry in own_entries(base.tensors):
        origins = [source for name in entry.sources for source in converted.sources(name)]
        rule = plan.choose([entry.name, *entry.sources, *origins])
        if rule is not None:
            used.append(rule)
            rules.append(replace(rule, match=glob.escape(entry.name)))
    return replace(plan, rules=(*rules, *(rule for rule in plan.rules if rule not in used)))


def _model_rules(model: Checkpoint, converted: Converted, resolved: Resolved) -> tuple[Rule, ...]:
    """The rules of the file's tensors for the model's: of the one that has most of its rows."""
    rows: dict[str, Counter[str]] = {}
    asked: dict[str, Rule] = {}
    for entry in resolved.entries:
        decision = resolved.decisions[entry.name]
        if not isinstance(decision.kind, Format):
            continue
        rule = decision.rule or Rule("*", decision.kind.name)
        asked[entry.name] = replace(rule, format=decision.kind.name)
        for part in (part for name in entry.sources for part in converted.parts.get(name, ())):
            rows.setdefault(part.source, Counter())[entry.name] += len(part.rows)
    rules, known = [], {site.name for site in sites(model)}
    for entry in entries_of(model, None):  # experts of a block have one format
        counts = sum((rows.get(name, Counter()) for name in entry.sources), Counter())
        if counts and entry.sources[0] in known:
            most = asked[counts.most_common(1)[0][0]]
            rules.append(replace(most, match=glob.escape(entry.sources[0])))
    return tuple(rules)


def _check_all_found(base: Checkpoint, converted: Converted) -> None:
    lost = [name for name in base.tensors if name not in converted.parts]
    if lost:
        raise PlanError(
            f"{some(lost)}: llama.cpp's converter computes it, so a transform or distillation of the model "
            "does not reach it; leave these out (--awq, --smooth, --equalize, --rotate, --distill, "
            "--effort best)"
        )


# ---- the receipt -------------------------------------------------------------------------------------


def _errors(floats: Checkpoint, view: Checkpoint, resolved: Resolved) -> dict[str, Distortion]:
    """Of each tensor with the model's codes: its error, measured on the converter's floats."""
    found = {}
    for entry in resolved.entries:
        if not all(view.tensors[name].quantized for name in entry.sources):
            continue
        lost = Distortion(0.0, 0.0, 0.0)
        for name in entry.sources:
            w, q = floats.tensors[name].load(), view.tensors[name].load()
            assert isinstance(w, torch.Tensor) and isinstance(q, QTensor)
            lost = lost + q.format.distortion(w, q)
        found[entry.name] = lost
    return found


def _rows(
    receipt: Receipt,
    first: Receipt,
    converted: Converted,
    resolved: Resolved,
    errors: Mapping[str, Distortion],
) -> tuple[TensorRow, ...]:
    """The rows of the file, with what is known of the codes of the model's weights. Of several weights: the
    fewest tokens, the largest error of an output."""
    known = {row.name: row for row in first.tensors}
    entries = {entry.name: entry for entry in resolved.entries}
    rows = []
    for row in receipt.tensors:
        entry = entries[row.gguf_name or row.name]
        decision, lost = resolved.decisions[entry.name], errors.get(entry.name)
        row = replace(row, asked=decision.requested.name, reason=decision.reason or row.reason, rule=None)
        origins = [known[source] for name in entry.sources for source in converted.sources(name)]
        if row.algorithm is None and isinstance(decision.kind, Format) and origins:
            tokens = [origin.tokens for origin in origins if origin.tokens is not None]
            outputs = [origin.output_error for origin in origins if origin.output_error is not None]
            row = replace(row, algorithm=origins[0].algorithm, options=origins[0].options)
            row = replace(row, tokens=min(tokens, default=None), output_error=max(outputs, default=None))
        if lost is not None:
            row = replace(row, relative_error=lost.relative_error, sqnr_db=lost.sqnr_db)
            row = replace(row, max_abs_error=lost.largest)
        rows.append(row)
    return tuple(rows)


def _own_notes(converted: Converted, receipt: Receipt) -> tuple[str, ...]:
    lost = []
    for row in receipt.tensors:
        name = row.gguf_name or row.name
        if row.relative_error and not all(each in converted.parts for each in own_names(name, row.shape)):
            lost.append(name)
    return (NOTE, *([f"{some(lost)}: {OWN}"] if lost else []))


def some(names: Sequence[str]) -> str:
    """The first of names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")
