"""Formats that a file type does not support: the same values in another format, or quantized again.

    q4_0 -> gptq        int4_g32, the same values (formats/lossless.py), checked on every weight
    q4_k -> gptq        refused; with requantize the nearest supported format, its error in the receipt
    an embedding        most file types quantize only linear weights: decoded, with requantize
    huggingface         floats only: everything is decoded

Only weights that are already quantized and keep their format are affected.
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
    """Decisions with formats that the file type supports, if there are any; the others are unchanged.

    No weight is read: `Decision.lossless` lists formats that may have the same values and are tried later.
    PlanError names the embeddings that this file type cannot quantize."""
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
                    f"{entry.sources[0]} is {kind.name}, this file type quantizes linear weights only; "
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
            if file_type.fits(other, shape)  # blocks of the other format may not divide the row
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
    """Decisions after `lossless` formats were tried on the weights: the first with the same values, else the
    decision without them."""
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
    """How a file type supports a format: "yes"; "as q4_0" for another format with the same values, with a ?
    if that depends on the values; None."""
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
    """Decoded to the dtype of the model's floats, from its config."""
    config = checkpoint.config
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    plain = {"float32": F32, "float16": F16}.get(dtype, BF16)
    return Decision(plain, plain, f"decoded, from {kind.name}")


def _sample() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with different zero points and offsets in each group, and importance that does not fall with
    the columns."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 1024, generator=generator) + torch.randn(32, 1, generator=generator)
    return w, torch.rand(1024, generator=generator)


def _exact(checkpoint: Checkpoint, entry: GGUFEntry, to: Format) -> bool:
    """Whether every source of the entry has the same values in format `to`."""
    for source in entry.sources:
        value = checkpoint.tensors[source].load()
        if not isinstance(value, QTensor) or convert_lossless(value, to) is None:
            return False
    return True
