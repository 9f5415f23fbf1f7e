"""merge(): a low-rank adapter into the weights of its model, which may be packed.

    float      a float weight: W + scale B A in f32, in the type of the input
    exact      float offsets, and B A constant in their groups: offset + scale B A; codes and scales stay
    gptq       else, with a text: GPTQ towards W_q + scale B A on the grid of W_q
    nearest    else: the nearest value of that grid

    base, adapter -> the way of each weight -> a checkpoint whose other tensors are the base's -> run.py
                                            '-> KL divergence from base + adapter, beside that of rounding

Every other tensor is copied. What GPTQ chose is in memory, packed, until it is written.
Sources: QA-LoRA, arXiv 2309.14717 (a B A that group offsets hold); GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..adapters.as_loaded import as_loaded
from ..algorithms.onto_grid import onto_grid
from ..calibrate.stats import Stats
from ..calibrate.tokens import Tokens
from ..dtypes import F32
from ..errors import CalibrationError, ModelError
from ..evaluation import Settings, Text, evaluate, self_text
from ..files.adapter import WEIGHTS, Adapter, LowRank
from ..files.checkpoint import MEMORY, Checkpoint, LazyTensor
from ..formats import Distortion
from ..qtensor import QTensor
from ..release.receipt import Receipt, TensorRow
from ..storage.atomic import make_directory, write_atomic
from .adapted import check_base
from .blockwise import Streaming
from .blockwise.collect import collect
from .provenance import digest_file
from .request import Request, calibration_of
from .resolve import file_type_for
from .run import check_place, run

Progress = Callable[[str, int, int], None]
FLOAT, EXACT, GPTQ, NEAREST = "float", "exact", "gptq", "nearest"
HELD_OUT = 8  # windows at the end of a text that only judge
SCORED, CONTEXT = 2048, 512  # tokens of a text that the model writes to be judged on, and of its windows


@dataclass(frozen=True)
class MergeOptions:
    """file: file type of the output (None: that of the model, or by the suffix). tokens: text for GPTQ, whose
    last windows judge (None: no GPTQ, and the model writes a text of this seed to be judged on). streaming:
    where the model runs."""

    file: str | None = None
    tokens: Tokens | None = None
    streaming: Streaming = field(default_factory=Streaming)
    overwrite: bool = False
    seed: int = 0


def merge(
    base: Checkpoint,
    adapter: Adapter,
    out: Path,
    options: MergeOptions | None = None,
    progress: Progress | None = None,
) -> Receipt:
    """Write the model with the adapter in its weights -> the receipt; its `merged` says how and at what loss.

    Raises ModelError for an adapter of another model, CalibrationError for too little text, and what
    `convert` raises."""
    options, progress = options or MergeOptions(), progress or _silent
    base = as_loaded(base)
    adapter.check_fits(base)
    known = check_base(adapter, base)
    file = options.file or (None if out.suffix == ".gguf" else _type_of(base, out))
    file_type = file_type_for(file, out)
    check_place(base, out, file_type, options.overwrite)
    learned, held_out = _split(options.tokens)
    weights = _Weights(base, adapter)
    ways = {name: weights.way(name, learned is not None) for name in adapter.weights}
    chosen = {name: weights.lazy(name, way) for name, way in ways.items() if way != GPTQ}
    if learned is not None and GPTQ in ways.values():
        chosen |= _by_gptq(weights, ways, learned, options.streaming, out, progress)
    merged = weights.replaced(chosen)
    receipt = run(merged, out, Request(file=file, overwrite=options.overwrite), progress)
    text, context = held_out or _written(weights.unmerged, options, progress)
    models = {"kl": merged}
    if rounded := [name for name, way in ways.items() if way in (EXACT, GPTQ)]:
        models["kl_rounded"] = weights.replaced(
            chosen | {name: weights.lazy(name, NEAREST) for name in rounded}
        )
    settings = Settings(context=context, prompts=0, device=options.streaming.device)
    about = {
        "adapter": str(adapter.path),
        "sha256": digest_file(adapter.path / WEIGHTS).sha256,
        "weights": dict(Counter(ways.values())),
        "text": text.source,
        **_divergences(weights.unmerged, models, text, settings, progress),
    }
    receipt = replace(
        receipt,
        tensors=tuple(_row(row, weights, merged, ways) for row in receipt.tensors),
        merged=about,
        calibration=calibration_of(Request(tokens=learned)),
        notes=(*receipt.notes, *([known] if known else ()), _note(about)),
    )
    write_atomic(file_type.receipt_path(out), receipt.to_json().encode())
    return receipt


# ---- weights -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """The weights that an adapter adds to, each in every way in which it can be merged."""

    base: Checkpoint
    adapter: Adapter

    def way(self, name: str, has_text: bool) -> str:
        value = self.base.tensors[name].load()
        if isinstance(value, torch.Tensor):
            return FLOAT
        if shifted(value, self.adapter.weights[name]) is not None:
            return EXACT
        return GPTQ if has_text else NEAREST

    def target(self, name: str) -> torch.Tensor:
        """W + scale B A, f32."""
        value = self.base.tensors[name].load()
        w = value.decode() if isinstance(value, QTensor) else value.float()
        return w + self.adapter.weights[name].product()

    def merged(self, name: str, way: str, stats: Stats | None = None) -> torch.Tensor | QTensor:
        value = self.base.tensors[name].load()
        if isinstance(value, torch.Tensor):
            return self.target(name).to(value.dtype)
        if way == EXACT and (moved := shifted(value, self.adapter.weights[name])) is not None:
            return moved
        return onto_grid(self.target(name), value, stats)

    def lazy(self, name: str, way: str) -> LazyTensor:
        """The merged weight, computed whenever it is read."""
        return replace(self.base.tensors[name], file=MEMORY, load=partial(self.merged, name, way))

    def replaced(self, changed: Mapping[str, LazyTensor]) -> Checkpoint:
        return replace(self.base, tensors={**self.base.tensors, **changed})

    @property
    def unmerged(self) -> Checkpoint:
        """The base whose weights are W + scale B A in f32: what base and adapter compute together."""
        sums = {}
        for name, added in self.adapter.weights.items():
            n, k = added.shape
            sums[name] = LazyTensor(name, (n, k), F32, 4 * n * k, MEMORY, partial(self.target, name))
        return self.replaced(sums)


def shifted(q: QTensor, added: LowRank) -> QTensor | None:
    """The same codes and scales with offsets that hold W_q + scale B A, up to the rounding of offsets as they
    are stored; None where the format has no offset of its own for each row and group, or B A is not constant
    in its groups."""
    n, k = q.shape
    grid, codes = q.format.unpack(q)
    offset, parameters = grid.groups(n)[1], grid.parameters()
    name = next((each for each in ("offset", "m") if each in parameters), None)
    if offset is None or name is None or parameters[name].shape != offset.shape:
        return None
    columns = grid.members(k)
    first = torch.cat([torch.arange(k)[inside][:1] for inside in columns])
    a = added.a[:, first]
    if not torch.equal(grid.spread(a, k), added.a):
        return None
    moved = offset + added.scale * (added.b @ a)
    return q.format.pack(grid.replaced({**parameters, name: moved}), codes)


def _by_gptq(
    weights: _Weights, ways: dict[str, str], text: Tokens, streaming: Streaming, out: Path, progress: Progress
) -> dict[str, LazyTensor]:
    """The weights whose way is GPTQ, by statistics of the unmerged model; those that no token reached are
    rounded to nearest, and `ways` says so."""
    wanted = [name for name, way in ways.items() if way == GPTQ]
    chosen = {}
    make_directory(out.parent)
    with tempfile.TemporaryDirectory(".parts", f".{out.name[:64]}.", out.parent) as parts:
        seen = collect(weights.unmerged, text, streaming, Path(parts), True, progress)
        for done, name in enumerate(wanted):
            progress("gptq", done, len(wanted))
            stats = seen.of(name)
            ways[name] = NEAREST if stats is None else GPTQ
            q = weights.merged(name, ways[name], stats)
            chosen[name] = replace(weights.base.tensors[name], file=MEMORY, load=partial(_same, q))
    return chosen


def _same(value: torch.Tensor | QTensor) -> torch.Tensor | QTensor:
    return value


def _type_of(base: Checkpoint, out: Path) -> str:
    suffix = base.file_type.suffix
    if suffix:
        raise ModelError(
            f"{base.path} is one file: name a {suffix} file in place of {out}, or a type (--file)"
        )
    return base.file_type.name


# ---- the loss ------------------------------------------------------------------------------------


def _split(tokens: Tokens | None) -> tuple[Tokens | None, tuple[Text, int] | None]:
    """A text -> what GPTQ sees; what judges, and the tokens of a window."""
    if tokens is None:
        return None, None
    windows = tokens.windows
    if len(windows) <= HELD_OUT:
        raise CalibrationError(
            f"{tokens.source}: {len(windows)} windows, more than {HELD_OUT} are needed, since these are held "
            "out to measure the loss; give more text (--tokens), or a smaller --context"
        )
    learned = Tokens.of(windows[:-HELD_OUT], tokens.source, tokens.notes)
    return learned, (Text(windows[-HELD_OUT:].flatten(), tokens.source), windows.shape[1])


def _written(unmerged: Checkpoint, options: MergeOptions, progress: Progress) -> tuple[Text, int]:
    """Text of the unmerged model, where none is given, and the tokens of a window."""
    context = min(CONTEXT, unmerged.text_config.get("max_position_embeddings") or CONTEXT)
    return self_text(unmerged, SCORED, options.seed, context, progress), context


def _divergences(
    unmerged: Checkpoint,
    models: Mapping[str, Checkpoint],
    text: Text,
    settings: Settings,
    progress: Progress,
) -> dict[str, Any]:
    """Mean KL divergence of each model from the unmerged one, and its standard error."""
    found = evaluate(unmerged, list(models.values()), text, settings, progress=progress)
    figures: dict[str, Any] = {"tokens": found.tokens_scored}
    for name, scores in zip(models, found.quantized_models, strict=True):
        assert scores.fidelity is not None
        figures |= {name: scores.fidelity.kl.value, f"{name}_error": scores.fidelity.kl.error}
    return figures


def _row(row: TensorRow, weights: _Weights, merged: Checkpoint, ways: Mapping[str, str]) -> TensorRow:
    """The receipt's row of a merged weight: its way, and its distance from W + scale B A."""
    if row.name not in ways:
        return row
    got = merged.tensors[row.name].load()
    value = got.decode() if isinstance(got, QTensor) else got.float()
    lost = Distortion.between(weights.target(row.name), value)
    return replace(
        row, algorithm=f"merged ({ways[row.name]})", relative_error=lost.relative_error,
        sqnr_db=lost.sqnr_db, max_abs_error=lost.largest,
    )  # fmt: skip


def _note(about: Mapping[str, Any]) -> str:
    how = ", ".join(f"{count} {way}" for way, count in about["weights"].items())
    text = f"merged {about['adapter']} ({how} weights): KL divergence from the unmerged model "
    text += f"{about['kl']:.4g} +- {about['kl_error']:.2g}"
    if "kl_rounded" in about:
        text += f", rounded to nearest {about['kl_rounded']:.4g} +- {about['kl_rounded_error']:.2g}"
    return f"{text}, over {about['tokens']} tokens of {about['text']}"


def _silent(stage: str, done: int, total: int) -> None:
    pass
