"""Model directories: one file, shards, side files, file types."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fewbits.errors import FileError
from fewbits.files.open import file_type_at, open_checkpoint

WEIGHTS = {
    "model.embed_tokens.weight": torch.randn(7, 4).bfloat16(),
    "model.norm.weight": torch.randn(4),
    "lm_head.weight": torch.randn(7, 4).half(),
}


def one_file(path):
    path.mkdir()
    save_file(WEIGHTS, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def shards(path):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {}
    for number, (name, tensor) in enumerate(WEIGHTS.items(), 1):
        weight_map[name] = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: tensor}, path / weight_map[name])
    body = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(body))
    return path


@pytest.mark.parametrize("make", [one_file, shards])
def test_every_tensor_loads_as_it_was_saved(tmp_path, make):
    opened = open_checkpoint(make(tmp_path / "m"))
    assert opened.file_type.name == "huggingface" == file_type_at(tmp_path / "m").name
    assert opened.config == {"model_type": "llama"}
    assert {name: lazy.dtype for name, lazy in opened.tensors.items()} == {
        "model.embed_tokens.weight": "bf16",
        "model.norm.weight": "f32",
        "lm_head.weight": "f16",
    }
    for name, lazy in opened.tensors.items():
        assert torch.equal(lazy.load(), WEIGHTS[name])
        assert lazy.shape == tuple(WEIGHTS[name].shape)
        assert lazy.nbytes == WEIGHTS[name].nbytes
        assert not lazy.quantized


def test_a_single_file_of_any_name_is_taken(tmp_path):
    """As AutoGPTQ named it; an adapter beside it is none of the model's, and of two none is chosen."""
    path = one_file(tmp_path / "m")
    (path / "model.safetensors").rename(path / "gptq_model-4bit-128g.safetensors")
    save_file({"x": torch.zeros(1)}, path / "adapter_model.safetensors")
    assert set(open_checkpoint(path).tensors) == set(WEIGHTS)
    save_file({"x": torch.zeros(1)}, path / "other.safetensors")
    with pytest.raises(FileError, match=r"neither model\.safetensors nor"):
        open_checkpoint(path)


def test_provenance_names_files_and_sizes(tmp_path):
    opened = open_checkpoint(shards(tmp_path / "m"))
    files = {row["name"]: row["nbytes"] for row in opened.provenance["files"]}
    assert len(files) == 4
    assert all(size == (tmp_path / "m" / name).stat().st_size for name, size in files.items())


def test_side_files_are_found_and_weights_are_not(tmp_path):
    model = one_file(tmp_path / "m")
    kept = ["LICENSE", "README.md", "chat_template.jinja", "merges.txt", "tokenizer.json", "tokenizer.model"]
    for name in [*kept, "notes.txt", "training_args.bin"]:
        (model / name).write_text("x")
    assert list(open_checkpoint(model).side_files) == kept


def test_the_index_chooses_between_two_shards_that_hold_a_tensor(tmp_path):
    model = shards(tmp_path / "m")
    second = {**WEIGHTS, "model.embed_tokens.weight": torch.zeros(1)}
    save_file(second, model / "model-00002-of-00003.safetensors")
    opened = open_checkpoint(model)
    assert all(torch.equal(lazy.load(), WEIGHTS[name]) for name, lazy in opened.tensors.items())


def test_two_shards_that_hold_a_tensor_the_index_does_not_know(tmp_path):
    model = shards(tmp_path / "m")
    for number in (1, 2):
        path = model / f"model-{number:05d}-of-00003.safetensors"
        save_file({**WEIGHTS, "ghost": torch.zeros(1)}, path)
    with pytest.raises(FileError, match="'ghost' is in model-00001-of-00003"):
        open_checkpoint(model)
