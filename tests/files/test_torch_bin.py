"""`.bin` files that torch wrote: every dtype, shared and offset storages, shards; read as they were saved."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fewbits.files.open import open_checkpoint
from fewbits.files.torch_bin import STORAGES, read_torch
from fewbits.storage.safetensors import DTYPES, map_tensor
from fewbits.workflow.request import Request
from fewbits.workflow.run import convert
from fewbits.workflow.run import run as quantize
from tests.tiny import save_tiny


def loaded(path):
    return {name: map_tensor(path, entry) for name, entry in read_torch(path).items()}


def same(found, saved):
    assert list(found) == list(saved)
    for name, value in saved.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", STORAGES.values())
def test_every_dtype(tmp_path, dtype):
    saved = {
        "a": torch.arange(12).reshape(3, 4).to(DTYPES[dtype].torch),
        "b": torch.ones((), dtype=DTYPES[dtype].torch),
    }
    torch.save(saved, tmp_path / "m.bin")
    same(loaded(tmp_path / "m.bin"), saved)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_and_the_attributes_of_a_state_dict(tmp_path, protocol):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    saved = model.state_dict()
    assert saved._metadata
    torch.save(saved, tmp_path / "m.bin", pickle_protocol=protocol)
    same(loaded(tmp_path / "m.bin"), saved)


def test_views_of_one_storage(tmp_path):
    """Tied weights, slices, what is empty, a size of one under another stride."""
    whole = torch.randn(6, 5)
    saved = {"tied": whole, "again": whole, "rows": whole[2:4], "none": whole[:0], "one": whole[:, :1][:1]}
    torch.save(saved, tmp_path / "m.bin")
    same(loaded(tmp_path / "m.bin"), saved)


def test_a_large_tensor_is_mapped_where_it_lies(tmp_path):
    saved = {"a": torch.randn(3), "b": torch.randn(300, 301)}
    torch.save(saved, tmp_path / "m.bin")
    entries = read_torch(tmp_path / "m.bin")
    raw = (tmp_path / "m.bin").read_bytes()
    for name, entry in entries.items():
        assert raw[entry.offset : entry.offset + entry.nbytes] == saved[name].numpy().tobytes()
    same(loaded(tmp_path / "m.bin"), saved)


def pickled(source, shards=False):
    """A directory of safetensors as one of `.bin`."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    if not shards:
        torch.save(tensors, source / "pytorch_model.bin")
        return tensors
    names, index = list(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, source / file)
        index |= dict.fromkeys(part, file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return tensors


@pytest.mark.parametrize("shards", [False, True])
def test_a_model_of_pickles_opens_and_becomes_safetensors(tmp_path, shards):
    source = save_tiny("LlamaForCausalLM", tmp_path / "source")
    tensors = pickled(source, shards)
    opened = open_checkpoint(source)
    assert opened.file_type.name == "huggingface" and opened.side_files
    assert all(row["name"].endswith((".bin", ".json")) for row in opened.provenance["files"])
    convert(source, tmp_path / "out", "huggingface")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(tensors) and all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert not {"fewbits.json", "quantize_config.json"} & {file.name for file in (tmp_path / "out").iterdir()}


def test_safetensors_come_first(tmp_path):
    source = save_tiny("LlamaForCausalLM", tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"anything")
    assert open_checkpoint(source).tensors


def test_a_quantized_model_is_decoded_when_asked(tmp_path):
    source = save_tiny("LlamaForCausalLM", tmp_path / "source")
    quantize(source, tmp_path / "n", Request("int8_channel"))
    convert(tmp_path / "n", tmp_path / "out", "huggingface")
    ours, decoded = open_checkpoint(tmp_path / "n").tensors, open_checkpoint(tmp_path / "out").tensors
    for name, lazy in ours.items():
        value = lazy.load()
        assert torch.equal(value.decode() if lazy.quantized else value, decoded[name].load())
