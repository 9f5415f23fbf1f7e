"""Sites: the weights of a model that may be quantized, from names, shapes and the config alone.

    model.layers.3.self_attn.k_proj.weight          (n, k)
          block 3 | group "model.layers.3.self_attn:in", shared by q, k and v | role "k"

Every two-dimensional `.weight` is a site; everything else (norms, biases, convolutions) is
unchanged. The plan decides whether a site is quantized; a router usually is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple, Protocol

# role -> last part of the module's name, in the spellings of known model families
_SPELLINGS = {
    "q": "q_proj query wq q q_lin",
    "k": "k_proj key wk k k_lin",
    "v": "v_proj value wv v v_lin",
    "o": "o_proj out_proj wo out_lin dense c_proj",
    "qkv": "qkv_proj query_key_value c_attn Wqkv W_pack in_proj qkv",
    "gate": "gate_proj w1",
    "up": "up_proj w3 fc1 c_fc dense_h_to_4h fc_in lin1",
    "gate_up": "gate_up_proj",
    "down": "down_proj w2 fc2 dense_4h_to_h fc_out lin2",
    "router": "gate router shared_expert_gate",
    "embed": "embed_tokens wte word_embeddings tok_embeddings token_embd",
    "position": "wpe embed_positions position_embeddings rel_embeddings relative_attention_bias",
    "segment": "token_type_embeddings",
    "output": "lm_head output embed_out",
}
# Parts of the names of a head's modules, outside the blocks
_HEADS = {"classifier", "pre_classifier", "score", "pooler", "predictions", "lm_head", "head"}
_HEADS |= {"vocab_transform", "vocab_projector"}
_ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings.split()}
GGUF_PARTS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "qkv": "attn_qkv",
    "gate": "ffn_gate", "gate_up": "ffn_up", "up": "ffn_up", "down": "ffn_down", "router": "ffn_gate_inp",
}  # fmt: skip
"""role -> the same in GGUF names; read backwards, `ffn_up` is up"""
_ROLES |= {part: role for role, part in GGUF_PARTS.items()}
TOWER = "tower"
_INPUT_ROLES = {"q", "k", "v", "qkv", "gate", "up", "gate_up"}  # they read their parent's input
SMALLEST = 16  # side of a matrix: a decay or slope of each head is none
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|block|blk)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class Seen(NamedTuple):
    """What a model's modules say of a tensor. role: None where the name says it. block: None outside. module:
    its path in the model, which files may name otherwise."""

    role: str | None
    block: int | None
    module: str = ""


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


class _Model(Protocol):
    @property
    def tensors(self) -> Mapping[str, _Shaped]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Site:
    """One weight `(n, k)` that may be quantized.

    role: q k v o qkv gate up gate_up down router embed position segment output (every matrix of a head),
    tower (a module that no text goes through, such as a vision encoder), or "other".
    block: index of the layer, None outside. group: name of the activation it reads; sites of one group
    share their statistics. expert: index, None for a dense weight.
    tied_to: the name that shares this weight: an embedding that is also the output has
    "lm_head.weight", a stored but tied output has the name of the embedding.
    """

    name: str
    shape: tuple[int, int]
    role: str
    block: int | None
    group: str
    expert: int | None = None
    tied_to: str | None = None


def sites(model: _Model) -> list[Site]:
    """Every weight of a checkpoint that may be quantized, in the checkpoint's order."""
    aside = getattr(model, "aside", ())
    found = [
        _site(name, (tensor.shape[0], tensor.shape[1]))
        for name, tensor in model.tensors.items()
        if _is_site(name, tensor.shape) and name not in aside
    ]
    seen: Mapping[str, Seen] = getattr(model, "seen", {})
    found = [_observed(site, seen.get(site.name), model.config) for site in found]
    tied = _tied(model, found)
    return [replace(site, tied_to=tied.get(site.name)) for site in found]


def _observed(site: Site, seen: Seen | None, config: Mapping[str, Any]) -> Site:
    """The site with the role and block that its modules have, else those of its name and shape."""
    if seen is not None:
        site = replace(site, block=seen.block, role=seen.role or site.role)
    return site if seen is not None and seen.role else replace(site, role=_role_by_shape(site, config))


