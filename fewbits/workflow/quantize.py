"""quantize(): what `fewbits quantize` does: resolve, run, conclude.

model -> checkpoint -> Options -> Request, with the text that its method needs      options.py, text.py
Request -> resolve (resolve.py) -> run (run.py) -> the output and its receipt
output, and model -> their engines, audit of side files, receipt, card                            release/
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.as_loaded import as_loaded
from ..adapters.hub import resolve as resolve_model
from ..algorithms.ecsq import BITS as ECSQ_BITS
from ..algorithms.ecsq import row_integers
from ..devices import Room
from ..errors import PlanError
from ..files.checkpoint import Checkpoint
from ..files.filetype import FileType
from ..files.native import NATIVE
from ..files.open import open_checkpoint
from ..formats import FORMATS
from ..memory import Need, left_of
from ..model.sites import sites
from ..plan import Plan
from ..plan.mixtures import RECIPES
from ..plan.rates import with_rates
from ..release.publish import finished
from ..release.receipt import Receipt
from ..release.verify import Outcome, verification_nbytes, verify
from .converted import clean, planned, restored, some
from .memory import fitted, with_verification
from .options import Options
from .read_back import read_back
from .request import Request
from .resolve import resolve
from .run import check_place, run
from .text import stand_in, with_read_text, with_text, writes_text

Progress = Callable[[str, int, int], None]


def quantize(
    model: str | Path | Checkpoint,
    out: str | Path | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
    **given: Any,
) -> Receipt:
    """Quantize a model, as `fewbits quantize` does -> the receipt, which is also written beside the output.

    model: a Hugging Face directory, a GGUF file, a hub name, or what `fewbits.open` gives. out: the output's
    path (default: by the model's name and the type). given: fields of Options, such as to="q4_k_m". The
    default is calibrated (GPTQ) on text that the model writes itself, or on random tokens where it writes
    none. receipt.verified has what the output's engine made of it. progress: called with (stage or tensor,
    done, all). Errors: those of `run`, CalibrationError.

        >>> receipt = fewbits.quantize(tiny, out, to="int4_g64", effort="fast")
        >>> {row.format for row in receipt.tensors if row.relative_error}
        {'int4_g64'}
    """
    unknown = [name for name in given if name not in Options.__dataclass_fields__]
    if unknown:
        raise PlanError(
            f"quantize has no option {unknown[0]!r}; known: {', '.join(Options.__dataclass_fields__)}"
        )
    options = replace(options or Options(), **given).filled()
    checkpoint, path = opened(model)
    place, request, _ = prepared(checkpoint, path, None if out is None else Path(out), options)
    request = with_read_text(request, checkpoint, options, progress)
    receipt = run(checkpoint, place, request, progress)
    return conclude(receipt, checkpoint, place, options)[0]


def opened(model: str | Path | Checkpoint, cache_dir: Path | None = None) -> tuple[Checkpoint, Path]:
    """A model of any kind, as transformers loads it, and where it lies. Asked once: each step of a run finds
    the answer in the checkpoint."""
    if isinstance(model, Checkpoint):
        return as_loaded(model), model.path
    path = resolve_model(str(model), cache_dir)
    return as_loaded(open_checkpoint(path)), path


def prepared(
    checkpoint: Checkpoint, path: Path, out: Path | None, options: Options
) -> tuple[Path, Request, Need]:
    """Where the output of the model at `path` goes; the request, with a stand-in for a text; what it needs.

    Everything that can be refused before a text is read or written is: FileError for what is in the way,
    ModelError or CalibrationError where there is not enough memory.
    """
    checkpoint = as_loaded(checkpoint)
    place, file_type = options.place(path, checkpoint, out)
    request = replace(options.request(), file=file_type.name)
    request = replace(request, plan=_rated(request, checkpoint, file_type))
    if file_type is NATIVE and options.file is None and (options.to or "").lower() in RECIPES:
        note = f"{options.to} is written as a native directory; llama.cpp reads --out {place.name}.gguf"
        request = replace(request, notes=(*request.notes, note))
    request = with_text(request, checkpoint, options, stand_in(options))
    check_place(checkpoint, place, file_type, request.overwrite)
    resolved = read_back(checkpoint, resolve(checkpoint, *planned(checkpoint, request, file_type)))
    output, decisions = resolved.lay_out(checkpoint, place), resolved.by_output(checkpoint)
    _, need = fitted(checkpoint, output, decisions, request, writes_text(request))
    if options.verify:
        need = with_verification(need, checkpoint, request, verification_nbytes(checkpoint, file_type))
    return place, request, need


def _rated(request: Request, checkpoint: Checkpoint, file_type: FileType) -> Plan:
    """The plan; for entropy-coded codes with the bits of each kind of weight."""
    if request.method.algorithm != "ecsq" or request.to is None:
        return request.plan
    if request.to not in FORMATS:
        raise PlanError(f"ecsq takes a format of integers, int8_channel, not the mixture {request.to}")
    row_integers(FORMATS.get(request.to))
    bits = float(request.method.options.get("bits", ECSQ_BITS))
    return with_rates(request.plan, sites(checkpoint), request.to, bits, file_type.tables)


def conclude(
    receipt: Receipt, source: Checkpoint, out: Path, options: Options
) -> tuple[Receipt, Outcome | None]:
    """What follows the writing: the engines of output and reference are asked, side files are audited,
    receipt and card written."""
    outcome = None
    if options.verify:
        outcome = _verified(source, out, options)
    clean(out)
    return finished(receipt, source, out, outcome), outcome


def _verified(source: Checkpoint, out: Path, options: Options) -> Outcome:
    room = Room(options.streaming.device, left_of(options.memory))
    limits = (options.verify_seconds, options.verify_memory, None, room)
    known = restored(source, out)
    reference = as_loaded(source)
    if known is None:
        return verify(out, *limits, reference=reference)
    if not known.computed:
        outcome = verify(out, *limits, decoded=known.values, reference=reference)
        if outcome.verdict not in ("differs", "failed"):
            return outcome
    before = verify(known.floats, *limits, decoded=source)
    floats = f"the converter's float file: {before.line()}"
    if known.computed:
        text = f"{some(known.computed)}: values that the converter computed; {floats}"
        verdict = "not checked" if before.verdict == "same" else before.verdict
        return replace(before, verdict=verdict, reason=text)
    return replace(outcome, reason="; ".join(filter(None, (outcome.reason, floats))))
