"""Model directories with something missing, foreign or pointing elsewhere."""

import json
import os

import pytest

from fewbits.errors import FileError
from fewbits.files.native import open_native
from fewbits.files.open import file_type_at, open_checkpoint
from tests.attacks.forge import row, safetensors, write

ONE = safetensors({"a": row("U8", [4], 0, 4)}, bytes(4))


def directory(path, **files):
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (path / name.replace("__", ".")).write_bytes(raw)
    return path


def index(path, name="model.safetensors", **weight_map):
    path.mkdir(exist_ok=True)
    write(path / "config.json", b"{}")
    body = {"weight_map": weight_map}
    write(path / f"{name}.index.json", json.dumps(body).encode())
    return path


def test_all_missing_shards_are_listed(tmp_path):
    model = index(tmp_path / "m", a="one.safetensors", b="two.safetensors", c="three.safetensors")
    write(model / "two.safetensors", ONE)
    with pytest.raises(
        FileError, match=r"one\.safetensors is missing[\s\S]*three\.safetensors is missing"
    ) as caught:
        open_checkpoint(model)
    assert "two" not in str(caught.value)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", 3]
)
def test_a_shard_name_never_leaves_the_directory(tmp_path, shard):
    write(tmp_path / "secret.safetensors", ONE)
    with pytest.raises(FileError, match="not a plain file name"):
        open_checkpoint(index(tmp_path / "m", a=shard))


@pytest.mark.parametrize("shard", ["../secret.bin", "a/b.bin", "x.safetensors"])
def test_a_shard_of_pickles_never_leaves_the_directory(tmp_path, shard):
    with pytest.raises(FileError, match="not a plain file name"):
        open_checkpoint(index(tmp_path / "m", "pytorch_model.bin", a=shard))


def test_a_tensor_that_its_shard_has_not(tmp_path):
    model = index(tmp_path / "m", a="one.safetensors", ghost="one.safetensors")
    write(model / "one.safetensors", ONE)
    with pytest.raises(FileError, match=r"'ghost' is not in one\.safetensors"):
        open_checkpoint(model)


@pytest.mark.parametrize("body", [{}, {"weight_map": {}}, {"weight_map": [1]}])
def test_an_index_without_a_map(tmp_path, body):
    model = index(tmp_path / "m")
    write(model / "model.safetensors.index.json", json.dumps(body).encode())
    with pytest.raises(FileError, match="has no weight_map"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "training_args.bin"])
def test_other_pickles_are_never_loaded(tmp_path, name):
    model = directory(tmp_path / "m", config__json={})
    write(model / name, b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(FileError, match=rf"only pickles \({name}\)[\s\S]*save_pretrained"):
        open_checkpoint(model)


def test_no_config(tmp_path):
    with pytest.raises(FileError, match=r"has no config\.json"):
        open_checkpoint(directory(tmp_path / "m", model__safetensors=ONE))


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{", b"[" * 200_000])
def test_a_config_that_is_no_object(tmp_path, content):
    with pytest.raises(FileError, match=r"config\.json"):
        open_checkpoint(directory(tmp_path / "m", config__json=content, model__safetensors=ONE))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(FileError, match="not a regular file"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileError, match="not a regular file"):
        file_type_at(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["absent", "text.txt", "lone.safetensors", "empty"])
def test_what_is_no_model(tmp_path, name):
    write(tmp_path / "text.txt", b"hello")
    write(tmp_path / "lone.safetensors", ONE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=name):
        file_type_at(tmp_path / name)


NATIVE_LIES = {
    "version": ({"version": 2, "tensors": {}}, "version 2, this program reads 1"),
    "no tensors": ({"version": 1}, "version 1"),
    "row a number": ({"version": 1, "tensors": {"w": 3}}, "'w': 3 is not a format"),
    "shape absurd": ({"version": 1, "tensors": {"w": {"format": "q8_0", "shape": [2**70, 32]}}}, "'w'"),
    "shape negative": ({"version": 1, "tensors": {"w": {"format": "q8_0", "shape": [-1, 32]}}}, "'w'"),
    "unknown format": ({"version": 1, "tensors": {"w": {"format": "q99", "shape": [4, 32]}}}, "'q99'"),
    "ragged row": ({"version": 1, "tensors": {"w": {"format": "q8_0", "shape": [4, 33]}}}, "33"),
    "missing plane": ({"version": 1, "tensors": {"w": {"format": "q8_0", "shape": [4, 32]}}}, "is missing"),
    "wrong plane": (
        {"version": 1, "tensors": {"v": {"format": "q8_0", "shape": [4, 32]}}},
        "needs U8 (4, 34)",
    ),
}


@pytest.mark.parametrize("lie", NATIVE_LIES)
def test_native_index_against_planes(tmp_path, lie):
    body, says = NATIVE_LIES[lie]
    planes = safetensors({"v.blocks": row("U8", [4, 1], 0, 4)}, bytes(4))
    model = directory(tmp_path / "m", fewbits__json=body, config__json={}, model__safetensors=planes)
    with pytest.raises(FileError) as caught:
        open_native(model)
    assert str(model) in str(caught.value)
    assert says in str(caught.value)


def test_native_faults_are_told_at_once(tmp_path):
    rows = {f"w{i}": {"format": "q8_0", "shape": [4, 32]} for i in range(3)}
    model = directory(
        tmp_path / "m", fewbits__json={"version": 1, "tensors": rows}, config__json={}, model__safetensors=ONE
    )
    with pytest.raises(FileError, match=r"w0[\s\S]*w1[\s\S]*w2"):
        open_native(model)


def test_native_tensor_both_quantized_and_float(tmp_path):
    planes = {"w.blocks": row("U8", [1, 34], 0, 34), "w": row("F32", [1, 32], 34, 34 + 128)}
    rows = {"w": {"format": "q8_0", "shape": [1, 32]}}
    model = directory(
        tmp_path / "m",
        fewbits__json={"version": 1, "tensors": rows},
        config__json={},
        model__safetensors=safetensors(planes, bytes(34 + 128)),
    )
    with pytest.raises(FileError, match="both quantized and in float"):
        open_native(model)
