"""compressed-tensors directories: what the package wrote is read, and what contradicts itself is refused.

tests/golden/compressed_tensors is made by the package (tests/engines/test_compressed_tensors.py says how):
14 weights 20 x 160, each in another scheme, and what the package decodes them to.
"""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.errors import FewbitsError, FileError, FormatError, PlanError
from fewbits.files.compressed_tensors.config import ACTIVATIONS
from fewbits.files.directory import FILE_TYPES
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS, kind_of
from fewbits.formats.floats import reciprocal_twice
from fewbits.qtensor import QTensor
from tests.files.directories import CONFIG, kinds, random_qtensor, write_directory

GOLDEN = Path(__file__).parents[1] / "golden" / "compressed_tensors"
LAYOUT = FILE_TYPES.get("compressed-tensors")
FOUND = {
    "int4_g32": "int4_g32_bf16",
    "int4_g32_asym": "int4_g32_asym",
    "int3_asym": "int3_channel_asym_f32",
    "int5_tensor": "int5_tensor_f32",
    "int8": "int8_channel_f32",
    "int4_bytes": "int4_channel_f32",
    "int8_asym": "int8_g16_asym_bf16",
    "fp8": "fp8_e4m3_channel",
    "fp8_tensor": "fp8_e4m3_tensor_bf16",
    "fp8_block": "fp8_e4m3_block128",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
    "mxfp6": "mxfp6_e2m3",
    "mxfp8": "mxfp8_e4m3",
}
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("module", FOUND)
def test_what_the_package_wrote_decodes_to_what_it_decodes(module):
    """The package decodes in the type of the scale, e2m1 and e2m3 in bf16: ours, so rounded, is the same."""
    read = open_checkpoint(GOLDEN).tensors
    assert set(read) == {f"model.{name}.weight" for name in FOUND}
    value = read[f"model.{module}.weight"].load()
    assert value.format.name == FOUND[module]
    decoded = load_file(GOLDEN / "decoded.safetensors")[f"model.{module}.weight"]
    assert torch.equal(value.decode().to(decoded.dtype), decoded)


def test_written_again_it_is_the_same_bytes(tmp_path):
    """But for integers in bytes, which are packed where no integer activations meet them."""
    given = {name: tensor.load() for name, tensor in open_checkpoint(GOLDEN).tensors.items()}
    path = write_directory(tmp_path / "m", LAYOUT, given)
    written, before = (load_file(place / "model.safetensors") for place in (path, GOLDEN))
    packed = [f"model.{module}." for module in ("int8", "int4_bytes", "int8_asym")]
    same = [key for key in before if not key.startswith(tuple(packed))]
    assert len(same) == 29
    for key in same:
        assert written[key].dtype == before[key].dtype
        assert torch.equal(written[key].view(torch.uint8), before[key].view(torch.uint8)), key


def test_int8_lies_in_bytes_where_integer_activations_meet_it(tmp_path):
    given = {UP: random_qtensor(FORMATS.get("int8_channel_asym_f32"), 64, 96)}
    layout = LAYOUT.with_runtime("int8_dynamic")
    path = write_directory(tmp_path / "m", layout, given)
    assert load_file(path / "model.safetensors")[UP].dtype == torch.int8
    found = open_checkpoint(path).tensors[UP].load()
    assert all(torch.equal(found.planes[name], value) for name, value in given[UP].planes.items())
    group = settings(path)["config_groups"]["group_0"]
    assert group["format"] == settings(path)["format"] == "int-quantized"
    assert group["input_activations"]["strategy"] == "token" and group["targets"] == ["Linear"]


