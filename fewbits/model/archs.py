"""Architectures with GGUF export, read from archs.toml, and the tensor map of Hugging Face and GGUF.

    Hugging Face                                        GGUF
    model.layers.3.self_attn.q_proj.weight  (n, k)  ->  blk.3.attn_q.weight       rows reordered (llama)
    model.layers.3.mlp.experts.0..E-1.up_proj.weight -> blk.3.ffn_up_exps.weight  stacked to (e, n, k)
    model.norm.weight                               ->  output_norm.weight        plus 1 (gemma)

The inverse uses the same map: `gguf_entries` of every name that the architecture can have.
llama.cpp rotates neighbouring pairs (x0, x1), transformers rotates halves (x0, x[d/2]), so the
rows of each head of q and k are interleaved for the `llama` architecture: see `rope_rows`.
Names: `gguf.get_tensor_name_map`. Layouts: llama.cpp, conversion/*.py and src/models/*.cpp.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import ModelError, raise_all
from ..lazy import gguf, torch
from .rope import rope_factors

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_ROTATED = re.compile(r"\.([qk])_proj\.(weight|bias)$")
# LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS in llama.cpp; they also limit the work for a wrong count.
MOST = {"block_count": 512, "expert_count": 1024}
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Key:
    """One hyperparameter: a GGUF key (after `<arch>.`), its type, and its config fields."""

    name: str
    type: str
    fields: tuple[str, ...]
    optional: bool


@dataclass(frozen=True)
class Architecture:
    """One row of archs.toml, whose fields are explained at the top of that file."""

    name: str
    gguf: str
    model_type: str
    keys: tuple[Key, ...]
    blocks: tuple[str, ...]
    ends: tuple[str, ...]
    rope: tuple[str, ...]
    fixed: Mapping[str, Mapping[str, Any]]
    ignored: Mapping[str, str]
    when: tuple[str, ...] = ()
    rope_rows: bool = False
    square_attention: bool = False
    norm_offset: float = 0.0


@dataclass(frozen=True)
class GGUFEntry:
    """One GGUF tensor and its sources.

    sources: Hugging Face names, several = experts stacked in that order, none = `values` (f32).
    rows: "rope" = the rows of each of `heads` heads are interleaved (`rope_rows`). add: added in f32.
    """

    name: str
    sources: tuple[str, ...]
    rows: str | None = None
    heads: int = 0
    add: float = 0.0
    values: tuple[float, ...] = ()


@cache
def architectures() -> dict[str, Architecture]:
    """Hugging Face architecture name -> Architecture, in the order of archs.toml."""
    rows = tomllib.loads(Path(__file__).with_name("archs.toml").read_text(encoding="utf-8"))
    common = rows.pop("common")
    return {name: _architecture(name, row, common) for name, row in rows.items()}


def _architecture(name: str, row: dict[str, Any], common: dict[str, Any]) -> Architecture:
    blocks: list[str] = []
    for part in row["blocks"]:
        blocks += common[part[1:]] if part.startswith("@") else [part]
    keys = [
        Key(key, kind.rstrip("?"), tuple(fields), kind.endswith("?"))
        for key, kind, *fields in common["keys"] + row.get("keys", [])
    ]
    given = {
        field: row[field]
        for field in ("gguf", "model_type", "rope_rows", "square_attention", "norm_offset")
        if field in row
    }
    return Architecture(
        name=name,
        keys=tuple(keys),
        blocks=tuple(blocks),
        ends=tuple(row.get("ends", common["ends"])),
        rope=tuple(row["rope"]),
        fixed=row.get("fixed", {}),
        ignored=row.get("ignored", {}),
        when=tuple(row.get("when", ())),
        **given,
    )


def architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture of a Hugging Face config, or None if GGUF export does not support it."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"config.json: architectures is {str(names)[:40]!r}, not a list of names")
    known = architectures()
    kinds = {arch.model_type for arch in known.values()}
    if config.get("model_type", "") not in ("", *kinds):  # another model that uses one of these classes
        return None
    return next((known[name] for name in names if name in known), None)


def require_architecture(config: Mapping[str, Any]) -> Architecture:
    """`architecture(config)`, checked: ModelError naming the missing parts of GGUF export."""
    arch = architecture(config)
    if arch is None:
        name = ", ".join(config.get("architectures") or ["(config.json names no architecture)"])
        raise ModelError(
            f"{name}: GGUF export does not know this architecture: its hyperparameter keys, tensor layout "
            f"and rotary order are missing from archs.toml; known: {', '.join(architectures())}. "
            "The native directory holds any architecture: write that instead (--file native)"
        )
    check_config(arch, config)
    return arch


def check_values(arch: Architecture, config: Mapping[str, Any]) -> None:
    """ModelError listing each hyperparameter of a wrong type, or above its limit."""
    faults = []
    for key in arch.keys:
        for field in key.fields:
            value = config.get(field)
            most = MOST.get(key.name, 2**32 - 1)
            if value is None or (key.optional and not value):
                continue
            if key.type == "u32" and not (type(value) is int and 0 < value <= most):
                faults.append(f"{field} is {str(value)[:40]!r}, not a whole number from 1 to {most}")
            if key.type == "f32" and not (type(value) in (int, float) and isfinite(value)):
                faults.append(f"{field} is {str(value)[:40]!r}, not a number")
    raise_all(ModelError, f"{arch.name}: hyperparameters", faults)


def check_complete(arch: Architecture, config: Mapping[str, Any], names: Collection[str]) -> None:
    """ModelError listing each weight of the architecture that a checkpoint lacks."""
    check_values(arch, config)
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    faults = [
        f"tensor {name!r} is missing; fetch the checkpoint again"
        for name in every_name(arch, config)
        if name.endswith(".weight") and name not in names and name not in tied
    ]
    raise_all(ModelError, arch.name, faults)


def check_config(arch: Architecture, config: Mapping[str, Any]) -> None:
    """ModelError listing each config field that llama.cpp would read differently."""
    check_values(arch, config)
    fields = complete(config)
    faults = []
    for key in arch.keys:
        if not key.optional and all(fields.get(field) is None for field in key.fields):
            faults.append(
                f"config field {' or '.join(key.fields)} is missing (GGUF key {arch.gguf}.{key.name})"
            )
    for field, rule in arch.fixed.items():
        value = fields.get(field)
        value = rule.get("absent", rule["is"]) if value is None else value
        if value != rule["is"]:
            faults.append(f"{field} is {value!r}, llama.cpp computes {arch.gguf} with {rule['is']!r} only")
    width = int(fields.get("head_dim") or 0) * int(fields.get("num_attention_heads") or 0)
    if arch.square_attention and width != fields.get("hidden_size"):
        faults.append(
            f"heads x head_dim = {width}, llama.cpp needs hidden_size = {fields.get('hidden_size')}"
        )
    if arch.gguf == "gemma3":
        faults += _gemma3_faults(fields)
    if faults:
        faults.append("the native directory supports this model; write that instead (--file native)")
    raise_all(ModelError, f"{arch.name} to GGUF", faults)


def _gemma3_faults(fields: Mapping[str, Any]) -> list[str]:
    """llama.cpp derives gemma3's attention scale from the shape (src/models/gemma3.cpp)."""
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    if not heads or not hidden:
        return []
    implied = hidden // heads if fields.get("num_hidden_layers") == 62 else fields["head_dim"]
    given = fields.get("query_pre_attn_scalar", 256)
    faults = []
    if given != implied:
        faults.append(f"query_pre_attn_scalar is {given}, llama.cpp computes gemma3 with {implied}")
    if fields.get("attn_logit_softcapping") is not None:
        faults.append("attn_logit_softcapping is set, llama.cpp computes gemma3 without it")
    return faults


