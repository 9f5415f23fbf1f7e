"""Files and options from public reports: tokenizers, links, configs, shapes."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.adapters import llamacpp
from fewbits.adapters.as_loaded import as_loaded
from fewbits.adapters.llamacpp import engine_logits, engine_tokenize
from fewbits.adapters.transformers import load_tokenizer
from fewbits.cli.main import main
from fewbits.errors import FewbitsError, FileError, ModelError, PlanError
from fewbits.files.gguf.metadata import gguf_metadata, u32
from fewbits.workflow.resolve import ELSEWHERE, target_of
from tests import tiny
from tests.encoders import save_encoder
from tests.test_reported_inputs import TOKENS, edited, nats, ours, theirs
from tests.tiny import bpe_tokenizer, save_tiny, spm_tokenizer

if find_spec("llama_cpp") is None:
    pytest.skip("llama-cpp-python is not installed", allow_module_level=True)


def with_settings(path: Path, drop: str = "", **given: Any) -> Path:
    file = path / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(file.read_text()).items() if k not in drop.split()} | given
    file.write_text(json.dumps(settings))
    return path


# ---- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [bpe_tokenizer(), spm_tokenizer()], ids=["bpe", "spm"])
def test_special_tokens_that_only_the_settings_have_are_those_of_autotokenizer(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    path = save_tiny("LlamaForCausalLM", tmp_path / "in", tokenizer=spec)
    size = len(spec["model"]["vocab"])
    more = {str(size): "<|im_start|>", str(size + 1): "<|im_end|>"}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {"special": True}
    added = {index: {"content": text, **flags} for index, text in more.items()}
    with_settings(path, added_tokens_decoder=added, eos_token="<|im_end|>", pad_token="<|im_end|>")
    wanted, text = AutoTokenizer.from_pretrained(path), "<|im_start|>user\nHello, world<|im_end|>"
    assert wanted.eos_token_id == size + 1
    assert load_tokenizer(fewbits.open(path)).eos_token_id == size + 1
    fewbits.convert(path, tmp_path / "out.gguf")
    keys = fewbits.open(tmp_path / "out.gguf").gguf_keys
    assert keys["tokenizer.ggml.eos_token_id"].value == size + 1
    assert keys["tokenizer.ggml.padding_token_id"].value == size + 1
    engine = engine_tokenize(tmp_path / "out.gguf", text, add_special=True, parse_special=True)
    assert engine == wanted(text)["input_ids"] == list(load_tokenizer(fewbits.open(path))(text)["input_ids"])
    receipt = fewbits.quantize(path, tmp_path / "native", to="int8_g32", effort="fast", verify=False)
    assert not receipt.about.get("audit")


@pytest.mark.parametrize("name", ["bos", "eos"])
@pytest.mark.parametrize("said", [None, False, True])
def test_what_is_added_to_a_text_is_what_autotokenizer_adds(
    said: bool | None, name: str, tmp_path: Path
) -> None:
    """llama.cpp issue 8990 (add_eos_token); `null` for add_bos_token. Beside a tokenizer.json
    it reads neither."""
    from transformers import AutoTokenizer

    path = save_tiny("LlamaForCausalLM", tmp_path / "in", tokenizer=spm_tokenizer())
    with_settings(path, **{f"add_{name}_token": said})
    fewbits.convert(path, tmp_path / "out.gguf")
    wanted = AutoTokenizer.from_pretrained(path)("Hello")["input_ids"]
    assert engine_tokenize(tmp_path / "out.gguf", "Hello", add_special=True) == wanted
    assert list(load_tokenizer(fewbits.open(path))("Hello")["input_ids"]) == wanted


def ends_in_engine(path: Path) -> set[int]:
    """The ids at which llama.cpp stops."""
    import llama_cpp

    with llamacpp._model(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        every = range(llama_cpp.llama_vocab_n_tokens(vocab))
        return {i for i in every if llama_cpp.llama_vocab_is_eog(vocab, i)}


def test_every_token_that_ends_a_text_ends_it_in_llamacpp(tmp_path: Path) -> None:
    """Phi-3's generation_config.json names three, one of which llama.cpp does not know by its words."""
    from transformers import GenerationConfig

    path = save_tiny("LlamaForCausalLM", tmp_path / "in")
    GenerationConfig(eos_token_id=[2, 300, 301]).save_pretrained(path)
    fewbits.convert(path, tmp_path / "out.gguf")
    assert ends_in_engine(tmp_path / "out.gguf") == {2, 300, 301}
    fewbits.convert(tmp_path / "out.gguf", tmp_path / "back", file="huggingface")
    assert set(GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id) == {2, 300, 301}


