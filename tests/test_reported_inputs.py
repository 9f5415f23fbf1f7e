"""Inputs from public reports: what transformers' own loader makes of them, every output must agree with."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.adapters.llamacpp import engine_logits
from fewbits.adapters.transformers import load_model
from fewbits.calibrate.tokens import Tokens
from fewbits.errors import FileError, ModelError
from tests.tiny import save_tiny

if find_spec("llama_cpp") is None:
    pytest.skip("llama-cpp-python is not installed", allow_module_level=True)

LOSS = 4e-3  # nats, of int8: about twice the largest that was measured, 0.0021; a wrong theta makes 0.09
TOKENS = torch.tensor([[1, 5, 9, 100, 250, 3, 77, 400]])
Tensors = dict[str, torch.Tensor]


def edited(
    path: Path, tensors: Callable[[Tensors], Tensors] | None = None, drop: str = "", **fields: Any
) -> Path:
    """A model directory after changes of its weights and config.json. drop: fields, with spaces between."""
    if tensors is not None:
        changed = tensors(load_file(path / "model.safetensors"))
        save_file(
            {n: t.contiguous() for n, t in changed.items()}, path / "model.safetensors", {"format": "pt"}
        )
    config = json.loads((path / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if name not in drop.split()}
    (path / "config.json").write_text(json.dumps(config))
    return path


def theirs(path: Path) -> torch.Tensor:
    """Logits by transformers' own loader, with no argument that a user would not give."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS).logits[0]


