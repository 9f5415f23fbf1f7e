"""Adapters of PEFT, read without it; what they hold besides is refused by name; GGUF by the gguf package."""

import json

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from fewbits.cli.main import main
from fewbits.errors import FewbitsError, FileError, ModelError
from fewbits.files.adapter import open_adapter
from fewbits.files.gguf.adapter import write_adapter
from fewbits.files.open import open_checkpoint
from tests.adapters import save_adapter, with_adapter
from tests.tiny import save_tiny, tiny_model

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("adapter") / "base", **SMALL)


@pytest.fixture
def adapter(tmp_path, base):
    return save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])


@pytest.mark.parametrize("given", [{}, {"use_rslora": True}, {"rank_pattern": {"up_proj": 2}}])
def test_what_is_added_is_what_peft_adds(tmp_path, base, given):
    path = save_adapter(base, tmp_path / "adapter", **given)
    peft = with_adapter(tiny_model("LlamaForCausalLM", **SMALL), **given).base_model
    found = open_adapter(path)
    modules = {name: m for name, m in peft.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert {f"{name}.weight" for name in modules} == set(found.weights) and found.base == ""
    for name, module in modules.items():
        torch.testing.assert_close(
            found.weights[f"{name}.weight"].product(),
            module.get_delta_weight("default"),
            rtol=1e-5,
            atol=1e-7,
        )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"use_dora": True}, "use_dora: more than W"),
        ({"bias": "lora_only"}, "bias 'lora_only': more than"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: more than"),
        ({"alpha_pattern": {"up_proj": 3}}, "alpha_pattern: more than"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa': more than"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A' is not an A or B of a linear layer"),
    ],
)
def test_what_is_more_than_low_rank_is_named(tmp_path, base, given, said):
    with pytest.raises(FewbitsError, match=said):
        open_adapter(save_adapter(base, tmp_path / "adapter", **given))


def test_other_kinds_of_adapters_are_named(adapter):
    edit(adapter, peft_type="IA3")
    with pytest.raises(ModelError, match="an adapter of kind IA3; only LORA is supported"):
        open_adapter(adapter)


def edit(path, **changes):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))


def edited(path, change):
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(A), "layers.0.mlp.up_proj: lora_A is missing"),
        (lambda t: t.update({A: torch.full((4, 64), float("nan"))}), "NaN or infinite"),
        (lambda t: t.update({A: torch.ones(3, 64)}), "different ranks"),
        (lambda t: t.update({A: torch.ones(4, 64, dtype=torch.int8)}), "floats of two dimensions"),
        (lambda t: t.clear(), "holds no adapter"),
    ],
)
def test_damaged_factors_are_named(adapter, change, said):
    edited(adapter, change)
    with pytest.raises(FileError, match=said):
        open_adapter(adapter)


def test_damaged_files_are_named(tmp_path, adapter):
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    with pytest.raises(FileError, match="truncated"):
        open_adapter(adapter)
    weights.unlink()
    with pytest.raises(FileError, match=r"has no adapter_model.safetensors; save it with PEFT"):
        open_adapter(adapter)
    weights.write_bytes(whole)
    for alpha in ("8", -1, None):
        edit(adapter, lora_alpha=alpha)
        with pytest.raises(FileError, match=r"lora_alpha is .* not positive"):
            open_adapter(adapter)
    edit(adapter, lora_alpha=8, r=5)
    with pytest.raises(FileError, match=r"has not the rank of adapter_config.json, 5"):
        open_adapter(adapter)
    with pytest.raises(FileError, match=r"has no adapter_config.json"):
        open_adapter(tmp_path)


# ---- GGUF ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [{}, {"use_rslora": True}, {"use_rslora": True, "rank_pattern": {"up_proj": 2}}]
)
def test_gguf_has_the_keys_and_layout_of_llama_cpp(tmp_path, base, given, capsys):
    path = save_adapter(base, tmp_path / "adapter", **given)
    out = tmp_path / "adapter.gguf"
    assert main(["convert", str(path), str(out), "--base", str(base)]) == 0
    assert "14 weights" in capsys.readouterr().out
    reader = GGUFReader(out)
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert (said["general.type"], said["adapter.type"], said["general.architecture"]) == (
        "adapter",
        "lora",
        "llama",
    )
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    assert len(tensors) == 28
    found = open_adapter(path).weights
    for stem, name in (("blk.1.ffn_up", "mlp.up_proj"), ("blk.1.attn_q", "self_attn.q_proj")):
        a, b = tensors[f"{stem}.weight.lora_a"], tensors[f"{stem}.weight.lora_b"]
        product = said["adapter.lora.alpha"] / len(a) * b @ a  # as llama.cpp computes it
        wanted = found[f"model.layers.1.{name}.weight"].product()
        if name.endswith(
            "q_proj"
        ):  # the pairs that are rotated together: (0, d/2), (1, d/2 + 1) ... of each head
            wanted = wanted.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
        torch.testing.assert_close(product, wanted, rtol=1e-5, atol=1e-6)
    assert main(["convert", str(path), str(out), "--base", str(base)]) == 1
    assert "exists" in capsys.readouterr().err


def test_what_gguf_cannot_hold_is_named(tmp_path, adapter, capsys):
    other = save_tiny("LlamaForCausalLM", tmp_path / "other", **SMALL | {"hidden_size": 128})
    with pytest.raises(ModelError, match="which is"):
        write_adapter(open_adapter(adapter), open_checkpoint(other), tmp_path / "out.gguf")
    assert main(["convert", str(adapter), str(tmp_path / "out")]) == 1
    assert "converted to GGUF only" in capsys.readouterr().err
    assert main(["convert", str(adapter), str(tmp_path / "out.gguf")]) == 1
    assert "names no model that it belongs to; give it (--base)" in capsys.readouterr().err
    assert main(["convert", str(other), str(tmp_path / "out.gguf"), "--base", str(other)]) == 1
    assert "--base is of an adapter" in capsys.readouterr().err
    assert not (tmp_path / "out.gguf").exists()