def test_ends_that_llamacpp_knows_by_their_words_end_a_text_in_transformers_too(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    spec = bpe_tokenizer()
    size = len(spec["model"]["vocab"])
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {"special": True}
    spec["added_tokens"] += [
        {"id": size + i, "content": text, **flags} for i, text in enumerate(("<|eom_id|>", "<|other|>"))
    ]
    path = save_tiny("LlamaForCausalLM", tmp_path / "in", tokenizer=spec)
    fewbits.convert(path, tmp_path / "out.gguf")
    fewbits.convert(tmp_path / "out.gguf", tmp_path / "back", file="huggingface")
    ends = set(GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id)
    assert ends == ends_in_engine(tmp_path / "out.gguf") == {2, size}


def test_of_several_chat_templates_the_default_one_is_compared(tmp_path: Path) -> None:
    """As Command R has them: a list of names and templates."""
    path = save_tiny("LlamaForCausalLM", tmp_path / "in")
    (path / "chat_template.jinja").unlink()
    named = [{"name": name, "template": f"{name} {{{{ messages }}}}"} for name in ("default", "tool_use")]
    with_settings(path, chat_template=named)
    receipt = fewbits.quantize(path, tmp_path / "out.gguf", to="q8_0", effort="fast", verify=False)
    assert not receipt.about.get("audit")
    assert (
        fewbits.open(tmp_path / "out.gguf").gguf_keys["tokenizer.chat_template"].value == named[0]["template"]
    )


def test_a_token_that_only_looks_like_a_byte_is_text(tmp_path: Path) -> None:
    spec = spm_tokenizer()
    spec["model"]["vocab"]["<0xGG>"] = len(spec["model"]["vocab"])
    path = save_tiny("LlamaForCausalLM", tmp_path / "in", tokenizer=spec)
    fewbits.convert(path, tmp_path / "out.gguf")
    assert nats(theirs(path), engine_logits(tmp_path / "out.gguf", TOKENS[0])) < 2e-5


# ---- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_without_its_target_is_named(name: str, tmp_path: Path) -> None:
    path = save_tiny("LlamaForCausalLM", tmp_path / "in")
    (path / name).unlink()
    (path / name).symlink_to("../../blobs/0123abcd")
    with pytest.raises(FileError, match=rf"{name} is a link to \.\./\.\./blobs/0123abcd, which is not there"):
        fewbits.open(path)


def test_a_link_to_a_gguf_file_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to("gone.gguf")
    with pytest.raises(FileError, match=r"link to gone\.gguf, which is not there"):
        fewbits.quantize(tmp_path / "model.gguf", to="q4_0")


# ---- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stale", ["copies", "index"])
def test_the_index_says_where_a_tensor_lies(stale: str, tmp_path: Path) -> None:
    """vLLM pull request 54230: a shard with old copies of tensors that the index has in another. And an index
    of shards that are gone beside a whole model.safetensors, which transformers takes first."""
    path = save_tiny("LlamaForCausalLM", tmp_path / "in")
    weights, wanted = load_file(path / "model.safetensors"), theirs(path)
    first, last = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    places = {name: first if i % 2 else last for i, name in enumerate(sorted(weights))}
    if stale == "copies":
        (path / "model.safetensors").unlink()
        for file in (first, last):
            own = {n: w if places[n] == file else torch.zeros_like(w) for n, w in weights.items()}
            save_file(own, path / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(ours(path), wanted)


# ---- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertModel"])
def test_without_architectures_the_class_is_that_of_the_model_type(name: str, tmp_path: Path) -> None:
    path = tmp_path / "in"
    save_tiny(name, path) if name == "LlamaForCausalLM" else save_encoder(name, path)
    file = path / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k != "architectures"}
    file.write_text(json.dumps(config))
    assert as_loaded(fewbits.open(path)).config["architectures"] == [name]


def test_infinity_as_transformers_saves_it_is_read(tmp_path: Path) -> None:
    import transformers

    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 32, "state_size": 16}
    config = transformers.Mamba2Config(vocab_size=600, n_groups=1, chunk_size=8, **fields)
    path = tmp_path / "in"
    transformers.Mamba2ForCausalLM(config).save_pretrained(path)
    assert "__float__" in (path / "config.json").read_text()
    assert torch.equal(ours(path), theirs(path))
    (path / "tokenizer.json").write_text(json.dumps(bpe_tokenizer()))
    fewbits.quantize(path, tmp_path / "out", to="int8_channel", effort="fast", verify=False)
    assert nats(theirs(path), ours(tmp_path / "out")) < 2e-3


