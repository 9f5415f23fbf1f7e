"""Block by block: the same logits as the whole model, one block in memory, inputs seen as they are."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import silu

from fewbits.adapters.transformers import empty_model, load_model
from fewbits.blocks.block import Block
from fewbits.blocks.model import BlockModel
from fewbits.errors import CalibrationError, ModelError
from fewbits.files.checkpoint import Checkpoint
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from fewbits.model.sites import sites
from tests.tiny import MODELS, VOCAB, change_weights, save_tiny

EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
Open = Callable[..., Checkpoint]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Architecture -> its tiny random checkpoint, made once."""
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            made[name] = open_checkpoint(save_tiny(name, tmp_path_factory.mktemp(name)))
        return made[name]

    return make


def some_tokens(b: int = 3, t: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (b, t), generator=torch.Generator().manual_seed(seed))


def first_block(checkpoint: Checkpoint) -> tuple[Block, torch.Tensor, dict[str, torch.Tensor]]:
    model = BlockModel(checkpoint)
    weights = model.weights(0)
    return model.block(0, weights), model.embed(some_tokens()), weights


@torch.no_grad()
def run_blocks(model: BlockModel, tokens: torch.Tensor) -> torch.Tensor:
    hidden = model.embed(tokens)
    for i in range(model.n_blocks):
        hidden = model.block(i, model.weights(i))(hidden)
    return model.head(hidden)