def engine_notes(arch: Architecture, config: Mapping[str, Any]) -> list[str]:
    """Differences of llama.cpp from transformers for this config, for the receipt."""
    return [
        f"{field} = {config[field]}: {note}"
        for field, note in arch.ignored.items()
        if config.get(field) not in (None, False, 0)
    ]


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the fields that transformers derives from others."""
    fields = dict(config)
    heads = fields.get("num_attention_heads")
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = heads
    if fields.get("head_dim") is None and heads and fields.get("hidden_size"):
        fields["head_dim"] = fields["hidden_size"] // heads
    return fields


def expert_count(arch: Architecture, config: Mapping[str, Any]) -> int:
    """Experts of a block, 0 for a dense model."""
    for key in arch.keys:
        if key.name == "expert_count":
            return int(next((config[field] for field in key.fields if config.get(field)), 0))
    return 0


def every_name(arch: Architecture, config: Mapping[str, Any]) -> list[str]:
    """Every tensor name this architecture can have, biases included."""
    names = list(arch.ends)
    experts = range(expert_count(arch, config))
    for layer in range(int(config["num_hidden_layers"])):
        for part in arch.blocks:
            modules = [part.replace("{e}", str(e)) for e in experts] if "{e}" in part else [part]
            names += [f"model.layers.{layer}.{m}.{kind}" for m in modules for kind in ("weight", "bias")]
    return names


def gguf_entries(arch: Architecture, config: Mapping[str, Any], hf_names: Iterable[str]) -> list[GGUFEntry]:
    """Hugging Face names -> GGUF tensors, in file order: embedding, blocks, output norm, output, factors.

    A tied `lm_head.weight` is left out. ModelError lists the names that cannot be mapped.
    """
    check_values(arch, config)
    fields = complete(config)
    names = [name for name in hf_names if not _IGNORED.search(name)]
    if fields.get("tie_word_embeddings"):
        names = [name for name in names if name != "lm_head.weight"]
    table = _name_map(arch.gguf, int(fields["num_hidden_layers"]))
    stacks: dict[str, dict[int, str]] = {}
    faults = []
    for name in names:
        target = table.get_name(_EXPERT.sub(".experts.", name), try_suffixes=(".weight", ".bias"))
        if target is None:
            faults.append(f"tensor {name!r} has no GGUF name in architecture {arch.gguf}")
            continue
        expert = _EXPERT.search(name)
        stack, index = stacks.setdefault(target, {}), int(expert[1]) if expert else 0
        if index in stack:
            faults.append(f"{target}: both {stack[index]!r} and {name!r} map to it")
        stack[index] = name
    entries = []
    for target, stack in stacks.items():
        count = expert_count(arch, config) if _EXPERT.search(next(iter(stack.values()))) else 1
        if sorted(stack) != list(range(count)):
            faults.append(f"{target}: experts {sorted(stack)} are there, 0 to {count - 1} are needed")
        entries.append(_entry(arch, fields, target, tuple(stack[e] for e in sorted(stack))))
    raise_all(ModelError, f"{arch.name} to GGUF", faults)
    entries.sort(key=lambda entry: _place(arch, entry))
    return entries + _computed(arch, fields)


def own_names(name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """A tensor under its GGUF name -> names of what is in it: each matrix (of an expert, or of a head), or
    itself."""
    stem, _, kind = name.rpartition(".")
    if len(shape) != 3 or shape[0] == 1 or kind != "weight" or "conv" in stem:
        return (name,)
    return tuple(f"{stem}.experts.{e}.{kind}" for e in range(shape[0]))


def own_entries(names: Iterable[str]) -> list[GGUFEntry]:
    """The inverse of `own_names`: the tensors of a file whose architecture is unknown."""
    stacks: dict[str, list[str]] = {}
    for name in names:
        stacks.setdefault(_EXPERT.sub(".", name), []).append(name)
    return [GGUFEntry(name, tuple(stack)) for name, stack in stacks.items()]


@cache
def _name_map(arch: str, layers: int) -> gguf.TensorNameMap:
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH(kind), layers)


def _entry(arch: Architecture, fields: Mapping[str, Any], target: str, sources: tuple[str, ...]) -> GGUFEntry:
    rotated = _ROTATED.search(sources[0]) if arch.rope_rows else None
    if rotated:
        heads = fields["num_attention_heads" if rotated[1] == "q" else "num_key_value_heads"]
        return GGUFEntry(target, sources, rows="rope", heads=int(heads))
    return GGUFEntry(target, sources, add=arch.norm_offset if target.endswith("norm.weight") else 0.0)


def _place(arch: Architecture, entry: GGUFEntry) -> tuple[int, int]:
    """Position in the file: the embedding first, blocks in order, then norm and output."""
    source = entry.sources[0]
    layer = _LAYER.match(source)
    if not layer:
        return (-1, 0) if source == arch.ends[0] else (2**31, arch.ends.index(source))
    part = _EXPERT.sub(".experts.{e}.", source[layer.end() :]).rsplit(".", 1)[0]
    return (int(layer[1]), arch.blocks.index(part) if part in arch.blocks else len(arch.blocks))


def _computed(arch: Architecture, fields: Mapping[str, Any]) -> list[GGUFEntry]:
    kinds = {
        "freqs": gguf.MODEL_TENSOR.ROPE_FREQS,
        "long": gguf.MODEL_TENSOR.ROPE_FACTORS_LONG,
        "short": gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT,
    }
    return [
        GGUFEntry(f"{gguf.TENSOR_NAMES[kinds[kind]]}.weight", (), values=values)
        for kind, values in rope_factors(fields, arch.rope).items()
    ]


def rope_rows(n: int, heads: int) -> torch.Tensor:
    """Row order from transformers' halves to llama.cpp's pairs: `w_gguf = w[rope_rows(n, heads)]`.

    Within a head of d rows: 0, d/2, 1, d/2 + 1, ... `(n,)` i64. ModelError unless n = heads x even d.
    """
    _check_heads(n, heads)
    return torch.arange(n).view(heads, 2, n // heads // 2).transpose(1, 2).reshape(n)


def rope_rows_back(n: int, heads: int) -> torch.Tensor:
    """The inverse of `rope_rows`: `w = w_gguf[rope_rows_back(n, heads)]`."""
    _check_heads(n, heads)
    return torch.arange(n).view(heads, n // heads // 2, 2).transpose(1, 2).reshape(n)


def _check_heads(n: int, heads: int) -> None:
    if heads < 1 or n % (2 * heads):
        raise ModelError(
            f"{n} rows cannot be cut into {heads} heads of an even number of rows; is config right?"
        )
