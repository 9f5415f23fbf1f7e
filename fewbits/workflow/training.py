"""Quantization-aware training of a loaded model by anybody's loop: prepare_qat(), export().

model = AutoModelForCausalLM.from_pretrained(path)
fewbits.prepare_qat(model, "q4_0")       its linear weights become float weights that each pass rounds
Trainer(model, ...).train()
fewbits.export(model, "model.gguf")      the weights of the last pass, in any file type
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..activations.integer import IntegerLinear, IntegerModule
from ..activations.observers import Histogram
from ..activations.quantizers import SCHEMES, Quantizer
from ..activations.record import RULE
from ..errors import CalibrationError, ModelError, raise_all
from ..files.checkpoint import MEMORY, Checkpoint, LazyTensor
from ..files.open import open_checkpoint
from ..formats.base import Format
from ..plan import Plan
from ..plan.mixtures import RECIPES
from ..qtensor import QTensor
from ..release.receipt import Receipt
from ..runtime.load import model_checkpoint
from ..train.inputs import FakeInput
from ..train.rounding import spacing_of
from ..train.ste import LatentLinear
from .blockwise import TRAINED
from .in_place import asked_for, decisions_of
from .quantize import clean
from .request import Request
from .resolve import file_type_for
from .run import run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTRIBUTE = "fewbits_training"
INTEGER = ("int8_static", "int8_asymmetric_static")


@dataclass(frozen=True)
class Prepared:
    """What a model was prepared for: a type, rules, the format of each module's weight, and the scheme of
    activations."""

    to: str | None
    plan: Plan
    formats: dict[str, Format]
    activations: str | None = None


@torch.no_grad()
def prepare_qat(
    model: PreTrainedModel,
    to: str | Plan,
    plan: Plan | None = None,
    activations: str | None = None,
    tokens: torch.Tensor | None = None,
    outputs: bool = False,
) -> PreTrainedModel:
    """Put fake quantization into the linear layers of a float model's blocks, in place; returns the model.

    to: a format, a llama.cpp file type, or a Plan. plan: rules that precede `to`. Each weight `(n, k)`
    becomes a parameter `latent` in f32, which every pass rounds to its format; gradients pass straight
    through. Scales and offsets are parameters too, as multiples of their size at the start (LSQ, arXiv
    1902.08153, without its factor, which Adam undoes). Tables and the output layer stay in float until
    `export`.

    activations: the scheme of the inputs of these layers, in each pass too; the steps of a static one start
    at what `tokens` `(w, t)` int64 show, and are trained. outputs: their outputs too, by the same scheme, so
    that `integer_only` can do without floats inside them.

    Errors: PlanError, FormatError; CalibrationError for a static scheme without tokens; ModelError for a
    model that is prepared already, or whose weights belong to modules that are no plain linear layers.

        >>> model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
        >>> model = fewbits.prepare_qat(model, "q4_0")
        >>> loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
        >>> loss.backward()
        >>> receipt = fewbits.export(model, out.with_suffix(".gguf"))
        >>> {row.format for row in receipt.tensors if "up_proj" in row.name}
        {'q4_0'}
    """
    if hasattr(model, ATTRIBUTE):
        raise ModelError(f"{type(model).__name__} is prepared already; export it, or load it again")
    asked, rules = asked_for(to, plan)
    formats = _formats(model, asked, rules)
    inputs = ranges_of(model, formats, activations, tokens, outputs)
    for path, format in formats.items():
        linear = _latent(model.get_submodule(path), format, positive=outputs)
        linear.input, linear.output = inputs.get(path, (None, None))
        linear.relative()
        model.set_submodule(path, linear)
    setattr(model, ATTRIBUTE, Prepared(asked, rules, formats, activations))
    return model


def _formats(model: Any, asked: str | None, rules: Plan) -> dict[str, Format]:
    """Linear layer of a block -> the format of its weight; ModelError for weights of other modules."""
    names, checkpoint = model_checkpoint(model)
    formats: dict[str, Format] = {}
    faults = []
    for name, decision in decisions_of(checkpoint, asked, rules).items():
        path = names[name].removesuffix(".weight")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            faults.append(f"{path} holds experts together, no linear layer; leave it out by a rule")
            continue
        if not isinstance(decision.kind, Format) or isinstance(module, nn.Embedding):
            continue
        if type(module) is not nn.Linear:
            faults.append(
                f"{path} is a {type(module).__name__}, no plain linear layer; leave it out by a rule"
            )
            continue
        if module.weight is model.get_input_embeddings().weight or module is model.get_output_embeddings():
            continue
        formats[path] = decision.kind
    raise_all(ModelError, type(model).__name__, faults)
    return formats


def _latent(linear: Any, format: Format, positive: bool) -> LatentLinear:
    """positive: its scales are, since a multiplier of integers is."""
    w = linear.weight.detach().float().clone()
    grid, _ = format.unpack(format.encode(w))
    if positive and "scale" in grid.parameters():
        grid = grid.replaced({**grid.parameters(), "scale": grid.parameters()["scale"].abs()})
    return LatentLinear(grid, w, spacing_of(grid, w), linear.bias)


def ranges_of(
    model: Any, paths: Iterable[str], name: str | None, tokens: torch.Tensor | None, outputs: bool
) -> dict[str, tuple[FakeInput, FakeInput | None]]:
    """What quantizes in- and output of each module; a static scheme covers what it sees of the tokens."""
    if name is None:
        return {}
    scheme = SCHEMES.get(name)
    if tokens is not None:
        _check_tokens(tokens, model.get_input_embeddings().weight.shape[0])
    seen: dict[tuple[str, bool], Histogram] = {}
    if not scheme.dynamic:
        if tokens is None:
            raise CalibrationError(f"{name}: its ranges come from a text; give tokens, or use int8_dynamic")
        seen = _histograms(model, paths, tokens)

    def made(path: str, out: bool) -> FakeInput:
        affine = seen[path, out].affine(scheme, RULE) if seen else None
        return FakeInput(Quantizer(scheme, affine), model.device)

    return {path: (made(path, False), made(path, True) if outputs else None) for path in paths}


def _check_tokens(tokens: torch.Tensor, vocabulary: int) -> None:
    fits = tokens.ndim == 2 and tokens.dtype == torch.int64 and tokens.numel() > 0
    if not fits or not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise CalibrationError(
            f"tokens are {tuple(tokens.shape)} {tokens.dtype}; windows (w, t) int64 below {vocabulary}, the "
            "size of the vocabulary, are needed"
        )


def _histograms(model: Any, paths: Iterable[str], tokens: torch.Tensor) -> dict[tuple[str, bool], Histogram]:
    """(module, whether it is of its output) -> what it sees."""
    seen: dict[tuple[str, bool], Histogram] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            for out, x in ((False, given[0]), (True, y)):
                found = Histogram.of(x)
                seen[path, out] = seen[path, out] + found if (path, out) in seen else found

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(watch(path)) for path in paths]
    try:
        for window in tokens:
            model(input_ids=window[None].to(model.device), use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


@torch.no_grad()
def integer_only(model: PreTrainedModel) -> PreTrainedModel:
    """The linear layers of a model that `prepare_qat` prepared, in integer arithmetic, in place: int8 in and
    out, int32 between, no floats (Jacob et al., arXiv 1712.05877). Their integers are the model's state.

    ModelError unless it was prepared for int8 rows, a static int8 scheme, and outputs.

        >>> model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
        >>> tokens = torch.arange(32)[None]
        >>> scheme = "int8_asymmetric_static"
        >>> model = fewbits.prepare_qat(model, "int8_channel", None, scheme, tokens, outputs=True)
        >>> model = fewbits.integer_only(model)
        >>> model.model.layers[0].mlp.up_proj.weight.dtype
        torch.int8
    """
    prepared = getattr(model, ATTRIBUTE, None)
    formats = {} if prepared is None else prepared.formats
    for path, format in formats.items():
        module = model.get_submodule(path)
        assert isinstance(module, LatentLinear)
        fits = format.name == "int8_channel" and module.input is not None and module.output is not None
        if not fits or module.input.scheme.name not in INTEGER:  # type: ignore[union-attr]
            given = prepared and prepared.activations
            raise ModelError(
                f"{path}: {format.name} with {given} is not all integers; prepare it with int8_channel, "
                f"activations of {' or '.join(INTEGER)}, and outputs=True"
            )
    if not formats:
        raise ModelError(f"{type(model).__name__} has no prepared layer; call prepare_qat first")
    for path in formats:
        model.set_submodule(path, _integers(model.get_submodule(path)))
    delattr(model, ATTRIBUTE)
    return model


def _integers(module: Any) -> IntegerModule:
    grid = module.grid_now()
    codes = (grid.round(module.latent).int() - int(grid.zero)).to(torch.int8)
    x, y = module.input.affine(), module.output.affine()
    scale = grid.scale.expand(len(codes), 1)[:, 0]
    return IntegerModule(IntegerLinear.of(codes, scale, module.bias, x, y), x, y, module.input.scheme)


@torch.no_grad()
def export(
    model: PreTrainedModel,
    out: str | Path,
    file: str | None = None,
    parent: str | Path | None = None,
    overwrite: bool = False,
) -> Receipt:
    """Write a model that `prepare_qat` prepared: what its linear layers multiply with, bit for bit, and the
    others as `quantize` would, rounded to nearest. The model can be trained on.

    out, file: as for `quantize`. parent: the directory whose tokenizer and side files the output gets
    (default: that which the model was loaded from). Errors: those of `convert`; ModelError for a model that
    is not prepared, or whose parent is not a directory.
    """
    prepared = getattr(model, ATTRIBUTE, None)
    if not isinstance(prepared, Prepared):
        raise ModelError(f"{type(model).__name__} is not prepared; call prepare_qat before it is trained")
    place = Path(str(parent or model.config.name_or_path))
    if not place.exists():
        raise ModelError(f"{place}: not a directory; name the parent's, which has its tokenizer (parent=...)")
    modules = {path: model.get_submodule(path) for path in prepared.formats}
    held = {path: packed(modules[path], format) for path, format in prepared.formats.items()}
    with _plain(model, held) as (names, checkpoint):
        of_module = {names[name].removesuffix(".weight"): name for name in checkpoint.tensors}
        tensors = dict(checkpoint.tensors)
        for path, q in held.items():
            name = of_module[path]
            tensors[name] = LazyTensor(
                name, q.shape, q.format, q.nbytes, MEMORY, partial(held.__getitem__, path)
            )
        source = open_checkpoint(place)
        whole = replace(source, tensors=tensors, config=checkpoint.config, seen=checkpoint.seen)
        request = Request(to=prepared.to, plan=prepared.plan, file=file, overwrite=overwrite, requantize=True)
        mixture = (prepared.to or "").lower() in RECIPES
        if mixture and not file_type_for(file, Path(out)).writes_gguf_names:
            request = replace(request, to=None, plan=Plan())  # tables stay in float
        if prepared.activations is not None:
            said = _record(prepared.activations, {of_module[path]: m for path, m in modules.items()})
            whole = replace(whole, metadata={**whole.metadata, TRAINED: {"activations": said}})
            request = replace(request, activations=prepared.activations)
        receipt = run(whole, Path(out), request)
    clean(Path(out))
    return receipt


def _record(name: str, modules: Mapping[str, Any]) -> dict[str, Any]:
    """The record of activations of modules by their weights' names."""
    if SCHEMES.get(name).dynamic:
        return {"scheme": name, "left": []}
    affines = {weight: module.input.affine() for weight, module in modules.items()}
    ranges = {weight: [float(at.scale), int(at.zero)] for weight, at in affines.items()}
    return {"scheme": name, "left": [], "ranges": ranges}


def packed(module: nn.Module, format: Format) -> QTensor:
    """The weight that a prepared module multiplies with, on the CPU."""
    assert isinstance(module, LatentLinear)
    with torch.no_grad():
        grid = module.grid_now()
        return format.pack(grid, grid.round(module.latent)).to("cpu")


@contextmanager
def _plain(model: Any, held: dict[str, QTensor]) -> Iterator[tuple[dict[str, str], Checkpoint]]:
    """Within, the model has its linear layers back, without values -> its names, and its checkpoint."""
    modules = {path: model.get_submodule(path) for path in held}
    try:
        for path, module in modules.items():
            n, k = held[path].shape
            linear = nn.Linear(k, n, bias=module.bias is not None, device="meta", dtype=torch.bfloat16)
            linear.bias = module.bias
            model.set_submodule(path, linear)
        yield model_checkpoint(model)
    finally:
        for path, module in modules.items():
            model.set_submodule(path, module)
