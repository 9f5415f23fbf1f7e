"""A checkpoint as transformers loads it: the model's class says what its names, ties and defaults are.

    config.json       fields that it leaves to the class get the class's values: rope_theta, head_dim ...
    lm_head.weight    tied, but stored with other values: both are kept, as transformers does
    _orig_mod.        parts of names that wrappers of training add are dropped
    mtp.*, inv_freq   what the class does not have is set aside: kept as it is, and not run

A model that transformers cannot build stays as it is on disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch

from ..errors import ModelError, raise_all
from ..files.checkpoint import Checkpoint, LazyTensor
from ..model.archs import architecture, check_values, every_name
from ..model.sites import Seen
from .conversion import split_joined
from .exported import graph_of
from .observed import seen_in
from .transformers import classes_of, default_fields, empty_model, model_config, tensors_in

_ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer)\b")
_NUMBERED = re.compile(r"(.+?)\.(\d+)\.(.+)")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Class:
    """What a class has. names: of its tensors, experts one by one. shapes: those that are known. tied:
    name -> the name whose weight it shares. prefix: of all names but the head's. seen: what its modules say
    of each tensor."""

    name: str
    names: Set[str]
    shapes: Shapes
    tied: Mapping[str, str]
    prefix: str = ""
    seen: Mapping[str, Seen] = field(default_factory=dict)


def as_loaded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the names, ties and defaults of its transformers class, and notes of what changed.

    ModelError lists the tensors whose shape the class does not have, and names adapters that are not merged.
    """
    if checkpoint.as_loaded or checkpoint.gguf_keys or not checkpoint.config:
        return checkpoint
    found = _as_loaded(checkpoint)
    return replace(found, graph=cache(partial(graph_of, found)))


def _as_loaded(checkpoint: Checkpoint) -> Checkpoint:
    _check_adapters(checkpoint)
    found = (_as_class(each) for each in _with_class(checkpoint))
    return next((each for each in found if each is not None), replace(checkpoint, as_loaded=True))


