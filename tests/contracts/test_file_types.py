"""Every file type carries what it says, bit for bit, and names what to take instead of the rest."""

import importlib.util
import re

import pytest
import torch
from safetensors.torch import save_file

from fewbits.dtypes import DType
from fewbits.errors import FewbitsError, FileError
from fewbits.files.directory import Directory, laid_out
from fewbits.files.open import FILE_TYPES, open_checkpoint
from fewbits.formats import FORMATS
from tests.files.directories import ONE_BLOCK, kinds, one_block, random_qtensor, write_directory

MORE = ["int8_g32_asym", "int2_g64", "int3_channel", "int8_channel_asym_f32"]
MORE += ["int4_g64_bf16", "int4_g16_asym", "nf4_g128_dq", "fp4_g32"]
ALL = [(a, b) for a in FILE_TYPES for b in [*FORMATS, *MORE]]
REFUSED = [(a, b) for a, b in ALL if FILE_TYPES.get(a).reason(FORMATS.get(b)) is not None]
CASES = [(a, b) for a, b in ALL if isinstance(FILE_TYPES.get(a), Directory)]
CARRIED = [case for case in CASES if case not in REFUSED]
N, K = 64, 256
NAME = "model.layers.0.self_attn.o_proj.weight"


def tensors(layout, format):
    n = 2 * N if layout == "fp8" else N  # which has whole blocks of 128 rows alone
    return one_block(
        {
            NAME: random_qtensor(FORMATS.get(format), n, K),
            "model.layers.0.mlp.down_proj.weight": random_qtensor(FORMATS.get(format), n, 2 * K, seed=1),
        }
    )


def written(path, layout, given):
    if layout == "onnx" and importlib.util.find_spec("onnx") is None:
        pytest.skip("needs the package: pip install 'fewbits[onnx]'")
    return write_directory(path, layout, given, ONE_BLOCK)


def same_bytes(a, b):
    raw = [x.reshape(-1).clone().view(torch.uint8) for x in (a, b)]
    return a.shape == b.shape and torch.equal(*raw)


@pytest.mark.parametrize(("layout", "format"), CARRIED)
def test_what_is_written_is_read(tmp_path, layout, format):
    given = tensors(layout, format)
    read = open_checkpoint(written(tmp_path / "m", layout, given)).tensors
    assert set(read) == set(given)
    for name, value in given.items():
        found = read[name].load()
        if isinstance(value, torch.Tensor):
            assert torch.equal(found, value)
            continue
        assert read[name].quantized and found.format.name == value.format.name
        for plane, body in value.planes.items():
            assert same_bytes(found.planes[plane], body), plane


@pytest.mark.parametrize(("layout", "format"), CARRIED[:: max(1, len(CARRIED) // 25)])
def test_an_array_that_lacks_is_named(tmp_path, layout, format):
    """Each array in turn; but one that tells the layout apart from floats is then an unknown tensor."""
    given = tensors(layout, format)
    _, _, keys = laid_out(FILE_TYPES.get(layout), kinds(given))
    for i, key in enumerate(keys[NAME]):
        path = written(tmp_path / str(i), layout, given)
        name, mark = ("model.onnx", "") if layout == "onnx" else ("model.safetensors", '"')
        data = (path / name).read_bytes()
        lost = data.replace(f"{mark}{key}{mark}".encode(), f"{mark}{key[:-1]}~{mark}".encode())
        assert lost != data
        (path / name).write_bytes(lost)
        try:
            read = open_checkpoint(path).tensors
        except FileError as error:
            assert NAME.removesuffix(".weight") in str(error)
        else:
            assert NAME not in read or not read[NAME].quantized


@pytest.mark.parametrize(("layout", "format"), REFUSED)
def test_a_refusal_names_what_is_carried_and_taken(layout, format):
    """One answer: what the sentence names last, what `--requantize` takes, and what is then written."""
    file_type, shape = FILE_TYPES.get(layout), (256, 1024)
    near = file_type.nearest(FORMATS.get(format), shape)
    assert file_type.refusal(FORMATS.get(format), shape).split()[-1] == near.name
    if isinstance(near, DType):
        assert near.weight and not file_type.carries_formats
    else:
        assert file_type.refusal(near, shape) is None and file_type.fits(near, shape)


@pytest.mark.parametrize(
    ("layout", "format", "named"),
    [
        ("gguf", "int4_g128", "q4_0"), ("gguf", "int4_g128_asym", "q4_k"), ("gguf", "int8_channel", "q8_0"),
        ("gguf", "nf4", "iq4_nl"), ("gguf", "nvfp4", "iq4_nl"), ("gguf", "fp8_e4m3_channel", "q8_0"),
        ("gptq", "q4_k", "int4_g32"), ("gptq", "int4_g64_asym", "int4_g64"),
        ("gptq_v2", "q4_k", "int4_g32_asym"),
        ("awq", "int8_g128", "int4_g32"), ("bitsandbytes", "int4_g64", "nf4"),
        ("fp8", "q8_0", "fp8_e4m3_block128"),
        ("mlx", "nf4", "int4_g32"), ("huggingface", "q4_k", "bf16"), ("onnx", "q6_k", "int8_g128"),
    ],
)  # fmt: skip
def test_the_nearest_is_what_a_user_would_take(layout, format, named):
    assert FILE_TYPES.get(layout).nearest(FORMATS.get(format)).name == named


@pytest.mark.parametrize(
    "layout", [name for name, each in FILE_TYPES.items() if isinstance(each, Directory) and name != "native"]
)
def test_a_refused_format_is_refused_before_anything_is_written(tmp_path, layout):
    format = next(b for a, b in REFUSED if a == layout)
    with pytest.raises(FewbitsError, match=re.escape(NAME)):
        laid_out(FILE_TYPES.get(layout), kinds(tensors(layout, format)))


def test_a_method_that_no_layout_reads_is_named(tmp_path):
    path = tmp_path / "m"
    path.mkdir()
    codes = torch.zeros(4, 8, 1, dtype=torch.int16)
    save_file({"model.layers.0.mlp.up_proj.codes": codes}, path / "model.safetensors")
    (path / "config.json").write_text('{"quantization_config": {"quant_method": "aqlm"}}')
    with pytest.raises(FileError, match=r"'aqlm'; supported: .*gptq"):
        open_checkpoint(path)
