"""Blocks that read more than hidden states: token ids, what earlier blocks hand on, several streams."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits
from fewbits.blocks.columns import PROBES, Columns, Extent
from fewbits.blocks.model import BlockModel
from fewbits.calibrate.tokens import Tokens
from fewbits.errors import ModelError
from tests.tiny import save_random

COMMON = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0,
}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"] * 2
GEMMA = {
    "layer_types": LAYERS, "sliding_window": 8, "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 320, "num_kv_shared_layers": 2,
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "qk_head_dim": 32, "v_head_dim": 16,
    "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        **GEMMA, "laurel_rank": 16, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": [96] * 4,
    },
    "gemma4_text": {**GEMMA, "global_head_dim": 16},
    "glm_moe_dsa": {**MLA, "indexer_types": ["full", "shared", "full", "shared"]},
    "xlnet": {"vocab_size": 320, "d_model": 64, "n_layer": 4, "n_head": 4, "d_inner": 96},
}  # fmt: skip
"""Gemma: inputs of each layer from token ids, keys of earlier layers; Gemma 3n: streams too; GLM: indices of
an earlier layer; XLNet: (t, b, h)"""


def saved(kind: str, folder: Path) -> Any:
    fields = (COMMON if kind != "xlnet" else {}) | MODELS[kind]
    return save_random("AutoModelForCausalLM", kind, fields, folder)


@torch.no_grad()
def by_blocks(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = BlockModel(fewbits.open(folder))
    hidden = model.embed(ids)
    for i in range(model.n_blocks):
        hidden = model.block(i, model.weights(i))(hidden)
    return torch.cat([model.head(part) for part in hidden.split(16, 1)], 1)


@pytest.mark.parametrize("kind", MODELS)
def test_block_by_block_the_logits_are_those_of_transformers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = saved(kind, tmp_path)
    monkeypatch.setattr("fewbits.blocks.tables.LARGE", 0)  # every table is read by its rows
    ids = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = whole(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(by_blocks(tmp_path, ids), wanted, atol=2e-4 * float(wanted.std()), rtol=0)


@pytest.mark.filterwarnings("ignore:.*are held as floats")
@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text", "glm_moe_dsa"])
def test_such_a_model_is_calibrated(kind: str, tmp_path: Path) -> None:
    parent = saved(kind, tmp_path / "float")
    text = Tokens.of(torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(0)), "random")
    logits = {}
    ids = text.windows[:, :16]
    for method in ("rtn", "gptq"):
        receipt = fewbits.quantize(
            tmp_path / "float", tmp_path / method, to="int3_g32", method=method, calibrate=text, verify=False
        )
        with torch.no_grad():
            logits[method] = fewbits.load(tmp_path / method)(input_ids=ids, use_cache=False).logits
    assert receipt.coverage["share"] > 0.95
    with torch.no_grad():
        wanted = parent(input_ids=ids, use_cache=False).logits
    error = {name: float((found - wanted).norm() / wanted.norm()) for name, found in logits.items()}
    assert error["gptq"] < 0.9 * error["rtn"]


TENSORS = {
    "streams": lambda b, t: torch.randn(4, b, t, 6),
    "keys": lambda b, t: torch.randn(b, 2, t, 3),
    "length first": lambda b, t: torch.randn(t, b, 5),
    "several in a row": lambda b, t: torch.randn(b, 3 * t, 5),
    "tokens": lambda b, t: torch.randint(-5, 300_000, (b, t)),
    "fewer than tokens": lambda b, t: torch.randint(0, t, (b, t, min(t, 8))),
    "all rows in one": lambda b, t: torch.randn(b * t, 7),
    "a mask": lambda b, t: torch.rand(b, t) > 0.5,
    "of no row": lambda b, t: torch.randn(7),
    "pairs": lambda b, t: torch.randn(b, 1, t, t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_laid_into_columns_comes_back(dtype: torch.dtype) -> None:
    extents = [Extent.of(*(make(b, t) for b, t in PROBES)) for make in TENSORS.values()]
    assert all(extents)
    columns = Columns(extents)
    for b, t in ((2, 11), (1, 8), (3, 5)):
        given = [make(b, t) for make in TENSORS.values()]
        given = [x.to(dtype).float() if x.is_floating_point() else x for x in given]
        packed = columns.joined(given, torch.zeros(b, t, 1, dtype=dtype))
        found = [columns.part(packed, i) for i in range(len(given))]
        assert all(torch.equal(x.float(), y.float()) for x, y in zip(given, found, strict=True))
    assert Extent.of(torch.zeros(2, 9), torch.zeros(3, 11)) is None  # four more than t


def test_a_model_that_rescales_its_weights_runs_packed(tmp_path: Path) -> None:
    config = transformers.RwkvConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=4, rescale_every=2, attention_hidden_size=64
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "float")
    fewbits.quantize(tmp_path / "float", tmp_path / "int4", to="int4_g32", effort="fast", verify=False)
    fewbits.convert(tmp_path / "int4", tmp_path / "decoded", file="huggingface")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found = fewbits.load(tmp_path / "int4")(input_ids=ids).logits
        decoded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "decoded")
        torch.testing.assert_close(found, decoded.eval()(input_ids=ids).logits)


def test_what_is_lost_between_blocks_is_told(tmp_path: Path) -> None:
    config = transformers.CpmAntConfig(
        vocab_size=320, hidden_size=64, num_attention_heads=4, dim_head=16, dim_ff=96, num_hidden_layers=2
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be run block by block: its hidden states have no row"):
        BlockModel(fewbits.open(tmp_path))
