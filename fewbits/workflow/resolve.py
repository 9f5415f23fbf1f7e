"""resolve(): the format of each tensor of the output, from headers alone: no output path, no weight read.

`quantize` writes the result, `plan` reports it, `quantize_model` applies it to a model in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..activations.record import record_of
from ..dtypes import DType
from ..errors import FormatError, PlanError
from ..files.checkpoint import Checkpoint
from ..files.filetype import FILE_TYPES, FileType
from ..files.gguf.metadata import model_name
from ..files.native import NATIVE
from ..files.output import Output
from ..formats.base import FORMATS, Format, Kind
from ..model.archs import GGUFEntry, architecture, check_complete
from ..model.sites import per_block, sites
from ..plan.carry import carried
from ..plan.choices import Decision, check_feasible, decide, entries_of
from ..plan.mixtures import RECIPES, Recipe
from ..plan.recipes import needing_imatrix
from .pruning import check_pruning
from .request import Request, check_algorithms

ELSEWHERE = {
    "fp8": ("fp8_e4m3_channel",),
    "fp8_dynamic": ("fp8_e4m3_channel --activations fp8_dynamic",),
    "fp8_block": ("fp8_e4m3_block128",),
    "w4a16": ("int4_g128",),
    "w4a16_asym": ("int4_g128_asym",),
    "w8a16": ("int8_channel",),
    "w8a8": ("int8_channel --activations int8_dynamic", "fp8_e4m3_channel --activations fp8_dynamic"),
    "nvfp4a16": ("nvfp4",),
    "gptq": ("int4_g128 --method gptq --file gptq",),
    "awq": ("int4_g128_asym --awq --file awq",),
    "hqq": ("int4_g64_asym_float --method hqq",),
    "bnb_4bit": ("nf4 --file bitsandbytes",),
    "bnb_8bit": ("int8_absmax --file bitsandbytes",),
}
"""What other tools call a scheme (llm-compressor's presets, methods) -> what to ask for here."""


@dataclass(frozen=True)
class Resolved:
    """The result of a request. decisions: by entry. recipe: the requested llama.cpp file type. runtime:
    records for the runtime, or the name of a scheme that is not measured yet. unquantized: modules of
    transformers' class that stay in float, where names do not say so."""

    file_type: FileType
    entries: tuple[GGUFEntry, ...]
    decisions: Mapping[str, Decision]
    recipe: Recipe | None
    mixture: int | None
    runtime: Mapping[str, Any]
    notes: tuple[str, ...]
    unquantized: tuple[str, ...] = ()

    def by_output(self, checkpoint: Checkpoint) -> dict[str, Decision]:
        """Decisions by the output's names: its entries, or every tensor of the checkpoint."""
        if self.file_type.writes_gguf_names:
            return dict(self.decisions)
        decisions = {source: self.decisions[e.name] for e in self.entries for source in e.sources}
        return {
            name: decisions.get(name) or Decision(tensor.kind, tensor.kind, "kept: not part of the model")
            for name, tensor in checkpoint.tensors.items()
        }

    def lay_out(self, checkpoint: Checkpoint, out: Path) -> Output:
        """The output before its first byte; FormatError for a format that the file type does not support."""
        kinds: dict[str, Kind] = {name: each.kind for name, each in self.by_output(checkpoint).items()}
        about: dict[str, Any] = {
            "name": model_name(checkpoint),
            "recipe": self.recipe.name if self.recipe else None,
            "file_type": self.mixture,
        }
        if self.unquantized:
            about["unquantized"] = self.unquantized
        return self.file_type.lay_out(checkpoint, out, self.entries, kinds, about)


def file_type_for(name: str | None, out: Path) -> FileType:
    """The file type of this name; without a name, the one with the suffix of `out`, else native."""
    if name is not None:
        return FILE_TYPES.get(name)
    known = (file_type for _, file_type in FILE_TYPES.items())
    return next((each for each in known if each.suffix and each.suffix == out.suffix), NATIVE)


def resolve(checkpoint: Checkpoint, request: Request, file_type: FileType) -> Resolved:
    """Decide and check. Raises PlanError, ModelError or FormatError with every fault."""
    file_type, runtime, notes = _with_runtime(checkpoint, request, file_type)
    file_type.check_source(checkpoint)
    arch = architecture(checkpoint.config)
    if arch is not None:
        check_complete(arch, checkpoint.config, checkpoint.tensors.keys())
    entries = entries_of(checkpoint, arch, file_type.writes_gguf_names)
    to = target_of(request.to)
    decisions = decide(checkpoint, entries, to, request.plan, file_type, request.calibrated)
    decisions = carried(checkpoint, entries, decisions, file_type, request.requantize)
    check_feasible(checkpoint, entries, decisions, request.requantize)
    kinds = {source: decisions[entry.name].kind for entry in entries for source in entry.sources}
    check_pruning(checkpoint, kinds, request.method)
    _check_any(checkpoint, request, decisions)
    check_algorithms(request)
    recipe = to if isinstance(to, Recipe) else None
    if recipe is not None and not request.calibrated and file_type.writes_gguf_names:
        coarse = needing_imatrix(recipe.name, {name: each.kind.name for name, each in decisions.items()})
        if coarse:
            notes.append(f"{len(coarse)} tensors get types that llama-quantize writes only with an imatrix")
    unchanged = request.to is None and not request.plan.rules
    mixture = recipe.file_type if recipe else _mixture_of(checkpoint) if unchanged else None
    return Resolved(file_type, tuple(entries), decisions, recipe, mixture, runtime, tuple(notes))


def _check_any(checkpoint: Checkpoint, request: Request, decisions: Mapping[str, Decision]) -> None:
    """PlanError where no name has the number of a block, and for that no weight is calibrated, or none is
    quantized at all."""
    if not isinstance(target_of(request.to), Format) or per_block(checkpoint, lambda site: 1):
        return
    any_quantized = any(isinstance(each.kind, Format) for each in decisions.values())
    if any_quantized and not request.method.streams:
        return
    name = next((site.name for site in sites(checkpoint)), "no weight matrix")
    what = "calibrated; take --effort fast" if any_quantized else f"{request.to}; name them by rules"
    raise PlanError(
        f"{checkpoint.path}: no name has the number of a block, such as {name}: no weight would be {what}"
    )


def target_of(to: str | None) -> Recipe | Format | None:
    """The llama.cpp file type or format of `--to`; PlanError for neither."""
    if to is None:
        return None
    if to.lower() in RECIPES:
        return RECIPES[to.lower()]
    try:
        return FORMATS.get(to)
    except FormatError as error:
        near = ELSEWHERE.get(to.lower().replace("-", "_"), ())
        near = near or tuple(get_close_matches(to.lower(), sorted({*RECIPES, *FORMATS}), n=3))
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise PlanError(
            f"{to!r} is neither a file type nor a format; {hint}`fewbits formats` lists both"
        ) from error


def _mixture_of(checkpoint: Checkpoint) -> int | None:
    """llama.cpp's file type number of the input, or of its most common float type."""
    if checkpoint.mixture is not None or checkpoint.gguf_keys:
        return checkpoint.mixture
    kinds = Counter(tensor.kind for tensor in checkpoint.tensors.values() for _ in tensor.shape[1:])
    common = kinds.most_common(1)[0][0] if kinds else None
    return RECIPES[common.name].file_type if isinstance(common, DType) and common.weight else None


def _with_runtime(
    checkpoint: Checkpoint, request: Request, file_type: FileType
) -> tuple[FileType, dict[str, Any], list[str]]:
    """-> the file type with the runtime schemes, their records, and notes.

    Requested schemes must be supported, else PlanError. Schemes recorded in the input are kept if weights
    keep their formats and the file type supports them; otherwise a note is added."""
    wanted = {"activations": request.activations, "kv_cache": request.kv_cache}
    names = {kind: name for kind, name in wanted.items() if name is not None}
    whole = file_type.with_runtime(**names)
    runtime: dict[str, Any] = dict(names)
    unread = checkpoint.metadata.get("unread", ())
    notes = [*checkpoint.notes, *(f"the input: {line}" for line in unread)]
    for kind in (kind for kind in wanted if kind not in names):
        known = record_of(checkpoint.metadata, kind)
        if known is None:
            continue
        scheme = str(known["scheme"])
        try:
            if request.to or request.plan.rules:
                raise PlanError("its weights are quantized again")
            whole = file_type.with_runtime(**names, **{kind: scheme})
        except PlanError as error:
            notes.append(f"the input's {kind} in {scheme}: not kept; {error}")
        else:
            names[kind], runtime[kind] = scheme, known
    return whole, runtime, notes
