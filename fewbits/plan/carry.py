"""What a file type cannot carry as it is: the same values in another format, or quantized again.

    q4_0 -> gptq        int4_g32, the same numbers (formats/lossless.py), seen by trying on every weight
    q4_k -> gptq        refused; with requantize the nearest that is carried, its error in the receipt
    a table             most file types quantize linear weights alone: decoded, with requantize
    huggingface         floats only: everything is decoded, which is what was asked for

Only weights that come quantized, and were to stay as they are, change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..dtypes import BF16, F16, F32, DType
from ..errors import PlanError, raise_all
from ..files.checkpoint import Checkpoint
from ..files.filetype import FileType
from ..formats.base import FORMATS, Format
from ..formats.lossless import convert_lossless, lossless_equivalents
from ..lazy import torch
from ..model.archs import GGUFEntry
from ..model.sites import sites
from ..qtensor import QTensor
from .choices import Decision


def carried(
    checkpoint: Checkpoint,
    entries: Sequence[GGUFEntry],
    decisions: Mapping[str, Decision],
    file_type: FileType,
    requantize: bool,
) -> dict[str, Decision]:
    """Decisions whose format the file type carries, as far as there are any; the others as they were.

    No weight is read: where the same values may fit another format, `Decision.lossless` has what is to be
    tried. PlanError names the tables that are to be quantized and may not.
    """
    result, faults = dict(decisions), []
    tables = {site.name for site in sites(checkpoint) if site.role in ("embed", "position")}
    decode = requantize or not file_type.carries_formats
    for entry in entries:
        decision, sources = decisions[entry.name], [checkpoint.tensors[name] for name in entry.sources]
        kind = decision.kind
        if not isinstance(kind, Format):
            continue
        if not file_type.tables and tables & set(entry.sources):
            if decode:
                result[entry.name] = _decoded(checkpoint, kind)
            else:
                faults.append(
                    f"{entry.sources[0]} is {kind.name}, this file type has quantized linear weights only: "
                    f"leave it in float with a rule, {entry.sources[0]}=bf16, or, in convert, pass "
                    "--requantize"
                )
            continue
        shape = (
            (sources[0].shape[-2], sources[0].shape[-1]) if sources and len(sources[0].shape) > 1 else (1, 1)
        )
        if not any(source.kind == kind for source in sources) or file_type.reason(kind) is None:
            continue
        same = tuple(
            other
            for other in map(FORMATS.get, lossless_equivalents(kind.name))
            if file_type.fits(other, shape)  # what it names may not be whole there
        )
        again = decode
        if again:
            near = file_type.nearest(kind, shape)
            result[entry.name] = (
                _decoded(checkpoint, kind)
                if isinstance(near, DType)
                else Decision(near, near, f"quantized again, from {kind.name}")
            )
        if same:
            result[entry.name] = replace(result[entry.name], lossless=same)
    raise_all(PlanError, str(checkpoint.path), faults)
    return result


def settled(
    checkpoint: Checkpoint, entries: Sequence[GGUFEntry], decisions: Mapping[str, Decision]
) -> dict[str, Decision]:
    """Decisions with `lossless` formats tried on the weights themselves: the first that holds every value,
    else what was decided without."""
    result = dict(decisions)
    for entry in entries:
        decision = decisions[entry.name]
        if not decision.lossless:
            continue
        source = checkpoint.tensors[entry.sources[0]].kind.name
        exact = next((to for to in decision.lossless if _exact(checkpoint, entry, to)), None)
        result[entry.name] = (
            replace(decision, lossless=())
            if exact is None
            else Decision(exact, exact, f"the same values as {source}", lossless=(exact,))
        )
    return result


def carries_as(file_type: FileType, format: Format) -> str | None:
    """How a file type holds a format: "yes"; another that may have the very same values, "as q4_0", with a ?
    where that depends on the numbers; None."""
    if file_type.reason(format) is None:
        return "yes"
    others = [
        other
        for other in map(FORMATS.get, lossless_equivalents(format.name))
        if file_type.reason(other) is None
    ]
    if not others:
        return None
    sample = format.encode(*_sample())
    exact = next((other.name for other in others if convert_lossless(sample, other) is not None), None)
    return f"as {exact}" if exact else f"as {others[0].name}?"


def _decoded(checkpoint: Checkpoint, kind: Format) -> Decision:
    """In the dtype of the model's floats, as its config says."""
    config = checkpoint.config
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    plain = {"float32": F32, "float16": F16}.get(dtype, BF16)
    return Decision(plain, plain, f"decoded, from {kind.name}")


def _sample() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights off centre, so that zero points and minima differ from group to group, and importance that
    does not fall with the columns."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 1024, generator=generator) + torch.randn(32, 1, generator=generator)
    return w, torch.rand(1024, generator=generator)


def _exact(checkpoint: Checkpoint, entry: GGUFEntry, to: Format) -> bool:
    """Is every source of the entry the same in format `to`?"""
    for source in entry.sources:
        value = checkpoint.tensors[source].load()
        if not isinstance(value, QTensor) or convert_lossless(value, to) is None:
            return False
    return True
