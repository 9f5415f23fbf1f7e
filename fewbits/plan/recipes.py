"""Recipes: which GGML type each tensor gets in each of llama.cpp's file types.

A file type such as `q4_k_m` is a *mixture*: a default type, and better (or, for the smallest, worse)
types for the tensors that matter most (or least). Three steps give a tensor its type:

    kept?      one-dimensional tensors, norms, routers and a few small ones stay as stored
    mixture    the first row of `ROWS` for (role, recipe) whose conditions hold, else the default
    fallback   if the row length is no multiple of the type's block, the type in `FALLBACK`

Conditions use facts of the model (grouped-query attention, number of experts) and the tensor's index i among
the n of its role. So the order of tensors matters: block by block, by name inside a block. The result equals
`llama-quantize` (llama.cpp, src/llama-quant.cpp; see tests/engines/test_recipes.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from ..errors import PlanError, raise_all
from ..formats.ggml_types import GGML_TYPES
from .mixtures import (
    FALLBACK,
    KEPT,
    KEPT_NAMES,
    NEEDS_IMATRIX,
    NOT_DESCRIBED,
    ONE_MORE_BIT,
    RECIPES,
    ROLES,
    SHARED_VALUES,
    Recipe,
    rows_of,
)


@dataclass(frozen=True)
class Hyper:
    """The model facts that mixtures use; `n_layer` counts all blocks (`ARCH.block_count`)."""

    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0


@dataclass(frozen=True)
class Choice:
    """The type of one tensor, the type that the mixture wanted, and why they differ (or why it is kept)."""

    type: str
    wanted: str
    reason: str | None = None
    kept: bool = False  # a tensor that llama.cpp never quantizes


@cache
def block_size(type_: str) -> int:
    """Weights in one block of a GGML type; raises PlanError for a name that is none."""
    try:
        return GGML_TYPES[type_.lower()].block
    except KeyError:
        known = ", ".join(sorted(GGML_TYPES))
        raise PlanError(f"{type_!r} is not a GGML type; known: {known}") from None


def recipe(name: str) -> Recipe:
    """The recipe called `name` (any case); raises PlanError, listing the known, if there is none."""
    if name.lower() not in RECIPES:
        raise PlanError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name.lower()]


@cache
def role_of(name: str) -> str:
    """The role of a GGUF tensor in the mixtures, `other` if it has none."""
    return next((role for role, pattern in ROLES if re.search(pattern, name)), "other")


def kept_reason(name: str, shape: Sequence[int]) -> str | None:
    """Why llama.cpp never quantizes this tensor; None if it may be quantized."""
    leading = next((axis for axis, size in enumerate(shape) if size > 1), len(shape))
    if len(shape) - leading < 2:
        return "kept: one-dimensional"
    if not name.endswith("weight"):
        return "kept: not a weight"
    if name in KEPT_NAMES:
        return f"kept: {name} is never quantized"
    return next((f"kept: {part} is never quantized" for part in KEPT if part in name), None)


@cache
def stream_order(name: str) -> tuple[int, str]:
    """Sort key: tensors outside the blocks first, then block by block, by name inside each."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