def test_a_gguf_file_that_says_no_window_by_zero_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny("Phi3ForCausalLM", tmp_path / "in", sliding_window=None)

    def with_zero(*args: Any, **given: Any) -> Any:
        return gguf_metadata(*args, **given) | {"phi3.attention.sliding_window": u32(0)}

    monkeypatch.setattr(tiny, "gguf_metadata", with_zero)
    file = tiny.write_float_gguf(fewbits.open(path), tmp_path / "zero.gguf")
    wanted = theirs(path)
    assert nats(wanted, engine_logits(file, TOKENS[0])) < 2e-5
    assert nats(wanted, ours(file)) < 2e-5
    fewbits.convert(file, tmp_path / "floats", "huggingface")
    assert nats(wanted, theirs(tmp_path / "floats")) < 2e-5


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("GPT2LMHeadModel", "gpt2", {"n_embd": 256, "n_layer": 2, "n_head": 4}),
        ("BloomForCausalLM", "bloom", {"hidden_size": 256, "n_layer": 2, "n_head": 4}),
        ("MptForCausalLM", "mpt", {"d_model": 256, "n_layers": 2, "n_heads": 4}),
    ],
)
def test_configs_with_names_of_their_own_are_read(
    name: str, kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    torch.manual_seed(0)
    path = tmp_path / "in"
    config = transformers.CONFIG_MAPPING[kind](vocab_size=600, **fields)
    getattr(transformers, name)(config).save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps(bpe_tokenizer()))
    fewbits.quantize(path, tmp_path / "q", to="q6_k", file="native", effort="fast", verify=False)
    fewbits.convert(tmp_path / "q", tmp_path / "floats", "huggingface")
    assert nats(theirs(path), theirs(tmp_path / "floats")) < 2e-3
    assert torch.allclose(theirs(tmp_path / "floats"), ours(tmp_path / "q"), atol=0.05)


# ---- shapes and options --------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["gptq", "compressed-tensors", "awq", "mlx"])
def test_one_weight_that_does_not_fit_stays_in_float_with_the_reason(file: str, tmp_path: Path) -> None:
    path = save_tiny("LlamaForCausalLM", tmp_path / "in", num_hidden_layers=4)
    odd = "model.layers.0.patch.weight"
    edited(path, lambda tensors: tensors | {odd: torch.randn(64, 588)}, model_type="unknown-vision")
    edited(path, architectures=["UnknownVisionModel"])
    to = "int4_g128_asym" if file in ("awq", "mlx") else "int4_g128"
    receipt = fewbits.quantize(path, tmp_path / "out", to=to, file=file, effort="fast", verify=False)
    (row,) = [row for row in receipt.tensors if row.name == odd]
    assert row.format == "f32" and "64 x 588 is no shape for" in row.reason
    assert row in receipt.changed()
    assert sum(row.format == to for row in receipt.tensors) == 28


