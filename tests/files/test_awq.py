"""AWQ directories: the package's bytes, what configs say, and what contradicts itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewbits.errors import FileError, FormatError, PlanError
from fewbits.files.directory import FILE_TYPES
from fewbits.files.open import open_checkpoint
from tests.files.directories import write_directory
from tests.files.integer_cases import formula

# Made by GPTQModel 7.7.0: FEWBITS_UPDATE_GOLDEN=1 pytest -m engine tests/engines/test_gptqmodel.py
GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "awq" / "gptqmodel.safetensors")
PARTS = ("qweight", "scales", "qzeros")
AWQ = FILE_TYPES.get("awq")
MLP = "model.layers.0.mlp."
FLOAT = torch.zeros(4, 64).bfloat16()


@pytest.mark.parametrize("format", ["int4_g32", "int4_g32_asym"])
def test_the_bytes_are_the_package_s(format):
    q, golden = formula(format), [GOLDEN[f"{format}.awq.{part}"] for part in PARTS]
    for ours, theirs, part in zip(AWQ.pack(q), golden, PARTS, strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype)), part
    back = AWQ.unpack(q.format, q.shape, [golden[0], golden[1].half(), golden[2]])
    assert all(torch.equal(back.planes[plane], value) for plane, value in q.planes.items())


def directory(path, tensors, settings=None):
    write_directory(path, "awq", tensors)
    if settings is not None:
        (path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "format": "gemm", "zero_point": True},
        {"quant_method": "awq", "group_size": 32},
    ],
)
def test_other_words_for_the_same(tmp_path, settings):
    path = directory(tmp_path / "m", {f"{MLP}up_proj.weight": formula("int4_g32_asym")}, settings)
    assert open_checkpoint(path).tensors[f"{MLP}up_proj.weight"].dtype == "int4_g32_asym"


def test_autoawq_s_own_file_is_enough(tmp_path):
    path = directory(tmp_path / "m", {f"{MLP}up_proj.weight": formula("int4_g32_asym")})
    (path / "config.json").write_text("{}")
    (path / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 32, "zero_point": true}')
    assert open_checkpoint(path).tensors[f"{MLP}up_proj.weight"].dtype == "int4_g32_asym"


def test_symmetric_only_where_the_config_says_so(tmp_path):
    name, settings = f"{MLP}up_proj.weight", {"quant_method": "awq", "group_size": 32}
    path, q = directory(tmp_path / "m", {name: formula("int4_g32")}, settings), formula("int4_g32")
    found = open_checkpoint(path).tensors[name].load()
    assert found.format.name == "int4_g32_asym"
    assert torch.equal(found.decode(), q.decode())
    other = {**settings, "zero_point": False}
    path = directory(tmp_path / "n", {name: formula("int4_g32_asym")}, other)
    with pytest.raises(FormatError, match="zero points are not 8"):
        open_checkpoint(path).tensors[name].load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "gemv"}, "version 'gemv'; supported: 4 bits, group_size -1 or more, version gemm"),
        ({"format": "llm-awq"}, "version 'llm-awq'"),
        ({"bits": 8}, "AWQ of 8 bits"),
        ({"group_size": 48}, "no whole groups of 48 columns"),
        ({"group_size": 64}, r"plane 'scales' is F16 \(2, 32\), int4_g64_asym .* needs F16 \(1, 32\)"),
        ({"group_size": None}, "group_size None"),
    ],
)
def test_what_contradicts_is_told(tmp_path, settings, message):
    tensors = {f"{MLP}up_proj.weight": formula("int4_g32_asym")}
    path = directory(tmp_path / "m", tensors, {"quant_method": "awq", "group_size": 32, **settings})
    with pytest.raises(FileError, match=message):
        open_checkpoint(path)


def test_one_format_for_all(tmp_path):
    tensors = {f"{MLP}{i}.weight": formula("int4_g32_asym" if i else "int4_g64") for i in range(3)}
    with pytest.raises(PlanError, match=rf"{MLP}0\.weight: is int4_g64, others are int4_g32_asym.*gptq_v2"):
        write_directory(tmp_path / "m", "awq", tensors)


def test_float_modules_are_named(tmp_path):
    tensors = {f"{MLP}up_proj.weight": formula("int4_g32"), f"{MLP}router.weight": FLOAT}
    path = write_directory(tmp_path / "m", "awq", tensors)
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == [f"{MLP}router"]


def test_a_float_module_that_would_take_others_with_it_is_refused(tmp_path):
    tensors = {f"{MLP}gate_proj.weight": formula("int4_g32"), f"{MLP}gate.weight": FLOAT}
    with pytest.raises(PlanError, match=r"mlp\.gate stays in float, .*mlp\.gate_proj in float"):
        write_directory(tmp_path / "m", "awq", tensors)