def block_matrices(model: _Model) -> dict[str, int]:
    """The matrices of the blocks and stacks of them, whatever their names -> weights in each. Vectors, tables
    of a few columns, kernels of convolutions and what is not part of the model are none."""
    aside, seen = getattr(model, "aside", ()), getattr(model, "seen", {})
    return {
        name: prod(tensor.shape)
        for name, tensor in model.tensors.items()
        if name not in aside
        and len(tensor.shape) in (2, 3)
        and min(tensor.shape[-2:]) >= SMALLEST
        and (_BLOCK.search(name) if name not in seen else seen[name].block is not None)
    }


def per_block(model: _Model, size: Callable[[Site], int]) -> dict[int, int]:
    """Block -> the sum of `size` over its sites, norms and biases left out."""
    sums: dict[int, int] = {}
    for site in sites(model):
        if site.block is not None:
            sums[site.block] = sums.get(site.block, 0) + size(site)
    return sums


def kept(model: _Model) -> list[str]:
    """The names that are not sites, stored unchanged."""
    return [name for name, tensor in model.tensors.items() if not _is_site(name, tensor.shape)]


def role_of(name: str) -> str:
    """The role of a weight, from its name: `...self_attn.q_proj.weight` -> "q"."""
    module, _, _ = name.rpartition(".")
    if not _BLOCK.search(name) and _HEADS.intersection(module.split(".")):
        return "output"
    role = _ROLES.get(module.rsplit(".", 1)[-1], "other")
    return "other" if role == "output" and _BLOCK.search(name) else role


def _is_site(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) == 2 and 0 not in shape


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the language model: those of `text_config` where it is a part of a larger model."""
    nested: Mapping[str, Any] = config.get("text_config") or config
    return nested


def expert_counts(config: Mapping[str, Any]) -> set[int]:
    """The numbers of experts that a config names, in its parts too."""
    fields = text_config(config)
    parts = [fields, *(part for part in fields.values() if isinstance(part, dict))]
    return {
        value
        for part in parts
        for key, value in part.items()
        if "experts" in str(key) and "per_tok" not in key and type(value) is int and value > 1
    }


def _role_by_shape(site: Site, config: Mapping[str, Any]) -> str:
    """The role of a weight whose name says none: a row for each expert, token or position."""
    if site.role != "other" or site.expert is not None:
        return site.role
    text = text_config(config)
    rows = site.shape[0]
    if site.block is not None:
        return "router" if rows == 1 or rows in expert_counts(config) else site.role
    if rows in (text.get("vocab_size"), text.get("vocab_size_per_layer_input")):
        return "embed"
    lengths = [text.get(key) for key in ("max_position_embeddings", "n_positions", "type_vocab_size")]
    return "position" if any(n is not None and rows - 2 <= n <= rows for n in lengths) else site.role


def _tied(model: _Model, found: Sequence[Site]) -> dict[str, str]:
    """name -> the name it shares its weight with."""
    if not model.config.get("tie_word_embeddings"):
        return {}
    embed = [site.name for site in found if site.role == "embed"]
    shape = model.tensors[embed[0]].shape if embed else None
    heads = [site.name for site in found if site.role == "output" and site.block is None]
    output = [name for name in heads if model.tensors[name].shape == shape]
    if len(embed) != 1 or len(output) > 1:
        return {}
    return {output[0]: embed[0]} if output else {embed[0]: "lm_head.weight"}


def _site(name: str, shape: tuple[int, int]) -> Site:
    module = name.removesuffix(".weight")
    role = role_of(name)
    block, expert = _BLOCK.search(name), _EXPERT.search(name)
    parent = module.rpartition(".")[0] if role in _INPUT_ROLES else module
    return Site(
        name=name,
        shape=shape,
        role=role,
        block=int(block[1]) if block else None,
        group=f"{parent}:in",
        expert=int(expert[1]) if expert else None,
    )