def ours(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(fewbits.open(path))(TOKENS).logits[0]


def nats(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Mean KL divergence over the positions."""
    p, q = wanted.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def calibrated(path: Path, out: Path, to: str = "int8_g32", **given: Any) -> fewbits.Receipt:
    """As the default command does, on random text; a model that is rounded to nearest instead is a fault."""
    text = Tokens(torch.randint(3, 500, (4, 32), generator=torch.Generator().manual_seed(0)), "random", "")
    receipt = fewbits.quantize(path, out, to=to, calibrate=text, verify=False, **given)
    assert receipt.calibration is not None and not any("rounded to nearest" in note for note in receipt.notes)
    return receipt


def agree(path: Path, tmp: Path, gguf: bool = True) -> fewbits.Receipt:
    """Our reading, a calibrated native directory, a GPTQ one and a GGUF file in the engine, all against
    transformers."""
    wanted = theirs(path)
    assert torch.equal(ours(path), wanted)
    receipt = calibrated(path, tmp / "native")
    assert nats(wanted, ours(tmp / "native")) < LOSS
    floats = tmp / "floats"
    fewbits.convert(path, floats, "huggingface")
    assert torch.equal(theirs(floats), wanted)
    if gguf:
        fewbits.convert(path, tmp / "float.gguf")
        assert nats(wanted, engine_logits(tmp / "float.gguf", TOKENS[0])) < 2e-5
        assert nats(wanted, ours(tmp / "float.gguf")) < 2e-5
    return receipt


# ---- ties and defaults ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_an_output_unlike_the_embedding_is_kept_although_config_says_tied(name: str, tmp_path: Path) -> None:
    path = edited(save_tiny(name, tmp_path / "in", tie_word_embeddings=False), tie_word_embeddings=True)
    receipt = agree(path, tmp_path)
    assert any("tie_word_embeddings" in note and "differ" in note for note in receipt.notes)
    assert fewbits.open(tmp_path / "native").config["tie_word_embeddings"] is False


def test_a_tie_is_the_default_of_the_class(tmp_path: Path) -> None:
    path = save_tiny("Gemma3ForCausalLM", tmp_path / "in", tie_word_embeddings=True)
    agree(edited(path, drop="tie_word_embeddings"), tmp_path)


def test_a_stored_output_alone_is_also_the_embedding(tmp_path: Path) -> None:
    def swapped(tensors: Tensors) -> Tensors:
        return {"lm_head.weight" if "embed" in name else name: value for name, value in tensors.items()}

    path = save_tiny("LlamaForCausalLM", tmp_path / "in", tie_word_embeddings=True)
    agree(edited(path, swapped), tmp_path)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("MixtralForCausalLM", {"num_key_value_heads": 8, "num_attention_heads": 8}),
        ("Gemma3ForCausalLM", {"head_dim": 256, "query_pre_attn_scalar": 256}),
        ("MistralForCausalLM", {"num_key_value_heads": 8, "num_attention_heads": 8}),
        ("Qwen3ForCausalLM", {"head_dim": 128}),
        ("LlamaForCausalLM", {}),
        ("Phi3ForCausalLM", {"num_key_value_heads": 4}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": True}),
    ],
)
def test_fields_that_config_leaves_out_have_the_defaults_of_the_class(
    name: str, given: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    path = save_tiny(name, tmp_path / "in", **given)
    config = json.loads((path / "config.json").read_text())
    cls = transformers.CONFIG_MAPPING[config["model_type"]]
    bare = cls(**{k: config[k] for k in ("hidden_size", "num_attention_heads", "num_hidden_layers")})
    default = bare.to_dict()
    same = [field for field in config if field in default and default[field] == config[field]]
    left_out = {"rope_parameters", "rope_theta", *same} - {"model_type", "architectures", "vocab_size"}
    left_out -= {"hidden_size", "num_attention_heads", "num_hidden_layers"}
    agree(edited(path, drop=" ".join(left_out)), tmp_path)


# ---- tensors that are not the model's -------------------------------------------------------------


@pytest.mark.parametrize("rows", [304, 700])
def test_rows_unlike_vocab_size_are_refused_before_anything_is_written(rows: int, tmp_path: Path) -> None:
    def resized(tensors: Tensors) -> Tensors:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.randn(rows, 256)
        return tensors

    path = edited(save_tiny("LlamaForCausalLM", tmp_path / "in"), resized)
    for given in ({"to": "q8_0"}, {"to": "int4_g64"}, {"to": "int4_g64", "effort": "fast", "file": "gptq"}):
        with pytest.raises(ModelError, match=rf"embed_tokens.*\({rows}, 256\).*config.json has \(600, 256\)"):
            fewbits.quantize(path, tmp_path / "out", **given)
    with pytest.raises(ModelError, match=r"config\.json has"):
        fewbits.convert(path, tmp_path / "out.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


BESIDE = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": (32,),  # as transformers 4.30 saved it
    "model.layers.2.self_attn.q_proj.weight": (256, 256),  # DeepSeek's MTP: a layer more than config says
    "model.layers.2.eh_proj.weight": (256, 512),
    "mtp.layers.0.mlp.up_proj.weight": (512, 256),
    "vision_tower.encoder.layers.0.self_attn.q_proj.weight": (64, 64),
    "multi_modal_projector.linear.weight": (256, 64),
    "model.layers.0.self_attn.q_proj.bias": (256,),  # config says that there is none
}


@pytest.mark.parametrize(
    "name", [name if i < 3 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(BESIDE)]
)
def test_what_transformers_passes_over_is_kept_in_float(name: str, tmp_path: Path) -> None:
    path = save_tiny("LlamaForCausalLM", tmp_path / "in")
    receipt = agree(edited(path, lambda tensors: tensors | {name: torch.ones(BESIDE[name])}), tmp_path)
    assert any(name in note for note in receipt.notes)
    assert fewbits.open(tmp_path / "native").tensors[name].dtype == "f32"
    outputs = {"gptq": "int4_g64", "compressed-tensors": "int4_g64", "awq": "int4_g64_asym"}
    for file, to in outputs.items():
        fewbits.quantize(path, tmp_path / file, to=to, file=file, effort="fast", verify=False)
        assert fewbits.open(tmp_path / file).tensors[name].dtype == "f32"


def test_blocks_that_config_does_not_count_are_named_and_one_of_another_kind_is_not(tmp_path: Path) -> None:
    path = edited(save_tiny("LlamaForCausalLM", tmp_path / "in"), num_hidden_layers=1)
    with pytest.raises(
        ModelError, match=r"has 1 blocks model\.layers, but the file has model\.layers\.1 too"
    ):
        fewbits.quantize(path, tmp_path / "out", to="q4_0", effort="fast")

    def next_token(tensors: Tensors) -> Tensors:
        """DeepSeek's block for the token after the next: a whole one, and more."""
        more = {n.replace("rs.1.", "rs.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}
        return tensors | more | {"model.layers.2.eh_proj.weight": torch.ones(256, 512)}

    agree(edited(path, next_token, num_hidden_layers=2), tmp_path)


def test_a_lora_adapter_is_named_with_the_way_to_merge_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    save_file(
        {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(FileError, match=r"is a LoRA adapter and no model.*merge_and_unload"):
        fewbits.quantize(tmp_path, tmp_path / "out", to="q4_0", effort="fast")


def test_weights_of_lora_are_named_with_the_way_to_merge_them(tmp_path: Path) -> None:
    def adapted(tensors: Tensors) -> Tensors:
        return tensors | {
            "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(8, 256),
            "model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(256, 8),
        }

    path = edited(save_tiny("LlamaForCausalLM", tmp_path / "in"), adapted)
    for to in ("q4_0", "int4_g64"):
        with pytest.raises(ModelError, match=r"2 tensors belong to a LoRA adapter.*merge_and_unload"):
            fewbits.quantize(path, tmp_path / "out", to=to, effort="fast")


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda name: f"language_model.{name}",  # a decoder cut out of a multimodal model
    ],
)
def test_parts_that_training_adds_to_names_are_left_out(
    renamed: Callable[[str], str], tmp_path: Path
) -> None:
    plain = save_tiny("LlamaForCausalLM", tmp_path / "plain")
    path = save_tiny("LlamaForCausalLM", tmp_path / "in")
    tower = {f"vision_tower.encoder.layers.{i}.self_attn.q_proj.weight": torch.ones(64, 64) for i in (0, 1)}
    edited(path, lambda tensors: {renamed(name): value for name, value in tensors.items()} | tower)
    wanted = theirs(plain)
    assert torch.equal(ours(path), wanted)
    receipt = calibrated(path, tmp_path / "out")
    assert any("named as transformers names them" in note for note in receipt.notes)
    assert any("vision_tower" in note for note in receipt.notes)
    assert nats(wanted, ours(tmp_path / "out")) < LOSS
    fewbits.convert(path, tmp_path / "float.gguf")
    assert nats(wanted, engine_logits(tmp_path / "float.gguf", TOKENS[0])) < 2e-5


def test_a_model_saved_without_its_tied_head_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    path = save_tiny("Qwen2ForCausalLM", tmp_path / "in")  # AutoModel saves it so: no "model." in its names
    agree(edited(path, lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()}), tmp_path)


# ---- quantization settings -----------------------------------------------------------------------


def in_fp8(tensors: Tensors) -> Tensors:
    return {n: t.to(torch.float8_e4m3fn) if n.endswith("_proj.weight") else t for n, t in tensors.items()}


def test_weights_cast_to_fp8_without_scales_are_floats(tmp_path: Path) -> None:
    path = edited(save_tiny("LlamaForCausalLM", tmp_path / "in"), in_fp8)
    agree(path, tmp_path, gguf=False)
    plain = save_tiny("LlamaForCausalLM", tmp_path / "plain")  # the same weights as bf16 holds them
    edited(
        plain, lambda tensors: {n: t.bfloat16() if t.itemsize == 1 else t for n, t in in_fp8(tensors).items()}
    )
    for model in (path, plain):
        fewbits.convert(model, tmp_path / f"{model.name}.gguf")
    logits = [engine_logits(tmp_path / f"{model.name}.gguf", TOKENS[0]) for model in (path, plain)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "OPTForCausalLM"])
@pytest.mark.parametrize("given", ["hf_quant_config.json", "nothing", "compression_config", "text_config"])
def test_scales_are_read_or_refused_but_never_dropped(name: str, given: str, tmp_path: Path) -> None:
    def scaled(tensors: Tensors) -> Tensors:
        weights = [name for name in tensors if name.endswith("_proj.weight")]
        return in_fp8(tensors) | {f"{name}_scale": torch.tensor([0.5]) for name in weights}

    path = edited(save_tiny("LlamaForCausalLM", tmp_path / "in"), scaled)
    edited(path, architectures=[name], **({} if "Llama" in name else {"model_type": "opt"}))
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = {"config_groups": groups, "format": "float-quantized", "ignore": ["lm_head"]}
    if given == "hf_quant_config.json":
        (path / given).write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
        with pytest.raises(FileError, match="quant_method 'modelopt'"):
            fewbits.open(path)
    elif given == "nothing":
        with pytest.raises(FileError, match=r"is F8_E4M3 under .*_scale, and nothing says how"):
            fewbits.open(path)
    else:
        ours = {"quant_method": "compressed-tensors", **settings}
        edited(path, **{given: settings if given == "compression_config" else {"quantization_config": ours}})
        weight = "model.layers.0.self_attn.q_proj.weight"
        stored = load_file(path / "model.safetensors")[weight].float()
        assert torch.equal(fewbits.open(path).tensors[weight].load().decode(), 0.5 * stored)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("hqq", "torchao", "modelopt", "awq", "fp8")]


@pytest.mark.parametrize("method", ["mxfp4", "gptq", None, *SLOW])
def test_settings_left_over_on_plain_weights_are_dropped(method: str | None, tmp_path: Path) -> None:
    path = save_tiny("LlamaForCausalLM", tmp_path / "in")
    wanted = theirs(path)
    more = {"bits": 4, "group_size": 128, "weight_block_size": [128, 128]}
    edited(path, quantization_config={"quant_method": method, **more} if method else {})
    assert torch.equal(ours(path), wanted)
    receipt = calibrated(path, tmp_path / "out")
    assert any("quantization_config" in note and "dropped" in note for note in receipt.notes)
    assert nats(wanted, ours(tmp_path / "out")) < LOSS