@torch.no_grad()
def run_whole(checkpoint: Checkpoint, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return load_model(checkpoint, dtype)(tokens, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_whole_model(name: str, opened: Open) -> None:
    """24 tokens reach past gemma3's window of 8. The whole model multiplies all experts at once, in another
    order of sums: there 1e-5 of the largest logit, some hundred times f32's precision, is allowed."""
    checkpoint = opened(name)
    model = BlockModel(checkpoint)
    for tokens in (some_tokens(), some_tokens(1, 9, seed=1)):
        got, want = run_blocks(model, tokens), run_whole(checkpoint, tokens, torch.float32)
        if name in EXPERTS:
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        else:
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_logits_in_bf16_are_those_of_the_whole_model(name: str, opened: Open) -> None:
    checkpoint = opened(name)
    got = run_blocks(BlockModel(checkpoint, torch.bfloat16), some_tokens())
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, run_whole(checkpoint, some_tokens(), torch.bfloat16))


def test_quantized_tensors_are_decoded_table_of_embeddings_included(opened: Open) -> None:
    checkpoint = opened("Qwen2ForCausalLM")
    q8_0 = FORMATS.get("q8_0")
    tensors = {
        name: replace(tensor, load=lambda load=tensor.load: q8_0.encode(load().float()), kind=q8_0)
        if len(tensor.shape) == 2
        else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    small = replace(checkpoint, tensors=tensors)
    got = run_blocks(BlockModel(small), some_tokens())
    assert torch.equal(got, run_whole(small, some_tokens(), torch.float32))
    assert not torch.equal(got, run_whole(checkpoint, some_tokens(), torch.float32))


def test_a_block_runs_on_hidden_states_that_were_embedded_elsewhere(opened: Open) -> None:
    """As after a restart: the arguments of the blocks follow from the shape alone."""
    checkpoint = opened("Gemma3ForCausalLM")
    ran = BlockModel(checkpoint)
    hidden = ran.embed(some_tokens())
    fresh = BlockModel(checkpoint)
    for i in range(ran.n_blocks):
        want = ran.block(i, ran.weights(i))(hidden)
        assert torch.equal(fresh.block(i, fresh.weights(i))(hidden), want)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", *EXPERTS])
def test_names_are_those_of_the_checkpoint_and_an_empty_model_has_no_weights(name: str, opened: Open) -> None:
    checkpoint = opened(name)
    model = BlockModel(checkpoint)
    named = [tensor for i in range(model.n_blocks) for tensor in model.names(i)]
    assert sorted(named) == sorted(n for n in checkpoint.tensors if n.startswith("model.layers."))
    for i in range(model.n_blocks):
        weights = model.weights(i)
        assert list(weights) == model.names(i)
        for tensor, weight in weights.items():
            assert torch.equal(weight, checkpoint.tensors[tensor].load().float())
    assert all(weight.is_meta for weight in empty_model(checkpoint).parameters())


def test_a_dropped_block_is_freed_at_once(opened: Open) -> None:
    block, hidden, weights = first_block(opened("MixtralForCausalLM"))
    block(hidden)
    alive = [weakref.ref(weight) for weight in [*block.module.parameters(), *weights.values()]]
    assert all(weight() is not None for weight in alive)
    del block, weights
    assert all(weight() is None for weight in alive)


# ---- weights of a block --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlamaForCausalLM", *EXPERTS])
def test_every_weight_can_be_set_or_stood_in_for_and_the_callers_stay_as_they_are(
    name: str, opened: Open
) -> None:
    block, hidden, weights = first_block(opened(name))
    before, kept = block(hidden), {n: w.clone() for n, w in weights.items()}
    for tensor in [site.name for site in sites(opened(name)) if site.block == 0]:
        other = {tensor: weights[tensor] * 1.5}
        for_once = block(hidden, other)
        assert torch.equal(block(hidden), before)
        block.set(other)
        assert torch.equal(block.weight(tensor), other[tensor])
        assert torch.equal(block(hidden), for_once) and not torch.equal(for_once, before)
        block.set({tensor: weights[tensor]})
    assert torch.equal(block(hidden), before)
    assert all(torch.equal(weights[n], kept[n]) for n in kept)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", *EXPERTS])
def test_gradients_reach_weights_that_stand_in_and_nothing_else(name: str, opened: Open) -> None:
    block, hidden, weights = first_block(opened(name))
    assert not block(hidden).requires_grad
    learned = {n: w.clone().requires_grad_() for n, w in weights.items() if w.ndim == 2}
    block(hidden, learned).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in learned.values())
    assert all(parameter.grad is None for parameter in block.module.parameters())


def test_faults_of_given_weights_are_listed_together(opened: Open) -> None:
    checkpoint = opened("LlamaForCausalLM")
    model = BlockModel(checkpoint)
    block, _, weights = first_block(checkpoint)
    q, k = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    with pytest.raises(
        ModelError, match=r"(?s)layers.0:.*'lm_head.weight' is not.*\(4, 4\), the block takes"
    ):
        block.set({q: torch.zeros(4, 4), "lm_head.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=f"(?s){q}' is missing.*{k}' is missing"):
        model.block(0, {n: w for n, w in weights.items() if n not in (q, k)})
    with pytest.raises(ModelError, match="block 2 does not exist, it has 2"):
        model.weights(2)
    with pytest.raises(ModelError, match="lm_head"):
        block.weight("lm_head.weight")


# ---- watching ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in MODELS if n not in EXPERTS])
def test_watching_sees_what_each_linear_reads_and_changes_nothing(name: str, opened: Open) -> None:
    checkpoint = opened(name)
    block, hidden, _ = first_block(checkpoint)
    read: dict[str, torch.Tensor] = {}
    for key, module in block.module.named_modules():
        if isinstance(module, torch.nn.Linear):
            site = f"model.layers.0.{key}.weight"
            module.register_forward_pre_hook(lambda _, x, site=site: read.__setitem__(site, x[0]))
    seen: dict[str, torch.Tensor] = {}
    assert torch.equal(block.watched(hidden, seen.__setitem__), block(hidden))
    assert seen.keys() == read.keys() == {site.name for site in sites(checkpoint) if site.block == 0}
    assert all(torch.equal(seen[site], read[site].flatten(0, 1)) for site in seen)


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_is_seen_with_the_tokens_that_are_routed_to_it(name: str, opened: Open) -> None:
    """down reads silu(gate x) * (up x) of the very x that gate and up were seen with."""
    checkpoint = opened(name)
    block, hidden, weights = first_block(checkpoint)
    seen: dict[str, torch.Tensor] = {}
    block.watched(hidden, seen.__setitem__)
    experts: dict[int, dict[str, str]] = {}
    for site in sites(checkpoint):
        if site.block == 0 and site.expert is not None:
            experts.setdefault(site.expert, {})[site.role] = site.name
    assert len(experts) == 4
    for names in experts.values():
        gate, up, down = names["gate"], names["up"], names["down"]
        assert seen[gate] is seen[up]
        inner = silu(seen[gate] @ weights[gate].T) * (seen[up] @ weights[up].T)
        torch.testing.assert_close(seen[down], inner, rtol=1e-5, atol=1e-5)
    tokens = hidden.shape[0] * hidden.shape[1]
    assert sum(seen[names["gate"]].shape[0] for names in experts.values()) == 2 * tokens


# ---- what cannot be run --------------------------------------------------------------------------


def test_all_faults_of_a_checkpoint_are_listed_together(opened: Open) -> None:
    checkpoint = opened("LlamaForCausalLM")
    tensors = dict(checkpoint.tensors)
    missing = tensors.pop("model.layers.1.mlp.up_proj.weight")
    wrong = "model.layers.0.self_attn.q_proj.weight"
    tensors[wrong] = replace(tensors[wrong], shape=(4, 4))
    tensors["model.layers.0.extra.weight"] = replace(missing, name="model.layers.0.extra.weight")
    with pytest.raises(ModelError) as caught:
        BlockModel(replace(checkpoint, tensors=tensors))
    for part in (missing.name, "is missing", "'model.layers.0.extra.weight' is not one", wrong, "(4, 4)"):
        assert part in str(caught.value)


def test_tensors_under_other_names_than_the_models_are_refused(opened: Open) -> None:
    checkpoint = opened("LlamaForCausalLM")
    tensors = {name.replace("layers.", "stages."): t for name, t in checkpoint.tensors.items()}
    with pytest.raises(ModelError, match=r"'model\.stages\.0\.\S+' is not one of the model's"):
        BlockModel(replace(checkpoint, tensors=tensors))


def test_tokens_of_another_vocabulary_are_refused(opened: Open) -> None:
    model = BlockModel(opened("LlamaForCausalLM"))
    for wrong in (-1, VOCAB):
        with pytest.raises(CalibrationError, match=f"{VOCAB} rows"):
            model.embed(torch.tensor([[1, wrong]]))


def test_an_untied_output_is_read_and_a_tied_one_is_the_table(tmp_path: Path) -> None:
    tied = save_tiny("Qwen2ForCausalLM", tmp_path / "tied")
    model = BlockModel(open_checkpoint(tied))
    before = model.head(model.embed(some_tokens()))
    change_weights(tied, {"model.embed_tokens.weight": lambda table: table * 2})
    model = BlockModel(open_checkpoint(tied))
    hidden = model.embed(some_tokens()) / 2
    assert torch.equal(model.head(hidden), before * 2)