def test_a_static_scheme_writes_its_ranges(tmp_path):
    q = random_qtensor(FORMATS.get("int8_channel"), 64, 96)
    layout = LAYOUT.with_runtime("int8_asymmetric_static")
    names = [array.key for array in layout.arrays(UP, q.format, q.shape)]
    about = {"activations": {"scheme": "int8_asymmetric_static", "left": [], "ranges": {UP: [0.5, -3]}}}
    parts = dict(zip(names, layout.packer(UP, about)(q), strict=True))
    module = UP.removesuffix(".weight")
    assert parts[f"{module}.input_scale"].tolist() == [0.5]
    assert parts[f"{module}.input_zero_point"].tolist() == [-3]
    group = layout.settings(kinds({UP: q}), CONFIG, about)["config.json"]["quantization_config"]
    assert group["config_groups"]["group_0"]["input_activations"]["dynamic"] is False
    assert layout.arrays("lm_head.weight", q.format, q.shape) == LAYOUT.arrays(
        "lm_head.weight", q.format, q.shape
    )


def test_a_static_scheme_of_experts_is_refused():
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    with pytest.raises(PlanError, match="experts have no range"):
        LAYOUT.with_runtime("int8_static").settings({name: (kind_of("int8_channel"), (64, 64))}, CONFIG, {})
    found = LAYOUT.with_runtime("int8_dynamic").settings(
        {name: (kind_of("int8_channel"), (64, 64))},
        CONFIG,
        {"activations": {"scheme": "int8_dynamic", "left": ["model.layers.0.mlp.experts.gate_up_proj"]}},
    )
    groups = found["config.json"]["quantization_config"]["config_groups"]
    assert groups["group_0"]["input_activations"] is None


def test_inputs_left_in_float_take_what_is_fused_with_them_along():
    parts = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
    given = {name: random_qtensor(FORMATS.get("int8_channel"), 32, 32) for name in parts}
    about = {"activations": {"scheme": "int8_dynamic", "left": [parts[1]]}}
    said = LAYOUT.with_runtime("int8_dynamic").settings(kinds(given), CONFIG, about)["config.json"]
    groups = said["quantization_config"]["config_groups"].values()
    left = next(group["targets"] for group in groups if group["input_activations"] is None)
    assert left == [rf"re:model\.layers\.\d+\.self_attn\.{part}_proj$" for part in "qkv"]


