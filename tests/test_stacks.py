"""Stacks of every kind: what the model's class says of names, experts, attention and outputs is followed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import fewbits
from fewbits.calibrate.tokens import Tokens
from fewbits.errors import PlanError
from fewbits.files.checkpoint import Checkpoint
from fewbits.files.experts import WHOLE, arrays, place_of
from fewbits.release.receipt import Receipt
from fewbits.workflow.coverage import CoverageWarning, coverage_of
from tests.tiny import save_random

SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
STACKS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},  # (e, in, out)
    "llama4_text": {
        "intermediate_size_mlp": 96,
        "layer_types": None,
        "no_rope_layers": None,
    },  # in one product
    "dbrx": {  # (e * out, in), one below the other
        **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"), None),
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "gemma2": {"query_pre_attn_scalar": 16},  # eager attention only
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 64},  # embeddings narrower than blocks
}


def saved(kind: str, folder: Path) -> Any:
    fields = {key: value for key, value in (SMALL | STACKS[kind]).items() if value is not None}
    return save_random("AutoModelForCausalLM", kind, fields, folder)


@pytest.mark.parametrize("kind", STACKS)
def test_codes_by_gptq_give_the_logits_of_transformers_own_model_with_those_weights(
    kind: str, tmp_path: Path
) -> None:
    parent = saved(kind, tmp_path / "float")
    text = Tokens.of(torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(0)), "random")
    asked: dict[str, Any] = {"to": "int4_g32", "method": "gptq", "calibrate": text}
    receipt = fewbits.quantize(tmp_path / "float", tmp_path / "int4", **asked)
    share = receipt.coverage["share"]
    assert share > 0.95 and receipt.table().startswith(f"{share:.1%} of the weights in blocks got int4_g32")
    inside = [row for row in receipt.tensors if ".0." in row.name and ".experts." not in row.name]
    assert not [row.name for row in inside if row.algorithm == "rtn"]  # statistics reached every weight
    state = parent.state_dict()
    for name, tensor in fewbits.open(tmp_path / "int4").tensors.items():
        w = tensor.load()
        w = w.decode() if tensor.quantized else w.float()
        array, stacked, rest = name.rpartition(".experts.")
        if stacked and array in state:
            target = state[array].view(4, -1, state[array].shape[-1])[int(rest.split(".")[0])]
        else:
            target = state[name]
        target = target if target.shape == w.shape else target.mT
        assert (w - target).norm() < 0.3 * target.norm(), name
        target.copy_(w)
    ids = text.windows[:2]
    with torch.no_grad():
        expected, got = parent(ids).logits, fewbits.load(tmp_path / "int4")(ids).logits
    assert (got - expected).norm() < 1e-4 * (expected - expected.mean()).norm()


@pytest.mark.filterwarnings("ignore:.*are held as floats")
@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "dbrx"])
def test_transformers_loads_experts_of_a_native_directory_and_of_its_floats(
    kind: str, tmp_path: Path
) -> None:
    saved(kind, tmp_path / "float")
    fewbits.quantize(tmp_path / "float", tmp_path / "int4", to="int4_g32", effort="fast", verify=False)
    fewbits.convert(tmp_path / "int4", tmp_path / "decoded", file="huggingface")
    before = {name: tensor.shape for name, tensor in fewbits.open(tmp_path / "float").tensors.items()}
    assert {n: t.shape for n, t in fewbits.open(tmp_path / "decoded").tensors.items()} == before
    ids = torch.arange(3, 40)[None]
    fewbits.register()
    with torch.no_grad():
        expected = fewbits.load(tmp_path / "int4")(ids).logits
        for name in ("int4", "decoded"):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / name, dtype=torch.float32, output_loading_info=True
            )
            assert not info["missing_keys"] and not info["unexpected_keys"]
            torch.testing.assert_close(model.eval()(ids).logits, expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w,
        lambda w: w[2],
        lambda w: w[1].mT,
        lambda w: w.chunk(2, dim=1)[1][3],
        lambda w: w.chunk(2, dim=1)[1],
        lambda w: w[3].chunk(2, dim=1)[1].mT,
    ],
)
def test_a_view_is_found_in_its_array(view: Any) -> None:
    for shape in ((4, 6, 8), (4, 6, 6)):
        whole = torch.randn(shape)
        place = place_of(whole, view(whole))
        assert place is not None and torch.equal(place.of(whole), view(whole))
        assert (place == WHOLE) == (view(whole) is whole)
    assert place_of(whole, whole[:, ::2]) is None


def test_the_side_that_experts_read_is_the_width_of_the_model() -> None:
    config = {"num_experts": 4, "hidden_size": 32}
    shapes = {
        "layers.0.ffn.experts.gate_up_proj": (4, 32, 64),  # (e, in, out)
        "layers.0.ffn.experts.down_proj": (4, 32, 32),  # as its neighbour
        "layers.0.moe.input_linear.weight": (4, 64, 32),
        "layers.0.conv.weight": (4, 32, 32),
        "layers.0.slope": (4, 1, 1),
    }
    found = arrays(shapes, config)
    assert {name: next(iter(places.values())).transposed for name, places in found.items()} == {
        "layers.0.ffn.experts.gate_up_proj": True,
        "layers.0.ffn.experts.down_proj": True,
        "layers.0.moe.input_linear.weight": False,
    }
    assert list(found["layers.0.moe.input_linear.weight"])[3] == "layers.0.moe.input_linear.experts.3.weight"


def test_what_stays_in_float_is_told_and_why() -> None:
    names = {
        "model.layers.0.a.weight": (64, 64),
        "model.layers.0.b": (192, 64),
        "model.embed.weight": (320, 64),
    }
    tensors = {name: SimpleNamespace(shape=shape) for name, shape in names.items()}
    checkpoint: Any = SimpleNamespace(tensors=tensors, config={})
    assert not isinstance(checkpoint, Checkpoint)
    jobs: list[Any] = [
        SimpleNamespace(sources=(name,), quantized=name.endswith("a.weight")) for name in names
    ]
    rows: list[Any] = [
        SimpleNamespace(name=name, format="int4" if job.quantized else "f32", rule=None, reason="no matrix")
        for name, job in zip(names, jobs, strict=True)
    ]
    told = r"only 25.0% of the weights in blocks got int4; the rest: 75.0% in 1 tensors such as model\.l"
    with pytest.warns(CoverageWarning, match=told):
        coverage = coverage_of(checkpoint, jobs, rows, "int4")
    receipt = Receipt("a", "b", (), "", "", (), (), 0.0, 0, {}, coverage=coverage)
    assert receipt.table().startswith("25.0% of the weights in blocks got int4; not: 75.0% no matrix")
    assert coverage_of(checkpoint, jobs, rows, None) == {}


OTHERS: dict[str, dict[str, Any]] = {
    "exaone": {  # LlamaForCausalLM, with other names in files
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
        "num_key_value_heads": 2, "head_dim": 16,
    },
    "bigbird_pegasus": {  # its config ties, its class does not
        "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_named_unlike_its_class_runs_as_transformers_has_it(kind: str, tmp_path: Path) -> None:
    config = transformers.CONFIG_MAPPING[kind](**{"vocab_size": 320} | OTHERS[kind])
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "float")
    fewbits.quantize(tmp_path / "float", tmp_path / "int4", to="int4_g32", effort="fast", verify=False)
    fewbits.convert(tmp_path / "int4", tmp_path / "decoded", file="huggingface")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "decoded", dtype=torch.float32)
        found = fewbits.load(tmp_path / "int4")(input_ids=ids).logits
        torch.testing.assert_close(found, twin.eval()(input_ids=ids).logits)


def test_a_model_without_numbered_blocks_is_not_left_uncalibrated_in_silence(tmp_path: Path) -> None:
    config = transformers.XLMConfig(vocab_size=320, emb_dim=64, n_layers=2, n_heads=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "float")
    text = Tokens.of(torch.randint(3, 300, (4, 24)), "random")
    with pytest.raises(PlanError, match="no name has the number of a block"):
        fewbits.quantize(tmp_path / "float", tmp_path / "out", to="int4_g32", method="gptq", calibrate=text)
