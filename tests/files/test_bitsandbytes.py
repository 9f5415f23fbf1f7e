"""bitsandbytes directories: golden bytes of the package, what its variants mean, what contradicts itself.

The golden files hold one linear module each, made by bitsandbytes 0.50.2 on a CPU of
`w = torch.randn(144, 128) * torch.logspace(-2, 1, 144)[:, None]`, seed 0:

    module.weight = bnb.nn.Params4bit(w, False, quant_type=kind, compress_statistics=nested); module.to("cpu")
    module.weight = bnb.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False); module.to("cpu")
    save_file(module.state_dict() and decoded: every 16th row of what the package decodes it to)
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.errors import FileError, FormatError, PlanError
from fewbits.files.bitsandbytes import BitsAndBytes
from fewbits.files.directory import FILE_TYPES
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS, kind_of
from tests.files.directories import random_qtensor, write_directory

GOLDEN = Path(__file__).parents[1] / "golden" / "bitsandbytes"
FORMAT = {"nf4": "nf4", "fp4": "fp4", "nf4_dq": "nf4_dq", "fp4_dq": "fp4_dq", "int8": "int8_absmax"}
NAME = "model.m.weight"


def directory(path, tensors, **said):
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "bitsandbytes", **said}})
    )
    return path


def golden(kind):
    tensors = load_file(GOLDEN / f"{kind}.safetensors")
    return tensors, tensors.pop("decoded")


def state_of(tensors, **changes):
    key = next(key for key in tensors if "quant_state" in key)
    state = json.loads(bytes(tensors[key].tolist())) | changes
    return {**tensors, key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("kind", FORMAT)
def test_golden_bytes_open_and_decode_as_the_package_does(tmp_path, kind):
    tensors, decoded = golden(kind)
    q = open_checkpoint(directory(tmp_path / "m", tensors)).tensors[NAME].load()
    assert (q.format.name, q.shape) == (FORMAT[kind], (144, 128))
    ours = q.decode()[::16]
    if kind == "int8":  # the package multiplies by SCB, then by 1/127: two roundings in another order
        assert torch.allclose(ours, decoded, rtol=2**-22, atol=0)
    else:
        assert torch.equal(ours, decoded)


@pytest.mark.parametrize("kind", FORMAT)
def test_golden_bytes_are_written_again(tmp_path, kind):
    """All but the spaces after the JSON, where it has an offset."""
    tensors, _ = golden(kind)
    q = open_checkpoint(directory(tmp_path / "m", tensors)).tensors[NAME].load()
    written = load_file(write_directory(tmp_path / "n", "bitsandbytes", {NAME: q}) / "model.safetensors")
    assert set(written) == set(tensors)
    for key, value in tensors.items():
        if "quant_state" in key and kind.endswith("_dq"):
            assert bytes(written[key].tolist()).rstrip() == bytes(value.tolist())
        else:
            assert written[key].dtype == value.dtype and torch.equal(written[key], value), key


@pytest.mark.parametrize("kind", ["nf4", "fp4_dq"])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_quant_storage_is_another_view_of_the_bytes(tmp_path, kind, storage):
    tensors, decoded = golden(kind)
    tensors[NAME] = tensors[NAME].flatten().view(storage).reshape(-1, 1)
    q = open_checkpoint(directory(tmp_path / "m", tensors)).tensors[NAME].load()
    assert torch.equal(q.decode()[::16], decoded)


@pytest.mark.parametrize("kind", ["nf4", "nf4_dq"])
def test_blocks_over_the_ends_of_rows_open_as_floats(tmp_path, kind):
    """The same blocks of a weight that is shaped otherwise: 288 rows of 64 are 144 of 128 are 192 of 96."""
    tensors, decoded = golden(kind)
    path = directory(tmp_path / "m", state_of(tensors, shape=[192, 96]))
    lazy = open_checkpoint(path).tensors[NAME]
    assert (lazy.dtype, lazy.shape, lazy.quantized) == ("f32", (192, 96), False)
    assert torch.equal(lazy.load().reshape(144, 128)[::16], decoded)


def test_levels_of_their_own_open_as_floats(tmp_path):
    tensors, decoded = golden("nf4")
    tensors[f"{NAME}.quant_map"] *= 2
    lazy = open_checkpoint(directory(tmp_path / "m", tensors)).tensors[NAME]
    assert not lazy.quantized and torch.equal(lazy.load()[::16], 2 * decoded)


def wrong_state(**changes):
    return lambda tensors: state_of(tensors, **changes)


LIES = {
    "type": ("nf4", wrong_state(quant_type="fp4"), {}, "quant_type is 'fp4'"),
    "shape": ("nf4", wrong_state(shape=[2**40, 2]), {}, "shape [1099511627776, 2]"),
    "shape a word": ("nf4", wrong_state(shape="x"), {}, "shape x"),
    "odd": ("nf4", wrong_state(shape=[3, 3]), {}, "shape [3, 3]"),
    "too few codes": ("nf4", wrong_state(shape=[288, 128]), {}, "needs U8 (18432, 1)"),
    "block": ("nf4", wrong_state(blocksize=48), {}, "blocksize 48"),
    "other block": ("nf4", wrong_state(blocksize=128), {}, "plane 'absmax'"),
    "nested block": ("nf4_dq", wrong_state(nested_blocksize=64), {}, "nested_blocksize 64"),
    "offset": ("nf4_dq", wrong_state(nested_offset="0"), {}, "nested_offset 0"),
    "offset beyond f32": ("nf4_dq", wrong_state(nested_offset=10**400), {}, "nested_offset 1000"),
    "offset not finite": ("nf4_dq", wrong_state(nested_offset=float("nan")), {}, "nested_offset nan"),
    "not nested": ("nf4", wrong_state(nested_blocksize=256), {}, "nested_absmax is missing"),
    "config type": ("nf4", dict, {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4'"),
    "config bits": ("nf4", dict, {"load_in_8bit": True}, "does not say load_in_4bit"),
    "config of rows": ("int8", dict, {"load_in_4bit": True}, "does not say load_in_8bit"),
    "columns": (
        "int8",
        lambda t: {**t, "model.m.weight_format": t["model.m.weight_format"] + 1},
        {},
        "not 0",
    ),
    "no state": ("nf4", lambda t: {k: v for k, v in t.items() if "state" not in k}, {}, "no quant_state"),
    "no SCB": ("int8", lambda t: {k: v for k, v in t.items() if "SCB" not in k}, {}, "no quant_state or SCB"),
    "no mark": (
        "int8",
        lambda t: {k: v for k, v in t.items() if "format" not in k},
        {},
        "'weight_format' is",
    ),
    "no absmax": (
        "fp4",
        lambda t: {k: v for k, v in t.items() if "absmax" not in k},
        {},
        "'absmax' is missing",
    ),
    "no weight": ("fp4", lambda t: {k: v for k, v in t.items() if k != NAME}, {}, "is missing"),
    "no rows": ("int8", lambda t: {k: v for k, v in t.items() if k != NAME}, {}, "SCB but no weight"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_contradiction_is_an_error_that_names_it(tmp_path, lie):
    kind, change, said, says = LIES[lie]
    tensors, _ = golden(kind)
    with pytest.raises(FileError) as caught:
        open_checkpoint(directory(tmp_path / "m", change(tensors), **said))
    assert says in str(caught.value) and "model.m" in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"[1]", b"{", b"\xff", b" " * 70_000])
def test_a_state_that_is_no_json(tmp_path, raw):
    tensors, _ = golden("nf4")
    key = next(key for key in tensors if "quant_state" in key)
    tensors[key] = torch.tensor(list(raw), dtype=torch.uint8)
    with pytest.raises(FileError, match=r"model\.m: quant_state"):
        open_checkpoint(directory(tmp_path / "m", tensors))


def test_minus_128_is_refused_when_it_is_met(tmp_path):
    tensors, _ = golden("int8")
    tensors[NAME][3, 5] = -128
    lazy = open_checkpoint(directory(tmp_path / "m", tensors)).tensors[NAME]
    with pytest.raises(FormatError, match="-128"):
        lazy.load()


def settings(rows, **config):
    layout = BitsAndBytes().of(SimpleNamespace(config=config))
    return layout.settings(rows, config, {})["config.json"]["quantization_config"]


def test_the_config_lists_linear_modules_left_in_float():
    rows = {
        "model.embed_tokens.weight": (kind_of("bf16"), (64, 64)),
        "model.layers.0.mlp.up_proj.weight": (kind_of("nf4_dq"), (64, 64)),
        "model.layers.0.mlp.down_proj.weight": (kind_of("bf16"), (64, 64)),
        "model.norm.weight": (kind_of("bf16"), (64,)),
    }
    said = settings(rows, dtype="bfloat16")
    assert said["llm_int8_skip_modules"] == ["model.embed_tokens", "model.layers.0.mlp.down_proj", "lm_head"]
    assert (said["load_in_4bit"], said["bnb_4bit_quant_type"]) == (True, "nf4")
    assert (said["bnb_4bit_use_double_quant"], said["bnb_4bit_compute_dtype"]) == (True, "bfloat16")
    assert (
        "lm_head"
        not in settings({"lm_head.weight": (kind_of("int8_absmax"), (64, 64))})["llm_int8_skip_modules"]
    )


def test_what_the_package_cannot_hold_is_refused_all_at_once():
    rows = {
        "model.embed_tokens.weight": (kind_of("nf4"), (64, 64)),
        "model.layers.0.mlp.experts.0.up_proj.weight": (kind_of("nf4"), (64, 64)),
        "model.layers.0.mlp.up_proj.weight": (kind_of("fp4"), (64, 64)),
    }
    with pytest.raises(PlanError, match=r"nf4 \(.*fp4 \([\s\S]*not experts[\s\S]*not embeddings"):
        settings(rows)


@pytest.mark.parametrize("offset", [0.0, -1.1754943508222875e-38, 3.4028234663852886e38, 1 / 3])
def test_any_offset_fits_its_room(offset):
    layout = FILE_TYPES.get("bitsandbytes")
    q = random_qtensor(FORMATS.get("nf4_dq"), 64, 128)
    q.planes["offset"].fill_(offset)
    arrays = layout.arrays(NAME, q.format, q.shape)
    parts = layout.pack(q)
    assert [tuple(part.shape) for part in parts] == [array.shape for array in arrays]
    assert torch.equal(layout.unpack(q.format, q.shape, parts).planes["offset"], q.planes["offset"])