def _with_class(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """The checkpoint; where config.json names no class, with each that its model type may have."""
    if checkpoint.config.get("architectures"):
        yield checkpoint
        return
    for name in classes_of(str(checkpoint.config.get("model_type"))):
        note = f"config.json names no architecture: it is read as {name}"
        config = {**checkpoint.config, "architectures": [name]}
        yield replace(checkpoint, config=config, notes=(*checkpoint.notes, note))


def _as_class(checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint as the class of its config has it; None if that cannot be built, or has more tensors."""
    given = checkpoint.config
    try:
        checkpoint = replace(checkpoint, config=_with_defaults(model_config(checkpoint), given))
        cls = _known_class(checkpoint)
        if cls is None:
            cls, checkpoint = _class_of(checkpoint)
    except Exception:  # noqa: BLE001  transformers may fail in any way; whoever runs the model says how
        return None
    tensors, notes = _renamed(checkpoint, cls)
    if cls.names - cls.tied.keys() - tensors.keys():  # what is missing is listed where it is needed
        return None
    wrong = [
        f"tensor {name!r} is {tensor.shape}, {cls.name} with this config.json has {cls.shapes[name]}"
        for name, tensor in tensors.items()
        if tensor.shape != cls.shapes.get(name, tensor.shape)
    ]
    raise_all(ModelError, str(checkpoint.path), wrong)
    config = dict(checkpoint.config)
    for target, source in cls.tied.items():
        if target in tensors and source in tensors and not _equal(tensors[target], tensors[source]):
            config["tie_word_embeddings"] = False
            notes += [
                f"config.json says tie_word_embeddings, but {target} and {source} differ: both are kept, and "
                "the output's config.json says false"
            ]
    if "lm_head.weight" in tensors and not cls.tied:
        config["tie_word_embeddings"] = False  # whatever it says, the class has no copy
    aside = [name for name in tensors if name not in cls.names]
    _check_depth(checkpoint, cls, aside)
    if aside:
        notes += [
            f"{len(aside)} tensors that {cls.name} does not have, such as {aside[0]}, stay as they are; a "
            "GGUF file is written without them"
        ]
    notes = [*checkpoint.notes, *notes]
    return replace(
        checkpoint,
        tensors=tensors,
        config=config,
        aside=frozenset(aside),
        notes=tuple(notes),
        as_loaded=True,
        seen=cls.seen,
    )


def _check_depth(checkpoint: Checkpoint, cls: _Class, aside: Sequence[str]) -> None:
    """ModelError for blocks that config.json does not count, though they are like those of the model."""
    inside, beyond = _by_block(cls.names), _by_block(aside)
    known = {(path, frozenset(parts)) for (path, _), parts in inside.items()}
    more = [place for place, parts in beyond.items() if (place[0], frozenset(parts)) in known]
    if more:
        path, number = more[0]
        count = sum(place[0] == path for place in inside)
        raise ModelError(
            f"{checkpoint.path}: with this config.json {cls.name} has {count} blocks {path}, but the file "
            f"has {path}.{number} too; mend the number of layers in config.json, or leave these tensors out"
        )


def _by_block(names: Iterable[str]) -> dict[tuple[str, str], set[str]]:
    """(path of a list, number) -> what follows in the names of its tensors."""
    found: dict[tuple[str, str], set[str]] = {}
    for name in names:
        if match := _NUMBERED.match(name):
            found.setdefault((match[1], match[2]), set()).add(match[3])
    return found


def _with_defaults(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """config.json with what it leaves to the classes of the model and of the language model in it."""
    filled = given | default_fields(config, given)
    text = given.get("text_config")
    if isinstance(text, dict):
        filled["text_config"] = text | default_fields(config.get_text_config(), text)
    return filled


def _known_class(checkpoint: Checkpoint) -> _Class | None:
    """The class of an architecture in archs.toml, if the checkpoint has exactly its weights: the usual case,
    for which no class is imported."""
    arch, config = architecture(checkpoint.config), checkpoint.config
    if arch is None:
        return None
    check_values(arch, config)
    table, _, output = arch.ends
    tied = {output: table} if config.get("tie_word_embeddings") else {}
    weights = {name for name in every_name(arch, config) if name.endswith(".weight")}
    if checkpoint.tensors.keys() - weights or weights - checkpoint.tensors.keys() - tied.keys():
        return None
    shape = (config["vocab_size"], config["hidden_size"])
    return _Class(arch.name, weights, {table: shape, output: shape}, tied)


def _class_of(checkpoint: Checkpoint) -> tuple[_Class, Checkpoint]:
    """The class that transformers has for the checkpoint, and this with joined tensors in their parts."""
    model = empty_model(checkpoint)
    tensors, notes = split_joined(model, checkpoint.tensors)
    checkpoint = replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, *notes))
    shapes: Shapes = {}
    state = model.state_dict()
    made_of_all = tensors_in(model, replace(checkpoint, tensors={}))
    for key, made_of in made_of_all.items():
        shapes |= {name: tuple(place.of(state[key]).shape) for name, place in made_of.items()}
    tied = {  # the model's keys -> names in files
        next(iter(made_of_all[copy])): next(iter(made_of_all[key]))
        for copy, key in model.all_tied_weights_keys.items()
        if copy in made_of_all and key in made_of_all
    }
    try:
        seen = seen_in(model, made_of_all)
    except ModelError:  # whoever runs the blocks says why they cannot be told
        seen = {}
    found = _Class(type(model).__name__, shapes.keys(), shapes, tied, model.base_model_prefix, seen)
    return found, checkpoint


def _check_adapters(checkpoint: Checkpoint) -> None:
    found = [name for name in checkpoint.tensors if _ADAPTER.search(name)]
    if found:
        raise ModelError(
            f"{checkpoint.path}: {len(found)} tensors belong to a LoRA adapter, such as {found[0]!r}; merge "
            "it first: peft's model.merge_and_unload().save_pretrained(DIR), then give DIR"
        )


def _renamed(checkpoint: Checkpoint, cls: _Class) -> tuple[dict[str, LazyTensor], list[str]]:
    """The tensors under the model's names, if a change of theirs gives every one of these: parts dropped that
    are in no name of the model, the prefix added that a model without head lacks, a tied output as table."""
    tensors, tied = checkpoint.tensors, cls.tied
    missing = cls.names - tensors.keys()
    if not missing - tied.keys():
        return dict(tensors), []
    parts = {part for name in cls.names for part in name.split(".")}
    by_dropped: dict[
        tuple[str, ...], dict[str, str]
    ] = {}  # a vision tower lacks other parts than the decoder
    for name in tensors.keys() - cls.names:
        dropped = tuple(part for part in name.split(".") if part not in parts)
        kept = ".".join(part for part in name.split(".") if part in parts)
        new = next((new for new in (kept, f"{cls.prefix}.{kept}") if new in missing), name)
        by_dropped.setdefault(dropped, {})[name] = new
    every = {name: new for changes in by_dropped.values() for name, new in changes.items()}
    for changes in (every, *sorted(by_dropped.values(), key=len, reverse=True)):
        names = {name: changes.get(name, name) for name in tensors}
        for target, source in tied.items():
            if source not in names.values() and target in names.values():
                names = {name: source if new == target else new for name, new in names.items()}
        found = set(names.values())
        if missing - tied.keys() <= found and len(found) == len(names):
            first = next(name for name, new in names.items() if new != name)
            note = f"tensors are named as transformers names them: {first} is {names[first]}"
            return {new: replace(tensors[name], name=new) for name, new in names.items()}, [note]
    return dict(tensors), []


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors have the same values; a quantized one is a copy of its table."""
    if a.quantized or b.quantized:
        return True
    x, y = a.load(), b.load()
    assert isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    return all(torch.equal(p.float(), q.float()) for p, q in zip(x.split(1024), y.split(1024), strict=True))