def test_a_mixture_names_its_modules_and_what_stays_in_float(tmp_path):
    given = {
        "model.embed_tokens.weight": torch.randn(8, 64).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": random_qtensor(FORMATS.get("int4_g32"), 64, 64),
        "model.layers.0.mlp.down_proj.weight": random_qtensor(FORMATS.get("nvfp4"), 64, 64),
        "model.layers.1.mlp.up_proj.weight": random_qtensor(FORMATS.get("fp8_e4m3_channel"), 64, 64),
        "model.layers.1.mlp.down_proj.weight": torch.randn(64, 64).bfloat16(),
        "model.norm.weight": torch.randn(64).bfloat16(),
    }
    path = write_directory(tmp_path / "m", LAYOUT, given)
    said = settings(path)
    assert said["format"] == "mixed-precision"
    assert [group["targets"] for group in said["config_groups"].values()] == [
        ["model.layers.0.mlp.up_proj"],
        ["model.layers.0.mlp.down_proj"],
        ["model.layers.1.mlp.up_proj"],
    ]
    assert said["ignore"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    read = open_checkpoint(path).tensors
    for name, value in given.items():
        kind = value.format.name if isinstance(value, QTensor) else "bf16"
        assert read[name].dtype == kind


@pytest.mark.parametrize(
    ("formats", "fault"),
    [
        (
            {"self_attn.q_proj": "int4_g32", "self_attn.k_proj": "int8_g32"},
            r"self_attn \(attention\).*one matrix",
        ),
        ({"self_attn.q_proj": "int4_g32", "self_attn.k_proj": None}, r"k_proj.*one matrix"),
        ({"mlp.gate_proj": "nvfp4", "mlp.up_proj": "mxfp4"}, r"mlp \(mlp\).*one matrix"),
        ({"mlp.experts.0.up_proj": "int4_g32", "mlp.experts.1.down_proj": "int4_g64"}, "experts.*one matrix"),
        ({"embed_tokens": "int4_g32"}, "embeddings in int4_g32"),
    ],
)
def test_a_mixture_that_engines_fuse_is_refused(formats, fault):
    rows = {
        f"model.layers.0.{part}.weight": (kind_of(kind or "bf16"), (64, 64)) for part, kind in formats.items()
    }
    with pytest.raises(PlanError, match=fault):
        LAYOUT.settings(rows, CONFIG, {})


@pytest.mark.parametrize(
    ("format", "activations"), [("fp8_e4m3_channel", "int8_dynamic"), ("nvfp4", "fp8_dynamic")]
)
def test_activations_that_no_engine_multiplies_are_refused(format, activations):
    with pytest.raises(PlanError, match=UP):
        LAYOUT.with_runtime(activations).settings({UP: (kind_of(format), (64, 64))}, CONFIG, {})
    with pytest.raises(PlanError, match="int8_dynamic"):
        LAYOUT.with_runtime("int2_dynamic")
    assert all(LAYOUT.with_runtime(name).activations == name for name in ACTIVATIONS)


def test_a_global_scale_whose_reciprocal_does_not_come_back_is_refused():
    q = random_qtensor(FORMATS.get("nvfp4"), 16, 32)
    scales = 1 + torch.arange(2**23, 2**24, 4097) / 2**23
    lost = next(s for s in scales if 1 / (1 / s) != s)
    with pytest.raises(FormatError, match="not the reciprocal"):
        LAYOUT.pack(QTensor(q.format, q.shape, {**q.planes, "global_scale": lost.reshape(1, 1)}))
    kept = reciprocal_twice(scales)
    assert torch.equal(reciprocal_twice(kept), kept)
    assert torch.allclose(kept, scales, rtol=2**-22, atol=0)


def settings(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def changed(path, tensors=None, **config):
    """The golden directory with some things changed; None removes one."""
    shutil.copytree(GOLDEN, path)
    found = load_file(path / "model.safetensors") | (tensors or {})
    save_file({k: v for k, v in found.items() if v is not None}, path / "model.safetensors", {"format": "pt"})
    content = json.loads((path / "config.json").read_text())
    content["quantization_config"] |= config
    (path / "config.json").write_text(json.dumps(content))
    return path


def group(**weights):
    said = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32} | weights
    return {"group_0": {"targets": ["Linear"], "weights": said, "format": "pack-quantized"}}


@pytest.mark.parametrize(
    ("tensors", "config", "faults"),
    [
        ({"model.int4_g32.weight_scale": None}, {}, ["int4_g32.*'weight_scale' is missing"]),
        ({"model.int3_asym.weight_shape": None}, {}, ["int3_asym.*'weight_shape' is missing"]),
        ({"model.int4_g32.weight_shape": torch.tensor([20, -1])}, {}, ["weight_shape is 20 x -1"]),
        ({"model.int4_g32.weight_shape": torch.tensor([20, 192])}, {}, ["'weight_packed' is I32 .*needs"]),
        ({"model.int4_g32.weight_shape": torch.tensor([20, 150])}, {}, ["not whole groups of 32"]),
        ({"model.fp8.weight": None, "model.int8.weight": None}, {}, ["fp8: plane 'weight'", "int8: plane"]),
        ({}, {"ignore": ["model.int8", "re:.*fp4$"]}, ["int8: .*ignore leaves", "nvfp4", "mxfp4"]),
        ({}, {"config_groups": {}}, ["int8: .*no config group"]),
        ({}, {"config_groups": []}, ["no config_groups"]),
        ({}, {"config_groups": {"W4A16": ["Linear"]}}, ["W4A16 is"]),
        ({}, {"config_groups": group(num_bits=16)}, ["'num_bits': 16"]),
        ({}, {"config_groups": group(num_bits="4")}, ["'num_bits': '4'"]),
        ({}, {"config_groups": group(group_size=None)}, ["'group_size': None"]),
        ({}, {"config_groups": group(strategy="attn_head")}, ["attn_head"]),
        ({}, {"config_groups": group(type="float")}, ["'type': 'float'"]),
        ({}, {"config_groups": group(strategy=["group"])}, ["does not read"]),
        ({}, {"transform_config": {"config_groups": {"R1": {}}}}, ["transform_config"]),
        ({"model.int4_g32.weight": torch.ones(20, 160)}, {}, ["int4_g32.*both quantized and in float"]),
        ({"model.int4_bytes.weight": torch.full((20, 160), 9, dtype=torch.int8)}, {}, []),
    ],
)  # fmt: skip
def test_contradictions_are_told(tmp_path, tensors, config, faults):
    path = changed(tmp_path / "m", tensors, **config)
    with pytest.raises(FewbitsError) as caught:
        open_checkpoint(path).tensors["model.int4_bytes.weight"].load()
    for fault in faults or ["9 ... 9 are no 4-bit"]:
        assert re.search(fault, str(caught.value)), str(caught.value)


JUNK = (None, [], {}, -1, 10**30, "re:(", [["x"]], {"a": None})


@pytest.mark.parametrize("junk", JUNK, ids=str)
def test_any_config_opens_or_is_refused(tmp_path, junk):
    """Each value of the config in turn, and of two of its groups, becomes junk."""
    content = json.loads((GOLDEN / "config.json").read_text())
    path = changed(tmp_path / "m")
    said = content["quantization_config"]
    groups = [said["config_groups"][name] for name in ("group_1", "group_10")]
    opened = 0
    for part in (said, *groups, *(group["weights"] for group in groups)):
        for key, before in part.items():
            part[key] = junk
            (path / "config.json").write_text(json.dumps(content))
            with suppress(FewbitsError):
                opened += len(open_checkpoint(path).tensors) == len(FOUND)
            part[key] = before
    assert opened  # such as kv_cache_scheme, which says nothing of weights


def test_scales_of_inputs_and_of_the_cache_are_no_weights(tmp_path):
    module = "model.layers.0.self_attn.k_proj"
    given = {f"{module}.weight": random_qtensor(FORMATS.get("fp8_e4m3_channel"), 64, 64)}
    path = write_directory(tmp_path / "m", LAYOUT, given)
    more = {f"{module}.input_scale": torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    save_file(load_file(path / "model.safetensors") | more, path / "model.safetensors", {"format": "pt"})
    assert set(open_checkpoint(path).tensors) == set(given)


def test_columns_in_another_order_are_in_act_order(tmp_path):
    """weight_g_idx, the group of each column: as it would be, all -1 (no order), permuted, out of range."""
    plain = open_checkpoint(GOLDEN).tensors["model.int4_g32.weight"].load()
    key, groups = "model.int4_g32.weight_g_idx", (torch.arange(160) // 32).to(torch.int32)
    for i, order in enumerate((groups, torch.full_like(groups, -1))):
        value = (
            open_checkpoint(changed(tmp_path / str(i), {key: order})).tensors["model.int4_g32.weight"].load()
        )
        assert torch.equal(value.decode(), plain.decode())
    read = open_checkpoint(changed(tmp_path / "m", {key: groups.flip(0)})).tensors["model.int4_g32.weight"]
    scale = plain.planes["scale"].float()
    levels = plain.decode() / scale.repeat_interleave(32, 1)
    assert read.quantized and read.dtype == "int4_g32_actorder_bf16"
    assert torch.equal(read.load().decode(), levels.round() * scale.flip(1).repeat_interleave(32, 1))
    name, index = "model.int4_g32_asym.weight", groups.flip(0)
    grid, codes = FORMATS.get("int4_g32_asym").unpack(open_checkpoint(GOLDEN).tensors[name].load())
    moved = open_checkpoint(changed(tmp_path / "z", {f"{name}_g_idx": index})).tensors[name].load()
    assert moved.format.name == "int4_g32_asym_actorder" and torch.equal(moved.planes["g_idx"][0], index)
    group = index.long()
    assert torch.equal(moved.decode(), grid.scale[:, group] * (codes.float() - grid.zero[:, group]))
    with pytest.raises(FileError, match="weight_g_idx"):
        open_checkpoint(changed(tmp_path / "bad", {key: groups + 1}))
