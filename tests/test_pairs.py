"""Pairs: where they are found and where not, scales that storage cannot move, and the numeric check."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbits.calibrate.stats import Stats
from fewbits.dtypes import F32
from fewbits.errors import CalibrationError, ModelError
from fewbits.files.checkpoint import Checkpoint, LazyTensor
from fewbits.files.open import FILE_TYPES
from fewbits.formats import kind_of
from fewbits.transforms import Pair, applied, apply, checked, find_pairs, rescaled, scaled
from fewbits.transforms.check import TOLERANCE
from fewbits.transforms.pairs import WIDEST, Rows, Vector, settled

H, F = 8, 12
LLAMA = {
    "input_layernorm.weight": (H,),
    "self_attn.q_proj.weight": (H, H),
    "self_attn.k_proj.weight": (4, H),
    "self_attn.v_proj.weight": (4, H),
    "self_attn.o_proj.weight": (H, H),
    "post_attention_layernorm.weight": (H,),
    "mlp.gate_proj.weight": (F, H),
    "mlp.up_proj.weight": (F, H),
    "mlp.down_proj.weight": (H, F),
}
CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": H}


def block_of(*extra: dict, without: tuple[str, ...] = (), **config: object) -> Checkpoint:
    """A checkpoint of one random block with the tensors of LLAMA, and others, f32."""
    shapes = {name: shape for part in (LLAMA, *extra) for name, shape in part.items() if name not in without}
    tensors = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        full = f"model.layers.0.{name}"
        tensors[full] = LazyTensor(full, shape, F32, value.nbytes, "", lambda value=value: value)
    return Checkpoint(Path("made-up"), FILE_TYPES.get("huggingface"), tensors, {**CONFIG, **config})


def found(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Pair -> its consumers, short."""
    cut = len("model.layers.0.")
    return {
        pair.name[cut:]: [name[cut:].removesuffix(".weight") for name in pair.consumers]
        for pair in find_pairs(checkpoint)
    }


QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
GATE_UP = ["mlp.gate_proj", "mlp.up_proj"]


def test_the_pairs_of_a_plain_block() -> None:
    assert found(block_of()) == {
        "input_layernorm": QKV,
        "post_attention_layernorm": GATE_UP,
        "self_attn.v_proj > o": ["self_attn.o_proj"],
        "mlp.up > down": ["mlp.down_proj"],
    }


def test_a_norm_after_a_part_is_no_producer() -> None:
    post = {"post_feedforward_layernorm.weight": (H,)}
    before = {"pre_feedforward_layernorm.weight": (H,)}
    gemma, olmo = found(block_of(post, before)), found(block_of(post))
    assert gemma["pre_feedforward_layernorm"] == GATE_UP
    assert "post_attention_layernorm" not in gemma | olmo
    assert not {"mlp.gate_proj", "mlp.up_proj"} & {name for read in olmo.values() for name in read}


def test_a_block_with_one_norm_scales_both_its_parts() -> None:
    parallel = found(block_of(without=("post_attention_layernorm.weight",)))
    assert parallel["input_layernorm"] == QKV + GATE_UP


@pytest.mark.parametrize(
    ("extra", "gone"),
    [
        ({"input_layernorm.bias": (H,)}, {"input_layernorm"}),
        ({"self_attn.v_norm.weight": (2,)}, {"self_attn.v_proj > o"}),
        ({"self_attn.sub_norm.weight": (H,)}, {"self_attn.v_proj > o"}),
        ({"self_attn.g_proj.weight": (H, H)}, {"input_layernorm", "self_attn.v_proj > o"}),
        ({"mlp.ffn_sub_norm.weight": (F,)}, {"mlp.up > down"}),
        ({"mlp.side.weight": (F, H)}, {"post_attention_layernorm"}),
        ({"self_attn.q_norm.weight": (2,), "self_attn.k_norm.weight": (2,)}, set()),
        ({"self_attn.o_proj.bias": (H,), "mlp.down_proj.bias": (H,)}, set()),
    ],
)
def test_what_is_not_understood_or_not_exact_is_left_out(extra: dict, gone: set[str]) -> None:
    assert set(found(block_of())) - set(found(block_of(extra))) == gone


def test_a_feed_forward_without_gate_has_no_inner_pair() -> None:
    assert "mlp.up > down" not in found(block_of(without=("mlp.gate_proj.weight",)))


def test_a_bias_of_the_producer_is_divided_with_its_rows() -> None:
    checkpoint = block_of({"self_attn.v_proj.bias": (4,), "mlp.up_proj.bias": (F,)})
    inner = [pair for pair in find_pairs(checkpoint) if pair.rows]
    assert [pair.vector and pair.vector.name.split(".")[-2] for pair in inner] == ["v_proj", "up_proj"]


