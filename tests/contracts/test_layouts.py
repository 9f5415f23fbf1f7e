"""Every layout carries what it says it carries, bit for bit, and says what to take instead of the rest."""

import importlib.util
import re

import pytest
import torch

from fewbits.errors import FewbitsError, FileError
from fewbits.files.layout import LAYOUTS, laid_out
from fewbits.files.open import open_checkpoint
from fewbits.formats import FLOATS, FORMATS
from tests.files.directories import ONE_BLOCK, kinds, one_block, random_qtensor, write_directory

MORE = ["int8_g32_asym", "int2_g64", "int3_channel", "int8_channel_asym_f32"]
MORE += ["int4_g64_bf16", "int4_g16_asym", "nf4_g128_dq", "fp4_g32"]
CASES = [(a, b) for a in LAYOUTS for b in [*FORMATS, *MORE] if b not in FLOATS]
CARRIED = [(a, b) for a, b in CASES if LAYOUTS.get(a).refusal(FORMATS.get(b)) is None]
REFUSED = [case for case in CASES if case not in CARRIED]
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
    _, _, keys = laid_out(LAYOUTS.get(layout), kinds(given))
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
def test_a_refusal_names_what_is_carried(layout, format):
    why = LAYOUTS.get(layout).refusal(FORMATS.get(format))
    named = [word for word in re.findall(r"[a-z0-9_]+", why) if word in FORMATS or word.startswith("int")]
    known = [word for word in named if _known(word)]
    others = [word for word in LAYOUTS if word in why.split()]
    assert others or LAYOUTS.get(layout).refusal(FORMATS.get(known[-1])) is None


def _known(word):
    try:
        FORMATS.get(word)
    except FewbitsError:
        return False
    return True


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "native"])
def test_a_refused_format_is_refused_before_anything_is_written(tmp_path, layout):
    format = next(b for a, b in REFUSED if a == layout)
    with pytest.raises(FewbitsError, match=re.escape(NAME)):
        laid_out(LAYOUTS.get(layout), kinds(tensors(layout, format)))


def test_a_method_that_no_layout_reads_is_named(tmp_path):
    path = write_directory(tmp_path / "m", "native", {"model.norm.weight": torch.randn(4).bfloat16()})
    (path / "fewbits.json").unlink()
    (path / "config.json").write_text('{"quantization_config": {"quant_method": "aqlm"}}')
    with pytest.raises(FileError, match=r"'aqlm'; read are .*gptq"):
        open_checkpoint(path)
