"""Sites: the weights of a model that may be quantized, from names and shapes alone.

    model.layers.3.self_attn.k_proj.weight          (n, k)
          block 3 | group "model.layers.3.self_attn:in", shared by q, k and v | role "k"

Every two-dimensional `.weight` is a site; everything else (norms, biases, convolutions) is
unchanged. The plan decides whether a site is quantized; a router usually is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import ModelError

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
_INPUT_ROLES = {"q", "k", "v", "qkv", "gate", "up", "gate_up"}  # they read their parent's input
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|block|blk)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


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

    role: q k v o qkv gate up gate_up down router embed position segment output (every matrix of a head), or
    "other".
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
    tied = _tied(model)
    aside = getattr(model, "aside", ())
    return [
        _site(name, (tensor.shape[0], tensor.shape[1]), tied.get(name))
        for name, tensor in model.tensors.items()
        if _is_site(name, tensor.shape) and name not in aside
    ]


def kept(model: _Model) -> list[str]:
    """The names that are not sites, stored unchanged."""
    return [name for name, tensor in model.tensors.items() if not _is_site(name, tensor.shape)]


def role_of(name: str) -> str:
    """The role of a weight, from its name: `...self_attn.q_proj.weight` -> "q"."""
    module, _, _ = name.rpartition(".")
    if not _BLOCK.search(name) and _HEADS.intersection(module.split(".")):
        return "output"
    return _ROLES.get(module.rsplit(".", 1)[-1], "other")


def _is_site(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) == 2 and 0 not in shape


def _tied(model: _Model) -> dict[str, str]:
    """name -> the name it shares its weight with."""
    if not model.config.get("tie_word_embeddings"):
        return {}
    embed = [name for name in model.tensors if role_of(name) == "embed"]
    output = [
        name
        for name, tensor in model.tensors.items()
        if role_of(name) == "output" and embed and tensor.shape == model.tensors[embed[0]].shape
    ]
    if len(embed) != 1 or len(output) > 1:
        raise ModelError(
            f"config says tie_word_embeddings, found {len(embed)} tables of embeddings {embed} and "
            f"{len(output)} outputs {output}, 1 and at most 1 are expected; set it to false if they differ"
        )
    return {output[0]: embed[0]} if output else {embed[0]: "lm_head.weight"}


def _site(name: str, shape: tuple[int, int], tied_to: str | None) -> Site:
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
        tied_to=tied_to,
    )
