"""Rotation: Hadamard matrices of every order that is built, what is refused, what outliers become."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbits.errors import ModelError
from fewbits.files.checkpoint import Checkpoint
from fewbits.files.open import open_checkpoint
from fewbits.formats import kind_of
from fewbits.transforms import rotate
from fewbits.transforms.hadamard import hadamard, rotation

from .contracts.transform_contract import REASSOCIATED, logits, move
from .tiny import change_weights, save_tiny

# Paley I: q + 1 for q = 3, 7, 11, 19, 23, 43 ...; Paley II: 2 (q + 1) for q = 5, 13, 17, 29, 37 ...
PALEY = [4, 8, 12, 20, 24, 28, 36, 44, 48, 60, 68, 72, 76, 80, 84, 104, 108, 140]


@pytest.mark.parametrize("order", [1, 2, *PALEY])
def test_hadamard_matrices_are_what_they_are_called(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None and bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


def test_an_order_that_is_not_built_is_none_and_not_wrong() -> None:
    assert all(hadamard(order) is None for order in (0, 3, 5, 6, 10, 14, 18, 22, 52, 92))


@pytest.mark.parametrize("k", [1, 2, 7, 12, 52, 64, 96, 100, 128, 576, 960, 1152])
def test_a_rotation_is_orthogonal_and_its_two_sides_agree(k: int) -> None:
    turn = rotation(k, torch.Generator().manual_seed(k))
    eye = torch.eye(k, dtype=torch.float64)
    r = turn.columns(eye)
    # The factors are f32: an entry is wrong by up to half an ulp, a sum of k products by sqrt(k) of that.
    torch.testing.assert_close(r @ r.T, eye, rtol=0, atol=2**-22)
    torch.testing.assert_close(turn.rows(eye), r.T)
    w = torch.randn(5, 2 * k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn.columns(w), w @ torch.block_diag(r, r))
    torch.testing.assert_close(turn.rows(w.T), torch.block_diag(r, r).T @ w.T)


@pytest.mark.parametrize(
    ("k", "factor"), [(64, 1), (576, 1), (960, 1), (1152, 1), (3072, 1), (52, 13), (7, 7)]
)
def test_a_rotation_is_hadamard_wherever_one_is_known(k: int, factor: int) -> None:
    turn = rotation(k, torch.Generator().manual_seed(0))
    assert turn.random == factor
    one = turn.columns(torch.eye(k)[:1])
    if factor == 1:  # one loud coordinate becomes equally loud everywhere
        torch.testing.assert_close(one.abs(), torch.full((1, k), k**-0.5))


def test_seeds_make_rotations() -> None:
    a, b, c = (rotation(64, torch.Generator().manual_seed(seed)).signs for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---- models --------------------------------------------------------------------------------------

SMALL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 32}
TOKENS = torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(0))


def make(tmp_path: Path, name: str = "LlamaForCausalLM", **given: object) -> Checkpoint:
    return open_checkpoint(save_tiny(name, tmp_path / "model", **{**SMALL, **given}))


@pytest.mark.parametrize(("hidden", "said"), [(96, "12 x 8"), (52, "random orthogonal 13")])
def test_sizes_that_are_no_power_of_two(tmp_path: Path, hidden: int, said: str) -> None:
    checkpoint = make(tmp_path, hidden_size=hidden)
    after, notes = rotate(checkpoint)
    assert move(logits(after, TOKENS), logits(checkpoint, TOKENS)) <= REASSOCIATED
    assert said in notes[0]


def test_biases_of_writers_turn_too(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, attention_bias=True, mlp_bias=True)
    after, _ = rotate(checkpoint, values=False)
    assert move(logits(after, TOKENS), logits(checkpoint, TOKENS)) <= REASSOCIATED
    name = "model.layers.0.mlp.down_proj.bias"
    assert not torch.equal(after.tensors[name].load(), checkpoint.tensors[name].load())


def test_a_tied_output_is_untied_and_said(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, tie_word_embeddings=True)
    after, notes = rotate(checkpoint)
    assert after.config["tie_word_embeddings"] is False and checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head.weight" in after.tensors and any("lm_head.weight" in note for note in notes)
    assert move(logits(after, TOKENS), logits(checkpoint, TOKENS)) <= REASSOCIATED


def test_norms_become_ones(tmp_path: Path) -> None:
    after, _ = rotate(make(tmp_path))
    norms = [tensor for name, tensor in after.tensors.items() if "norm" in name]
    assert len(norms) == 3 and all(bool((tensor.load() == 1).all()) for tensor in norms)


def test_a_bf16_source_is_rounded_at_its_ends_only(tmp_path: Path) -> None:
    path = save_tiny("LlamaForCausalLM", tmp_path / "model", **SMALL)
    names = open_checkpoint(path).tensors
    checkpoint = open_checkpoint(change_weights(path, dict.fromkeys(names, torch.Tensor.bfloat16)))
    after, notes = rotate(checkpoint)
    kinds = {name: tensor.dtype for name, tensor in after.tensors.items()}
    assert kinds.pop("model.embed_tokens.weight") == kinds.pop("lm_head.weight") == "bf16"
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"f32"}
    assert any("rounded once more, to bf16" in note for note in notes)
    # Rounding to 8 bits of mantissa: a relative error of 2^-9 / sqrt(3) an entry, rms, in two tables.
    moved = move(logits(after, TOKENS), logits(checkpoint, TOKENS))
    assert REASSOCIATED < moved < 2 * 2**-9


def test_nothing_is_loaded_before_it_is_asked_for(tmp_path: Path) -> None:
    checkpoint = make(tmp_path)

    def load() -> torch.Tensor:
        raise AssertionError("loaded")

    tensors = {name: replace(tensor, load=load) for name, tensor in checkpoint.tensors.items()}
    after, _ = rotate(replace(checkpoint, tensors=tensors))
    with pytest.raises(AssertionError, match="loaded"):
        after.tensors["model.embed_tokens.weight"].load()


def excess_kurtosis(x: torch.Tensor) -> float:
    x = x.double() - x.double().mean()
    return float(x.pow(4).mean() / x.square().mean().square() - 3)


def test_outliers_of_the_residual_stream_are_spread(tmp_path: Path) -> None:
    """Two coordinates of the stream are a hundred times louder, as every large model has them."""

    def loud(w: torch.Tensor) -> torch.Tensor:
        w[..., [7, 50]] *= 100
        return w

    path = save_tiny("LlamaForCausalLM", tmp_path / "model", **{**SMALL, "hidden_size": 256})
    checkpoint = open_checkpoint(change_weights(path, {"model.embed_tokens.weight": loud}))
    after, _ = rotate(checkpoint)
    name = "model.embed_tokens.weight"
    before, turned = (each.tensors[name].load()[1:] for each in (checkpoint, after))  # row 0: padding
    assert excess_kurtosis(before) > 50 and excess_kurtosis(turned) < 3
    peak = [float((x.abs().amax(1) / x.square().mean(1).sqrt()).median()) for x in (before, turned)]
    assert peak[0] > 8 and peak[1] < 4
    q = "model.layers.0.self_attn.q_proj.weight"
    assert after.tensors[q].load().std() == pytest.approx(float(checkpoint.tensors[q].load().std()), rel=0.2)


def test_values_are_spread_within_heads_only(tmp_path: Path) -> None:
    checkpoint = make(tmp_path)
    after, _ = rotate(checkpoint, residual=False)
    changed = {
        name.split(".")[-2]
        for name, tensor in after.tensors.items()
        if not torch.equal(tensor.load(), checkpoint.tensors[name].load())
    }
    assert changed == {"v_proj", "o_proj"}
    name = "model.layers.0.self_attn.v_proj.weight"
    heads = [each.tensors[name].load().reshape(2, -1) for each in (checkpoint, after)]
    torch.testing.assert_close(heads[0].norm(dim=1), heads[1].norm(dim=1))


# ---- refusals ------------------------------------------------------------------------------------


def with_config(**given: object) -> Callable[[Checkpoint], Checkpoint]:
    return lambda checkpoint: replace(checkpoint, config={**checkpoint.config, **given})


def with_tensor(name: str, like: str) -> Callable[[Checkpoint], Checkpoint]:
    return lambda c: replace(c, tensors={**c.tensors, name: replace(c.tensors[like], name=name)})


NORM, Q = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_config(architectures=["NewForCausalLM"]), "NewForCausalLM.* is unknown"),
        (with_tensor(NORM.replace("weight", "bias"), NORM), "LayerNorm subtracts a mean"),
        (with_tensor(NORM.replace("input", "post_feedforward"), NORM), "before the residual sum"),
        (with_tensor(Q.replace("q_proj", "g_proj"), Q), r"g_proj.weight: its relation to the residual"),
        (
            lambda c: replace(c, tensors={Q: replace(c.tensors[Q], kind=kind_of("q4_0"))}),
            "norm before .* not found",
        ),
        (
            lambda c: replace(c, tensors={**c.tensors, Q: replace(c.tensors[Q], kind=kind_of("q4_0"))}),
            "q_proj.* as q4_0; rewrite the float model",
        ),
    ],
)
def test_refusals_say_why(tmp_path: Path, change: Callable[[Checkpoint], Checkpoint], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        rotate(change(make(tmp_path)))


def test_gemma3_is_refused_but_its_values_turn(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, "Gemma3ForCausalLM", layer_types=["full_attention"])
    with pytest.raises(ModelError, match=r"post_attention_layernorm.*residual=False"):
        rotate(checkpoint)
    _, notes = rotate(checkpoint, residual=False)
    assert notes == (
        "values of 1 of 1 blocks rotated within each head: Hadamard of order 32 = 32, random signs",
    )