@pytest.mark.parametrize(("to", "file"), [("int4_g128_asym", "awq"), ("nf4", "bitsandbytes")])
def test_a_format_that_fits_few_weights_is_refused_under_their_own_names(
    to: str, file: str, tmp_path: Path
) -> None:
    path = save_tiny("LlamaForCausalLM", tmp_path / "in", hidden_size=200, intermediate_size=300)
    with pytest.raises(FewbitsError, match=r"model\.layers\.0\.\S+_proj\.weight: ") as caught:
        fewbits.quantize(path, tmp_path / "out", to=to, file=file, effort="fast")
    assert "blk." not in str(caught.value)


def test_a_file_type_of_llamacpp_is_a_gguf_file_or_said_not_to_be(tmp_path: Path) -> None:
    path = save_tiny("LlamaForCausalLM", tmp_path / "in")
    receipt = fewbits.quantize(path, tmp_path / "out", to="q4_0", effort="fast", verify=False)
    assert any("native directory" in note and "out.gguf" in note for note in receipt.notes)
    edited(path, architectures=["UnknownForCausalLM"])
    with pytest.raises(ModelError, match="--file native"):
        fewbits.quantize(path, to="q4_0", effort="fast")


# ---- files of other tools ------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["gptq", "compressed-tensors"])
def test_biases_of_zeros_that_autogptq_adds_change_nothing(file: str, tmp_path: Path) -> None:
    path = save_tiny("LlamaForCausalLM", tmp_path / "in")
    fewbits.quantize(path, tmp_path / "q", to="int4_g64", file=file, effort="fast", verify=False)
    wanted = ours(tmp_path / "q")
    parts = ("self_attn.q_proj", "mlp.down_proj")
    zeros = {f"model.layers.{i}.{part}.bias": torch.zeros(256) for i in (0, 1) for part in parts}
    edited(tmp_path / "q", lambda tensors: tensors | zeros)
    assert torch.equal(ours(tmp_path / "q"), wanted)
    receipt = fewbits.convert(tmp_path / "q", tmp_path / "q.gguf", requantize=True)
    assert any("_proj.bias" in note for note in receipt.notes)
    assert nats(wanted, engine_logits(tmp_path / "q.gguf", TOKENS[0])) < 0.05


def test_weights_of_quanto_are_refused_by_name(tmp_path: Path) -> None:
    def split(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        codes = tensors.pop("lm_head.weight").mul(10).to(torch.int8)
        return tensors | {"lm_head.weight._data": codes, "lm_head.weight._scale": torch.ones(600, 1)}

    path = edited(save_tiny("LlamaForCausalLM", tmp_path / "in"), split)
    with pytest.raises(FileError, match=r"lm_head\.weight\._data is I8.*nothing says how"):
        fewbits.open(path)


def test_files_without_their_index_are_named(tmp_path: Path) -> None:
    path = save_tiny("LlamaForCausalLM", tmp_path / "in")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    for i, half in enumerate((dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])), 1):
        save_file(half, path / f"model-0000{i}-of-00002.safetensors")
    with pytest.raises(FileError, match=r"has 2 files \(model-00001.*but no model\.safetensors\.index\.json"):
        fewbits.open(path)


@pytest.mark.parametrize(
    ("name", "option"),
    [("W4A16", "int4_g128"), ("FP8_DYNAMIC", "--activations fp8_dynamic"), ("awq", "--awq --file awq")],
)
def test_what_other_tools_call_a_scheme_is_answered_with_what_to_ask_for(name: str, option: str) -> None:
    with pytest.raises(PlanError, match=rf"did you mean .*{option}"):
        target_of(name)


@pytest.mark.parametrize("asked", sorted({words for each in ELSEWHERE.values() for words in each}))
def test_what_it_is_answered_with_is_there(asked: str, tmp_path: Path) -> None:
    path = save_tiny("LlamaForCausalLM", tmp_path / "in")
    words = [*asked.split(), "--tokens", "256", "--no-verify", "--out", str(tmp_path / "out")]
    assert main(["quantize", str(path), "--to", *words]) == 0
