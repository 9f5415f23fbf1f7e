"""Whole models: GGUF written and opened again is the same model; config, tensors, logits, tokenizer."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFValueType
from safetensors.torch import load_file, save_file

from fewbits.adapters.transformers import load_model, load_tokenizer
from fewbits.errors import FileError, ModelError
from fewbits.files.checkpoint import Checkpoint
from fewbits.files.gguf.file import GGUFValue, gguf_header, read_gguf
from fewbits.files.gguf.metadata import (
    general_keys,
    gguf_metadata,
    hyperparameter_keys,
    side_files_from_keys,
)
from fewbits.files.gguf.model import open_gguf
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from fewbits.model.archs import complete, require_architecture, rope_rows
from fewbits.qtensor import QTensor
from tests.tiny import MODELS, TEXTS, VOCAB, save_tiny, write_float_gguf

# config fields that no GGUF key holds and inference does not read
NOT_CARRIED = {
    "initializer_range", "dtype", "_sliding_window_pattern", "architectures", "transformers_version",
}  # fmt: skip


def _logits(checkpoint: Checkpoint) -> torch.Tensor:
    tokens = torch.randint(3, VOCAB, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return load_model(checkpoint)(tokens).logits[0]


def _standard(config: dict[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    return complete(CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(config)).to_dict())


@pytest.mark.parametrize("name", MODELS)
def test_gguf_and_back_is_the_same_model(name: str, tmp_path: Path) -> None:
    source = open_checkpoint(save_tiny(name, tmp_path / "source"))
    child = open_checkpoint(write_float_gguf(source, tmp_path / "model.gguf"))
    before, after = _standard(source.config), _standard(child.config)
    assert {key for key in before if before[key] != after.get(key)} <= NOT_CARRIED
    assert child.config["architectures"] == source.config["architectures"]
    assert set(child.tensors) == set(source.tensors)
    for key, tensor in source.tensors.items():
        assert child.tensors[key].shape == tensor.shape
        assert torch.equal(child.tensors[key].load(), tensor.load()), key
    assert torch.equal(_logits(child), _logits(source))
    again = open_gguf(write_float_gguf(child, tmp_path / "again.gguf"))
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    assert again.config == child.config


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_fused_experts_are_the_same_model(name: str, tmp_path: Path) -> None:
    """Experts saved as transformers holds them, three-dimensional, open as one weight each."""
    path = save_tiny(name, tmp_path / "model")
    source = open_checkpoint(path)
    model, wanted = load_model(source), _logits(source)
    classic = {key: tensor.load().clone() for key, tensor in source.tensors.items()}
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, path / "model.safetensors"
    )
    assert any(value.ndim == 3 for value in load_file(path / "model.safetensors").values())
    fused = open_checkpoint(path)
    assert set(fused.tensors) == set(classic)
    assert all(torch.equal(fused.tensors[key].load(), value) for key, value in classic.items())
    assert sum(t.nbytes for t in fused.tensors.values()) == sum(4 * t.numel() for t in classic.values())
    assert torch.equal(_logits(fused), wanted)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM", "Gemma3ForCausalLM"])
def test_quantized_gguf_opens_as_qtensors_in_the_right_rows(name: str, tmp_path: Path) -> None:
    source = open_checkpoint(save_tiny(name, tmp_path / "source"))
    path = write_float_gguf(source, tmp_path / "model.gguf")
    child = open_checkpoint(_quantized(path, tmp_path / "q.gguf"))
    q8 = FORMATS.get("q8_0")
    for key, tensor in source.tensors.items():
        value = child.tensors[key].load()
        if len(tensor.shape) == 2:
            assert isinstance(value, QTensor) and child.tensors[key].quantized
            assert torch.equal(value.decode(), q8.encode(tensor.load()).decode())  # rows are rounded apart
        else:
            assert torch.equal(value, tensor.load())


def _quantized(path: Path, to: Path) -> Path:
    """The same file with every weight in q8_0, in GGUF order and names."""
    from fewbits.files.gguf.file import map_gguf_tensor

    file, q8 = read_gguf(path), FORMATS.get("q8_0")
    rows = []
    for tensor in file.tensors.values():
        value = map_gguf_tensor(tensor)
        if len(tensor.shape) > 1:
            q = q8.encode(value.reshape(-1, tensor.shape[-1]))
            rows.append((tensor.name, tensor.shape, "q8_0", q.planes["blocks"]))
        else:
            rows.append((tensor.name, tensor.shape, "f32", value))
    header, offsets = gguf_header(file.values, [row[:3] for row in rows])
    with to.open("wb") as out:
        out.write(header)
        for (*_, value), offset in zip(rows, offsets, strict=True):
            out.write(bytes(offset - out.tell()) + value.contiguous().numpy().tobytes())
        out.write(bytes(-out.tell() % 32))
    return to


def test_rows_are_interleaved_in_the_file(tmp_path: Path) -> None:
    source = open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path / "source"))
    path = write_float_gguf(source, tmp_path / "model.gguf")
    from gguf import GGUFReader

    stored = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    k = source.tensors["model.layers.0.self_attn.k_proj.weight"].load()
    assert torch.equal(torch.from_numpy(stored["blk.0.attn_k.weight"].copy()), k[rope_rows(128, 2)])


def test_metadata_of_a_directory(tmp_path: Path) -> None:
    path = save_tiny("LlamaForCausalLM", tmp_path / "Tiny-Llama")
    (path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model:\n- org/parent\n---\n# card\n")
    source = open_checkpoint(path)
    keys = {k: v.plain() for k, v in gguf_metadata(source, require_architecture(source.config), 15).items()}
    wanted = {
        "general.architecture": "llama", "general.name": "Tiny-Llama", "general.type": "model",
        "general.license": "apache-2.0", "general.base_model.count": 1,
        "general.base_model.0.name": "parent", "general.base_model.0.organization": "org",
        "general.file_type": 15, "general.quantization_version": 2,
        "llama.block_count": 2, "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 64,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.pre": "smollm",
    }  # fmt: skip
    assert {key: keys.get(key) for key in wanted} == wanted
    assert keys["tokenizer.chat_template"].startswith("{% for m in messages %}")
    assert len(keys["tokenizer.ggml.tokens"]) == VOCAB


def test_an_irregular_window_is_written_layer_by_layer() -> None:
    config = {**_gemma_config(), "layer_types": ["full_attention", "full_attention", "sliding_attention"]}
    keys = hyperparameter_keys(config, require_architecture(config))
    assert keys["gemma3.attention.sliding_window_pattern"] == GGUFValue(
        GGUFValueType.ARRAY, [False, False, True], GGUFValueType.BOOL
    )
    regular = hyperparameter_keys(_gemma_config(), require_architecture(config))
    assert regular["gemma3.attention.sliding_window_pattern"].value == 2


def _gemma_config() -> dict[str, Any]:
    from transformers import Gemma3TextConfig

    _, fields = MODELS["Gemma3ForCausalLM"]
    return Gemma3TextConfig(**fields).to_dict() | {"architectures": ["Gemma3ForCausalLM"]}


def test_a_gguf_of_an_unknown_architecture_keeps_its_names(tmp_path: Path) -> None:
    metadata = {"general.architecture": GGUFValue(GGUFValueType.STRING, "wonder")}
    header, _ = gguf_header(metadata, [("blk.0.odd.weight", (2, 8), "f32")])
    (tmp_path / "x.gguf").write_bytes(header + bytes(64))
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert checkpoint.config == {} and list(checkpoint.tensors) == ["blk.0.odd.weight"]
    assert torch.equal(checkpoint.tensors["blk.0.odd.weight"].load(), torch.zeros(2, 8))
    with pytest.raises(ModelError, match="wonder"):
        load_model(checkpoint)


def test_missing_keys_of_a_known_architecture_are_listed(tmp_path: Path) -> None:
    metadata = {"general.architecture": GGUFValue(GGUFValueType.STRING, "llama")}
    header, _ = gguf_header(metadata, [("output_norm.weight", (8,), "f32")])
    (tmp_path / "x.gguf").write_bytes(header + bytes(32))
    with pytest.raises(ModelError, match=r"llama\.block_count, .*llama\.embedding_length"):
        open_checkpoint(tmp_path / "x.gguf")


def test_a_model_with_wrong_tensors_lists_them_all(tmp_path: Path) -> None:
    path = save_tiny("LlamaForCausalLM", tmp_path / "model")
    state = load_file(path / "model.safetensors")
    state["model.layers.0.extra.weight"] = state.pop("model.norm.weight")
    state["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(8, 256)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as error:
        load_model(open_checkpoint(path))
    text = str(error.value)
    assert "'model.norm.weight' is missing" in text and "'model.layers.0.extra.weight' is not one of" in text
    assert "q_proj.weight' is (8, 256)" in text


def test_tokenizers_of_a_directory_a_gguf_and_what_it_is_copied_to_agree(tmp_path: Path) -> None:
    source = open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path / "source"))
    child = open_checkpoint(write_float_gguf(source, tmp_path / "model.gguf"))
    ours, theirs = load_tokenizer(child), load_tokenizer(source)
    messages = [{"role": "user", "content": "Hi 12"}]
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_token, ours.eos_token_id) == (theirs.bos_token, theirs.eos_token_id) == ("<s>", 2)
    rendered = [tokenizer.apply_chat_template(messages, tokenize=False) for tokenizer in (ours, theirs)]
    assert rendered[0] == rendered[1] == "<s>user\nHi 12</s>\n"
    copied = side_files_from_keys({key: value.plain() for key, value in child.gguf_keys.items()})
    assert json.loads(copied["tokenizer_config.json"])["eos_token"] == "</s>"
    assert copied["chat_template.jinja"].decode() == theirs.chat_template


def test_a_directory_without_a_tokenizer_cannot_become_gguf(tmp_path: Path) -> None:
    path = save_tiny("LlamaForCausalLM", tmp_path / "model")
    (path / "tokenizer.json").unlink()
    source = open_checkpoint(path)
    with pytest.raises(FileError, match=r"no tokenizer\.json"):
        gguf_metadata(source, require_architecture(source.config))
    assert "general.name" in general_keys(source, require_architecture(source.config))
