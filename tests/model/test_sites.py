"""Sites: found from names and shapes, each tensor claimed once, shared inputs grouped."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fewbits.files.open import open_checkpoint
from fewbits.model.sites import kept, role_of, sites
from tests.tiny import MODELS, save_tiny


@dataclass
class Shaped:
    shape: tuple[int, ...]


@dataclass
class Model:
    tensors: dict[str, Shaped]
    config: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_claimed_once(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny(name, tmp_path / "model"))
    found = sites(checkpoint)
    claimed = [site.name for site in found] + kept(checkpoint)
    assert sorted(claimed) == sorted(checkpoint.tensors)
    assert all(site.role != "other" for site in found)
    layers = checkpoint.config["num_hidden_layers"]
    assert {site.block for site in found} == {None, *range(layers)}
    assert all(len(checkpoint.tensors[name].shape) == 1 for name in kept(checkpoint))
    groups: dict[str, set[int]] = {}
    for site in found:
        groups.setdefault(site.group, set()).add(site.shape[1])
    assert all(len(widths) == 1 for widths in groups.values())  # one input has one width


def test_q_k_and_v_share_an_input_and_o_does_not() -> None:
    names = [f"model.layers.3.self_attn.{part}_proj.weight" for part in "qkvo"]
    found = sites(Model({name: Shaped((8, 8)) for name in names}))
    assert [site.role for site in found] == ["q", "k", "v", "o"]
    assert [site.group for site in found[:3]] == ["model.layers.3.self_attn:in"] * 3
    assert found[3].group == "model.layers.3.self_attn.o_proj:in"
    assert {site.block for site in found} == {3}


def test_an_expert_has_its_index_and_its_own_input() -> None:
    names = [f"model.layers.0.mlp.experts.{e}.{part}_proj.weight" for e in (0, 11) for part in ("gate", "up")]
    found = sites(Model({name: Shaped((8, 8)) for name in names}))
    assert [site.expert for site in found] == [0, 0, 11, 11]
    assert len({site.group for site in found}) == 2


def test_tied_weights_name_each_other() -> None:
    table = {"model.embed_tokens.weight": Shaped((8, 4))}
    (embed,) = sites(Model(table, {"tie_word_embeddings": True}))
    assert embed.tied_to == "lm_head.weight"
    both = sites(Model(table | {"lm_head.weight": Shaped((8, 4))}, {"tie_word_embeddings": True}))
    assert [site.tied_to for site in both] == [None, "model.embed_tokens.weight"]
    assert sites(Model(table))[0].tied_to is None
    assert sites(Model({}, {"tie_word_embeddings": True})) == []


def test_roles_that_no_name_says_are_seen_by_rows() -> None:
    shapes = {
        "backbone.embeddings.weight": (320, 64),
        "backbone.layers.0.mixer.wg.weight": (8, 64),
        "backbone.layers.0.mixer.mix.weight": (128, 64),
        "backbone.layers.0.mixer.pick.weight": (1, 64),
        "places.weight": (130, 64),
    }
    config = {"vocab_size": 320, "num_local_experts": 8, "num_experts_per_tok": 2, "n_positions": 128}
    found = sites(Model({name: Shaped(shape) for name, shape in shapes.items()}, config))
    assert [site.role for site in found] == ["embed", "router", "other", "router", "position"]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("transformer.h.0.attn.c_attn.weight", "qkv"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.experts.1.w2.weight", "down"),
        ("blk.0.ffn_gate.weight", "gate"),
        ("model.layers.0.strange.weight", "other"),
    ],
)
def test_roles(name: str, role: str) -> None:
    assert role_of(name) == role
