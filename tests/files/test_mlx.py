"""MLX directories: mlx's bytes, what other tools' configs say, exactness, and what contradicts itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.errors import FileError, FormatError
from fewbits.files.directory import FILE_TYPES
from fewbits.files.integers import from_integers
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from tests.files.directories import write_directory
from tests.files.integer_cases import formula

# Made by mlx 0.32.4: FEWBITS_UPDATE_GOLDEN=1 pytest -m engine tests/engines/test_mlx.py
GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "mlx" / "mlx.safetensors")
CASES = sorted({tuple(key.split(".")[:2]) for key in GOLDEN})
PARTS = ("weight", "scales", "biases")
DTYPES = {"float16": "", "bfloat16": "_bf16", "float32": "_f32"}
MLX = FILE_TYPES.get("mlx")
A, B = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def community(path, modules, settings, keys=("quantization", "quantization_config")):
    """A directory as mlx-lm writes it: module -> its golden case."""
    path.mkdir()
    cases = [(module, case, part) for module, case in modules.items() for part in PARTS]
    arrays = {f"{module}.{part}": GOLDEN[f"{case}.{part}"] for module, case, part in cases}
    save_file(arrays, path / "model.safetensors", {"format": "mlx"})
    (path / "config.json").write_text(json.dumps(dict.fromkeys(keys, settings)))
    return path


@pytest.mark.parametrize(("bits", "dtype"), CASES)
def test_what_mlx_wrote_is_read_as_mlx_decodes_it(tmp_path, bits, dtype):
    settings = {"group_size": 32, "bits": int(bits)}
    path = community(tmp_path / "m", {A: f"{bits}.{dtype}"}, settings, keys=["quantization"])
    checkpoint = open_checkpoint(path)
    found = checkpoint.tensors[f"{A}.weight"].load()
    assert found.format.name == f"int{bits}_g32_asym_float{DTYPES[dtype]}"
    assert torch.equal(found.decode(), GOLDEN[f"{bits}.{dtype}.decoded"])
    for ours, part in zip(MLX.pack(found), PARTS, strict=True):
        assert torch.equal(ours, GOLDEN[f"{bits}.{dtype}.{part}"]), part
    assert checkpoint.config == {}


def test_other_settings_of_a_module(tmp_path):
    settings = {"group_size": 64, "bits": 4, B: {"group_size": 32, "bits": 6}, A: {"group_size": 32}}
    path = community(tmp_path / "m", {A: "4.bfloat16", B: "6.float16"}, settings)
    tensors = open_checkpoint(path).tensors
    assert tensors[f"{A}.weight"].dtype == "int4_g32_asym_float_bf16"
    assert tensors[f"{B}.weight"].dtype == "int6_g32_asym_float"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "mxfp4"}, f"{A}: mode 'mxfp4', 4 bits, group_size 32; supported: affine"),
        ({"bits": 7}, "7 bits"),
        ({"group_size": 16}, "group_size 16"),
        ({"group_size": 64}, r"plane 'scales' is F16 \(8, 2\), .* needs F16 \(8, 1\)"),
        ({"bits": 3}, r"weight \(8, 8\) has no whole groups of 32 columns in 3 bits"),
        ({A: {"bits": 8}}, r"in 8 bits"),
        ({"fewbits": {"format": "int5_g32"}}, "`fewbits` says int5_g32, the settings 4 bits in groups of 32"),
        ({"fewbits": {"format": "q4_k"}}, "`fewbits` says q4_k"),
        ({"fewbits": {"format": "int4_g32_asym"}}, "plane 'scales' is F16"),
    ],
)
def test_what_contradicts_is_told(tmp_path, settings, message):
    path = community(tmp_path / "m", {A: "4.float16"}, {"group_size": 32, "bits": 4, **settings})
    with pytest.raises(FileError, match=message):
        open_checkpoint(path)


def test_biases_that_are_no_zeros_are_told(tmp_path):
    settings = {"group_size": 32, "bits": 4, "fewbits": {"format": "int4_g32_asym"}}
    path = community(tmp_path / "m", {A: "4.float32"}, settings)
    with pytest.raises(FormatError, match=r"of 16 biases are no multiples.*without it they open"):
        open_checkpoint(path).tensors[f"{A}.weight"].load()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", ["", "_bf16", "_asym", "_asym_bf16"])
def test_another_tool_finds_the_same_values(bits, kind):
    """scale * code + bias, in f32, with scales and biases as they lie there."""
    q = formula(f"int{bits}_g32{kind}")
    words, scale, bias = MLX.pack(q)
    dtype = {torch.float16: "", torch.bfloat16: "_bf16", torch.float32: "_f32"}[scale.dtype]
    floats = FORMATS.get(f"int{bits}_g32_asym_float{dtype}")
    assert torch.equal(MLX.unpack(floats, q.shape, (words, scale, bias)).decode(), q.decode())
    assert scale.dtype == (torch.float32 if "asym" in kind else q.format.dtype)


@pytest.mark.parametrize("kind", ["_asym", "_asym_bf16"])
def test_every_scale_and_zero_comes_back(kind):
    """All scales of 16 bits but 0 (of bf16 those whose product with 255 f32 holds), under zeros of 8 bits."""
    format = FORMATS.get(f"int8_g32{kind}")
    scale = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(format.dtype)
    scale = scale[(scale.float().abs() < 2.0**119) & (scale != 0)][:, None]
    codes = torch.zeros(len(scale), 32, dtype=torch.uint8)
    for zero in (0, 1, 127, 128, 255):
        zeros = torch.full(scale.shape, zero, dtype=torch.uint8)
        q = from_integers(format, (len(scale), 32), codes, scale, zeros)
        back = MLX.unpack(format, q.shape, MLX.pack(q))
        assert torch.equal(back.planes["zero"], q.planes["zero"])
        assert torch.equal(back.planes["scale"].view(torch.int16), scale.view(torch.int16))


def test_a_scale_of_zero_keeps_its_values():
    q = from_integers(FORMATS.get("int4_g32_asym"), (1, 32), torch.arange(32)[None].to(torch.uint8) % 16,
                      torch.zeros(1, 1).half(), torch.tensor([[7]]).to(torch.uint8))  # fmt: skip
    back = MLX.unpack(q.format, q.shape, MLX.pack(q))
    assert torch.equal(back.decode(), q.decode())


def test_a_bias_past_f16_is_refused():
    q = from_integers(FORMATS.get("int4_g32"), (1, 32), torch.zeros(1, 32).to(torch.uint8),
                      torch.full((1, 1), 2.0**13).half(), torch.full((1, 1), 8).to(torch.uint8))  # fmt: skip
    with pytest.raises(FormatError, match=r"1 scales times their zeros are past the range of torch\.float16"):
        MLX.pack(q)


def test_a_mixture_is_said_by_module(tmp_path):
    tensors = {f"{A}.weight": formula("int4_g32_asym"), f"{B}.weight": formula("int8_g64"),
               "x.weight": formula("int4_g32_asym"), "lm_head.weight": formula("int4_g32")}  # fmt: skip
    path = write_directory(tmp_path / "m", "mlx", tensors)
    said = json.loads((path / "config.json").read_text())
    assert said["quantization"] == said["quantization_config"]
    assert {key for key in said["quantization"] if "." in key} == {B}
    assert said["quantization"][B] == {"bits": 8, "group_size": 64, "mode": "affine"}
    found = open_checkpoint(path).tensors
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: q.format.name for name, q in tensors.items()
    }


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
    ],
)
def test_rotary_settings_stand_where_mlx_lm_looks_for_them(rope, said):
    config = MLX.settings({}, {"rope_parameters": rope}, {})["config.json"]
    assert {key: config.get(key) for key in said} == said and config["rope_parameters"] == rope
    assert (
        MLX.settings({}, {"rope_parameters": rope, "rope_theta": 7.0}, {})["config.json"]["rope_theta"] == 7.0
    )
