"""Every transform on one model of each structure; transform_contract.py lists the promises."""

from collections.abc import Callable
from functools import cache, partial

import pytest
import torch

from fewbits.files.checkpoint import Checkpoint
from fewbits.files.open import open_checkpoint
from fewbits.transforms import TRANSFORMS, rotate, scaled

from ..tiny import change_weights, save_tiny
from .transform_contract import PROMISES, Case, Transform, logits_do_not_move, make_case

MODELS = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",  # biases of q, k and v; tied output
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",  # fused q, k, v and gate, up
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
)
OPTIONS = {"awq": {"steps": 2, "rows": 16}, "smooth": {"alpha": 0.5}}
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}


def pair_transform(name: str, case: Case) -> Checkpoint:
    chosen = TRANSFORMS.get(name)(
        case.weights, case.pairs, case.stats, case.formats("int4_g32"), **OPTIONS.get(name, {})
    )
    return scaled(case.checkpoint, chosen)


def rotation(case: Case) -> Checkpoint:
    post_norms = case.checkpoint.config["model_type"] == "gemma3_text"
    return rotate(case.checkpoint, residual=not post_norms)[0]


ALL: dict[str, Transform] = {name: partial(pair_transform, name) for name in TRANSFORMS} | {
    "rotate": rotation
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @cache
    def make(model: str, bf16: bool = False) -> Case:
        path = save_tiny(model, tmp_path_factory.mktemp(model) / "model", **SMALL, **shape_of(model))
        if bf16:
            names = open_checkpoint(path).tensors
            fused = {name for name in names if ".experts." in name}
            change_weights(path, {name: torch.Tensor.bfloat16 for name in names if name not in fused})
        return make_case(open_checkpoint(path))

    return make


def shape_of(model: str) -> dict:
    """Three query heads to a key-value head, where the model's heads may be of any number."""
    if model == "Gemma3ForCausalLM":
        return {"layer_types": ["full_attention"]}
    return {"num_attention_heads": 6, "head_dim": 32} if "Qwen3" in model else {}


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ALL)
def test_a_transform_keeps_its_promises(name: str, model: str, promise: Callable, case: Callable) -> None:
    promise(ALL[name], case(model))


@pytest.mark.parametrize("model", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma3ForCausalLM"])
@pytest.mark.parametrize("name", [*TRANSFORMS])
def test_storing_norms_and_biases_in_bf16_moves_nothing(name: str, model: str, case: Callable) -> None:
    """The matrices are given out in f32; what stays in bf16 took its scale from what bf16 can hold."""
    stored = case(model, bf16=True)
    after = ALL[name](stored)
    kinds = {tensor.dtype for tensor in after.tensors.values() if len(tensor.shape) == 1}
    assert kinds == {"bf16"}
    logits_do_not_move(ALL[name], stored)
