"""GPTQ directories: the package's bytes, what configs say, and what contradicts itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewbits.errors import FewbitsError, FileError, FormatError
from fewbits.files.directory import FILE_TYPES
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from tests.files.directories import random_qtensor, write_directory
from tests.files.integer_cases import formula

# Made by GPTQModel 7.7.0: FEWBITS_UPDATE_GOLDEN=1 pytest -m engine tests/engines/test_gptqmodel.py
GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "gptq" / "gptqmodel.safetensors")
CASES = sorted({tuple(key.split(".")[:2]) for key in GOLDEN})
PARTS = ("qweight", "scales", "qzeros", "g_idx")
NAME = "model.layers.0.mlp.up_proj.weight"
MODULE = NAME.removesuffix(".weight")


@pytest.mark.parametrize(("format", "layout"), CASES)
def test_the_bytes_are_the_package_s(format, layout):
    q, golden = formula(format), [GOLDEN[f"{format}.{layout}.{part}"] for part in PARTS]
    carried = FILE_TYPES.get(layout).refusal(q.format) is None
    assert carried == (layout == "gptq_v2" or not format.endswith("_asym"))
    if carried:
        for ours, theirs, part in zip(FILE_TYPES.get(layout).pack(q), golden, PARTS, strict=True):
            assert torch.equal(ours, theirs), part
    back = FILE_TYPES.get(layout).unpack(q.format, q.shape, golden)  # v1 too, whose zeros borrow
    assert all(torch.equal(back.planes[plane], value) for plane, value in q.planes.items())


def directory(path, changes=None, format="int4_g32"):
    """Three weights of one format; changes: of the config. None removes a key."""
    tensors = {NAME.replace("0", str(i)): formula(format) for i in range(3)}
    write_directory(path, "gptq", tensors)
    config = json.loads((path / "config.json").read_text())
    settings = {**config["quantization_config"], **(changes or {})}
    config["quantization_config"] = {key: value for key, value in settings.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_quantize_config_json_alone_is_enough(tmp_path):
    path = directory(tmp_path / "m")
    (path / "config.json").write_text("{}")
    assert open_checkpoint(path).tensors[NAME].dtype == "int4_g32"


def test_other_settings_of_a_module(tmp_path):
    pattern = {r"+:.*\.[01]\.mlp\.up": {"sym": False}, r"model\.layers\.1": {"bits": 8}}
    tensors = open_checkpoint(directory(tmp_path / "m", {"dynamic": pattern})).tensors
    assert [tensor.dtype for tensor in tensors.values()] == ["int4_g32_asym", "int4_g32_asym", "int4_g32"]


def test_the_group_size_that_no_config_says(tmp_path):
    path = directory(tmp_path / "m", {"group_size": None}, "int4_g64")  # 128 columns or more: the row has 64
    assert open_checkpoint(path).tensors[NAME].dtype == "int4_channel"


def test_another_version_is_detected_by_its_zeros(tmp_path):
    path = directory(tmp_path / "m", {"checkpoint_format": "gptq_v2", "format": "gptq_v2"})
    with pytest.raises(FormatError, match=r"64 of 64 zero points are not 8, such as 7.*one off"):
        open_checkpoint(path).tensors[NAME].load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits 5, group_size 32"),
        ({"bits": 8}, r"plane 'scales' is F16 \(2, 32\), int8_channel \(32, 32\) needs F16 \(1, 32\)"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": 16}, r"plane 'scales' is F16 \(2, 32\), int4_g16 .* needs F16 \(4, 32\)"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'.*supported: gptq and gptq_v2"),
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format 'gptq_p'"),
        ({"format": "gptq_v2"}, "checkpoint_format 'gptq', format 'gptq_v2'"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({"dynamic": {"+:(": {"bits": 8}}}, r"dynamic '\+:\(' is no regular expression"),
    ],
)
def test_what_contradicts_is_told(tmp_path, changes, message):
    path = directory(tmp_path / "m", changes)
    with pytest.raises(FileError, match=message):
        open_checkpoint(path)


def permuted(path, order):
    """The directory, with another g_idx for its weights."""
    from safetensors.torch import save_file

    arrays = load_file(path / "model.safetensors")
    changed = {key: order.clone() if key.endswith("g_idx") else value for key, value in arrays.items()}
    save_file(changed, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("desc_act", [True, False])
def test_columns_in_another_order_are_in_act_order(tmp_path, desc_act):
    """Whatever desc_act says, as old files say nothing or the wrong thing. Sizes of groups may differ."""
    for i, index in enumerate((torch.arange(64) % 2, torch.arange(64) // 40, torch.arange(64) // 32)):
        path = permuted(directory(tmp_path / str(i), {"desc_act": desc_act}), index.int())
        tensor = open_checkpoint(path).tensors[NAME]
        kind = "int4_g32" if i == 2 else "int4_g32_actorder"
        assert (tensor.dtype, tensor.quantized, tensor.shape) == (kind, True, (32, 64))
        q = formula("int4_g32")
        scale, group = q.planes["scale"].float(), torch.arange(64) // 32
        codes = q.decode() / scale[:, group]
        assert torch.equal(tensor.load().decode(), codes * scale[:, index])


@pytest.mark.parametrize(
    ("layout", "format"),
    [("gptq", "int4_g16_actorder"), ("gptq_v2", "int4_g16_actorder"), ("gptq_v2", "int3_g32_asym_actorder")],
)
def test_the_arrays_of_act_order(layout, format):
    """Codes stay where their columns are: but for g_idx, the arrays are those of the format in order."""
    q = random_qtensor(FORMATS.get(format), 32, 64)
    plain, index = q.format.without_index(q)
    *ours, g_idx = FILE_TYPES.get(layout).pack(q)
    *same, rising = FILE_TYPES.get(layout).pack(plain)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
    assert torch.equal(g_idx, index) and g_idx.dtype == rising.dtype and not torch.equal(g_idx, rising)


def test_one_weight_in_act_order_sets_desc_act(tmp_path):
    """vLLM looks at g_idx where it is set, and for a config of other settings than the common ones too."""
    kinds = ("int4_g32", "int4_g32_actorder", "int8_g32")
    given = {
        NAME.replace("0", str(i)): random_qtensor(FORMATS.get(kind), 32, 64) for i, kind in enumerate(kinds)
    }
    path = write_directory(tmp_path / "m", "gptq", given)
    settings = json.loads((path / "quantize_config.json").read_text())
    assert settings["desc_act"] is True and settings["meta"]["act_group_aware"] is False
    assert list(settings["dynamic"].values()) == [{"bits": 8, "group_size": 32, "sym": True}]
    read = open_checkpoint(path).tensors
    assert [read[name].dtype for name in given] == list(kinds)
    del given[NAME.replace("0", "1")]
    path = write_directory(tmp_path / "n", "gptq", given)
    settings = json.loads((path / "quantize_config.json").read_text())
    assert settings["desc_act"] is False and "act_group_aware" not in settings["meta"]


@pytest.mark.parametrize(
    ("layout", "format", "nearest"),
    [
        ("gptq", "int5_g32_actorder", "int8_g32"),
        ("gptq_v2", "int4_g32_asym_actorder_bf16", "int4_g32_asym"),
        ("gptq", "int4_g32_asym_actorder", "int4_g32"),
        ("awq", "int4_g32_actorder", "int4_g32"),
        ("awq", "int8_g32_actorder", "int4_g32"),
        ("mlx", "int4_g64_asym_actorder", "int4_g64_asym"),
        ("onnx", "int8_g32_actorder", "int8_g32"),
        ("compressed-tensors", "int8_g32_asym_actorder", "int8_g32_asym"),
    ],
)
def test_act_order_that_is_not_carried_names_the_nearest(layout, format, nearest):
    why = FILE_TYPES.get(layout).refusal(FORMATS.get(format))
    assert why is not None and why.endswith(nearest)


@pytest.mark.parametrize("group", [-1, 2])
def test_a_group_that_is_not_there_is_told(tmp_path, group):
    order = torch.full((64,), group, dtype=torch.int32)
    with pytest.raises(FewbitsError, match=f"g_idx names group {group}, there are 2"):
        open_checkpoint(permuted(directory(tmp_path / "m"), order))