def test_shared_heads_spread_and_gather() -> None:
    """Key-value head g serves the query heads 3g, 3g + 1, 3g + 2: o reads a column of v three times."""
    pair = Pair("p", 4, (), head=2, repeat=3)
    spread = pair.spread(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert spread.tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    columns = torch.arange(12.0)
    assert pair.gathered(columns, "amax").tolist() == [4, 5, 10, 11]
    assert pair.gathered(columns, "mean").tolist() == [2, 3, 8, 9]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_settled_scale_is_exact_for_what_is_stored(dtype: torch.dtype, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(500, generator=generator).to(dtype).float()
    stored[::50] = -offset  # columns that the norm silences
    pair = Pair("norm", 500, ("w",), vector=Vector("norm", dtype, 0, offset))
    weights = {"norm": stored, "w": torch.randn(3, 500, generator=generator)}
    scale = settled(weights, pair, torch.randn(500, generator=generator).exp())
    new = apply(weights, pair, scale)
    assert torch.equal(new["norm"].to(dtype).float(), new["norm"])
    before = (stored + offset) * weights["w"]
    after = (new["norm"] + offset) * new["w"]
    # Two roundings of the scale and one of the product, in f32.
    assert bool(((after - before).abs() <= 2**-22 * before.abs()).all())
    assert not torch.equal(new["norm"], stored)


def test_settled_scales_are_bounded_and_of_mean_one() -> None:
    pair = Pair("up > down", 6, ("w",), rows=Rows("up"))
    scale = settled({}, pair, torch.tensor([1e-30, 1.0, 1.0, 1.0, 1.0, 1e30]))
    assert scale.tolist() == [1 / WIDEST, 1, 1, 1, 1, WIDEST]
    assert settled({}, pair, torch.full((6,), 7.0)).tolist() == pytest.approx([1.0] * 6)
    for bad in (0.0, -1.0, torch.nan, torch.inf):
        with pytest.raises(ModelError, match="not positive and finite"):
            settled({}, pair, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, bad]))


def test_rescaled_statistics_are_those_of_the_scaled_input() -> None:
    generator = torch.Generator().manual_seed(0)
    x, floats = torch.randn(2, 50, 12, generator=generator)
    pair = Pair("v > o", 6, ("o",), rows=Rows("v"), head=3, repeat=2)
    scale = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0, 8.0])  # powers of two: division is exact
    got = rescaled(Stats.of(x, floats=floats), pair, scale)
    want = Stats.of(x / pair.spread(scale), floats=floats / pair.spread(scale))
    assert got.count == want.count
    for part in ("absmax", "mean_square", "hessian", "mismatch"):
        torch.testing.assert_close(getattr(got, part), getattr(want, part))


def test_vectors_that_are_quantized_are_refused() -> None:
    checkpoint = block_of()
    norm = "model.layers.0.input_layernorm.weight"
    tensors = {**checkpoint.tensors, norm: replace(checkpoint.tensors[norm], kind=kind_of("q8_0"))}
    with pytest.raises(ModelError, match="stored as q8_0"):
        find_pairs(replace(checkpoint, tensors=tensors))


def test_quantized_weights_are_not_rewritten() -> None:
    checkpoint = block_of()
    down = "model.layers.0.mlp.down_proj.weight"
    tensors = {**checkpoint.tensors, down: replace(checkpoint.tensors[down], kind=kind_of("q4_0"))}
    checkpoint = replace(checkpoint, tensors=tensors)
    (pair,) = [pair for pair in find_pairs(checkpoint) if down in pair.consumers]
    with pytest.raises(ModelError, match=r"down_proj.* as q4_0"):
        scaled(checkpoint, [(pair, torch.ones(pair.size))])


# ---- the check -----------------------------------------------------------------------------------


def feed_forward(weights: dict) -> torch.Tensor:
    x = torch.randn(7, H, generator=torch.Generator().manual_seed(3))
    w = {name.removeprefix("model.layers.0.mlp.").split("_")[0]: value for name, value in weights.items()}
    return (torch.nn.functional.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T


@pytest.fixture
def inner() -> tuple[dict, Pair]:
    checkpoint = block_of()
    (pair,) = [pair for pair in find_pairs(checkpoint) if pair.name.endswith("down")]
    return {name: tensor.load() for name, tensor in checkpoint.tensors.items() if ".mlp." in name}, pair


def test_the_check_keeps_what_is_exact_and_drops_what_moves(inner: tuple[dict, Pair]) -> None:
    weights, pair = inner
    scale = torch.linspace(0.5, 2, F)
    gate = "model.layers.0.mlp.gate_proj.weight"
    broken = replace(pair, name="gate > down", rows=Rows(gate))  # silu is not linear
    kept, dropped = checked(
        weights, [(broken, scale), (pair, scale)], lambda new: feed_forward({**weights, **new})
    )
    assert [choice[0] for choice in kept] == [pair]
    moved = feed_forward({**weights, **applied(weights, [(broken, scale)])}) - feed_forward(weights)
    assert dropped == {"gate > down": pytest.approx(float(moved.norm() / feed_forward(weights).norm()))}
    assert dropped["gate > down"] > 100 * TOLERANCE


def test_the_check_drops_what_is_not_finite(inner: tuple[dict, Pair]) -> None:
    weights, pair = inner

    def run(new: dict) -> torch.Tensor:
        return feed_forward({**weights, **new}) * (torch.nan if new else 1.0)

    kept, dropped = checked(weights, [(pair, torch.ones(F))], run)
    assert kept == [] and list(dropped) == [pair.name]


def test_nothing_is_compared_with_an_output_of_zero(inner: tuple[dict, Pair]) -> None:
    weights, pair = inner
    with pytest.raises(CalibrationError, match="nothing can be compared"):
        checked(weights, [(pair, torch.ones(F))], lambda new: torch.zeros(3))
    assert checked(weights, [], lambda new: torch.zeros(3)) == ([], {})