def choose_types(
    recipe_name: str,
    tensors: Sequence[tuple[str, Sequence[int], str]],
    hyper: Hyper,
    has_imatrix: bool = False,
    overrides: Callable[[str], str | None] | None = None,
) -> dict[str, Choice]:
    """(GGUF name, shape (n, k) or (e, n, k), stored dtype) of every tensor -> its Choice, by name.

    overrides: the user's type for a tensor, or None. As in llama-quantize an overridden tensor leaves
    the count of its role, kept tensors cannot be overridden, and the fallback applies to it as well.
    """
    chosen = recipe(recipe_name)
    if hyper.arch in NOT_DESCRIBED:
        raise PlanError(f"{hyper.arch}: no recipe describes its exceptions; give a plan of rules instead")
    names = [name for name, _, _ in tensors]
    twice = [f"{name}: given {count} times" for name, count in Counter(names).items() if count > 1]
    raise_all(PlanError, "tensor names", twice)
    model = _model_facts(hyper, has_imatrix)
    tied = "output.weight" not in names
    n_values = sum(role_of(name) == "v" for name in names)
    seen: Counter[str] = Counter()
    choices = {}
    for name, shape, dtype in sorted(tensors, key=lambda tensor: stream_order(tensor[0])):
        kept = kept_reason(name, shape)
        override = overrides(name) if overrides and not kept else None
        if kept:
            choices[name] = Choice(dtype, dtype, kept, True)
        elif override is not None:
            choices[name] = _fit(override, override, shape[-1])
        elif block_size(chosen.default) == 1:
            choices[name] = Choice(chosen.default, chosen.default)
        else:
            role = "output" if tied and role_of(name) == "embed" else role_of(name)
            place = _place_facts(name, role, seen[role], n_values, hyper)
            seen[role] += 1
            facts = model | place | ({"experts"} if len(shape) == 3 and shape[0] > 1 else set())
            wanted = mixture_type(chosen, role, facts)
            if shape[-1] % block_size(chosen.default):
                facts.add("ragged")
            choices[name] = _fit(wanted, mixture_type(chosen, role, facts), shape[-1])
    return {name: choices[name] for name in names}


def mixture_type(recipe: Recipe, role: str, facts: set[str]) -> str:
    """The type of the first matching row, before any fallback."""
    row = next((row for row in rows_of(recipe.name, role) if row.holds(facts)), None)
    type_ = recipe.default if row is None or row.type == "default" else row.type
    small = fnmatchcase(recipe.name, "iq[12]_*")
    promote = role == "v" and "shared_values" in facts and "expert_count=8" not in facts and not small
    return ONE_MORE_BIT.get(type_, type_) if promote else type_


def needing_imatrix(recipe_name: str, types: Mapping[str, str]) -> list[str]:
    """Of `name -> type`, the names whose type llama.cpp refuses to write without an importance matrix."""
    coarse = NEEDS_IMATRIX | ({"q2_k"} if recipe(recipe_name).name == "q2_k_s" else set())
    return [
        name for name, type_ in types.items() if type_ in coarse and role_of(name) not in ("output", "embed")
    ]


def _model_facts(hyper: Hyper, has_imatrix: bool) -> set[str]:
    grouped = hyper.n_head_kv > 0 and hyper.n_head // hyper.n_head_kv >= 4
    shared = SHARED_VALUES.get(hyper.arch) == hyper.n_layer
    if hyper.arch == "llama":
        shared = shared and hyper.n_head != hyper.n_head_kv and hyper.n_expert != 8
    facts = {
        "gqa4": grouped,
        "expert_count>=4": hyper.n_expert >= 4,
        "expert_count=8": hyper.n_expert == 8,
        "falcon": hyper.arch == "falcon",
        "imatrix": has_imatrix,
        "shared_values": shared,
    }
    return {name for name, holds in facts.items() if holds}


def _place_facts(name: str, role: str, counted: int, n_values: int, hyper: Hyper) -> set[str]:
    """The position of a tensor among those of its role.

    Expert models may have several tensors of a role in one block; then the block's number is used."""
    n = n_values if role == "v" else hyper.n_layer
    i = stream_order(name)[0] if hyper.n_expert > 1 and role in ("up", "gate", "down") else counted
    facts = {
        "first_2": i < 2,
        "first_4": i < 4,
        "first_16th": i < n // 16,
        "first_8th": i < n // 8,
        "counted_first_8th": counted < n // 8,
        "more_bits": i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2,
        "middle": n // 8 <= i < 7 * n // 8,
    }
    return {name for name, holds in facts.items() if holds}


def _fit(wanted: str, type_: str, row_length: int) -> Choice:
    """The Choice of `type_`, or of its substitute if its block does not divide the row."""
    if row_length % block_size(type_):
        type_ = FALLBACK.get(type_, type_)
    if row_length % block_size(type_):
        type_ = "f16"
    if type_ == wanted:
        return Choice(type_, wanted)
    return Choice(
        type_,
        wanted,
        f"row length {row_length} is not a multiple of {block_size(wanted)}, the block of {wanted}",
    )
