"""What a file type cannot carry as it is: the same values in a kindred format, or quantized again.

    q4_0 -> gptq        int4_g32, the same numbers (formats/lossless.py), seen by trying on every weight
    q4_k -> gptq        refused; with requantize the carried format of most like bits, its error told
    a table             most layouts are of linear weights alone: decoded, with requantize

Only weights that come quantized, and were to stay as they are, change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..errors import FewbitsError, PlanError, raise_all
from ..files.checkpoint import Checkpoint
from ..formats import FLOATS, FORMATS
from ..formats.base import Format
from ..formats.lossless import convert_lossless, lossless_equivalents
from ..model.archs import GGUFEntry
from ..model.sites import sites
from ..qtensor import QTensor
from .choices import Decision

Refusal = Callable[[Format], str | None]


def carried(
    checkpoint: Checkpoint,
    entries: Sequence[GGUFEntry],
    decisions: Mapping[str, Decision],
    refusal: Refusal,
    requantize: bool,
    tables: bool = True,
) -> dict[str, Decision]:
    """Decisions whose format the file type carries, as far as there are any; the others as they were.

    tables: may tables of embeddings be quantized? PlanError names those that are to be and may not.
    """
    found, faults = dict(decisions), []
    embedded = {site.name for site in sites(checkpoint) if site.role in ("embed", "position")}
    for entry in entries:
        decision = decisions[entry.name]
        sources = [checkpoint.tensors[name] for name in entry.sources]
        if not tables and embedded & set(entry.sources) and _coded(decision.format):
            if requantize:
                dtype = _float_of(checkpoint)
                found[entry.name] = Decision(dtype, dtype, f"decoded, from {decision.format}")
            else:
                faults.append(
                    f"{entry.sources[0]} is {decision.format}, this file type has quantized linear weights "
                    f"only: leave it in float with a rule, {entry.sources[0]}=bf16, or, in convert, pass "
                    "--requantize"
                )
            continue
        if not any(source.quantized and source.dtype == decision.format for source in sources):
            continue
        if refusal(FORMATS.get(decision.format)) is None:
            continue
        for name in lossless_equivalents(decision.format):
            if refusal(FORMATS.get(name)) is None and _exact(checkpoint, entry, name):
                found[entry.name] = Decision(name, name, f"the same values as {decision.format}", exact=True)
                break
        else:
            if requantize:
                near = nearest(decision.format, refusal, sources[0].shape) or _float_of(checkpoint)
                how = "decoded" if near in FLOATS else "quantized again"
                found[entry.name] = Decision(near, near, f"{how}, from {decision.format}")
    raise_all(PlanError, str(checkpoint.path), faults)
    return found


def _coded(kind: str) -> bool:
    return kind not in FLOATS and kind in FORMATS


def _float_of(checkpoint: Checkpoint) -> str:
    """The dtype of the model's floats, as its config says."""
    config = checkpoint.config
    said = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return {"float32": "f32", "float16": "f16"}.get(said, "bf16")


def nearest(format: str, refusal: Refusal, shape: tuple[int, ...]) -> str | None:
    """The carried format that takes the shape and has most like bits per weight; rather more than less."""
    n, k = shape[-2:]
    wanted = FORMATS.get(format).bits_per_weight(n, k)

    def distance(name: str) -> tuple[bool, float]:
        bits = FORMATS.get(name).bits_per_weight(n, k)
        return bits < wanted, abs(float(bits - wanted))

    fits = [
        name
        for name in FORMATS
        if name not in FLOATS
        and FORMATS.get(name).ordered is None
        and refusal(FORMATS.get(name)) is None
        and _takes(FORMATS.get(name), n, k)
    ]
    return min(fits, key=distance, default=None)


def way(format: str, refusal: Refusal) -> str | None:
    """How a file type holds a format: "itself"; another that may have the very same values, "as q4_0", with
    a ? where that depends on the numbers; None."""
    if refusal(FORMATS.get(format)) is None:
        return "itself"
    names = [name for name in lossless_equivalents(format) if refusal(FORMATS.get(name)) is None]
    if not names:
        return None
    sample = FORMATS.get(format).encode(*_sample())
    for name in names:
        if convert_lossless(sample, FORMATS.get(name)) is not None:
            return f"as {name}"
    return f"as {names[0]}?"


def _sample() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights off centre, so that zero points and minima differ from group to group, and importance that
    does not fall with the columns."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(32, 1024, generator=generator) + torch.randn(32, 1, generator=generator)
    return w, torch.rand(1024, generator=generator)


def _takes(format: Format, n: int, k: int) -> bool:
    try:
        format.check_shape(n, k, "weight")
    except FewbitsError:
        return False
    return True


def _exact(checkpoint: Checkpoint, entry: GGUFEntry, name: str) -> bool:
    """Is every source of the entry the same in format `name`?"""
    to = FORMATS.get(name)
    for source in entry.sources:
        value = checkpoint.tensors[source].load()
        if not isinstance(value, QTensor) or convert_lossless(value, to) is None:
            return False
    return True
