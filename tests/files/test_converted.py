"""Rows of a float GGUF among the model's, and the model's codes under its names; without the converter."""

import json
from pathlib import Path

import pytest
import torch
from gguf import dequantize
from gguf.constants import GGMLQuantizationType

import fewbits
from fewbits.adapters.llamacpp_convert import check_converts, converted_architectures
from fewbits.adapters.older_config import full_config, with_old_names
from fewbits.errors import ModelError
from fewbits.files.checkpoint import Checkpoint
from fewbits.files.gguf.converted import open_converted
from fewbits.files.huggingface import HUGGINGFACE
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from fewbits.qtensor import QTensor
from tests.tiny import change_weights, read_by_gguf, save_tiny, write_float_gguf


def _pair(name: str, path: Path, **given: object) -> tuple[Checkpoint, Path]:
    source = open_checkpoint(save_tiny(name, path / "source", **given))
    return source, write_float_gguf(source, path / "float.gguf")


def _codes(source: Checkpoint, path: Path) -> Checkpoint:
    """Every matrix in q4_0."""
    fewbits.quantize(source, path, to="q4_0", file="native", effort="fast", verify=False)
    return open_checkpoint(path)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM"])
def test_codes_under_gguf_names_are_those_of_the_same_rows(name: str, tmp_path: Path) -> None:
    """Permuted heads and stacked experts: the same bytes as the file's own rows encoded."""
    source, path = _pair(name, tmp_path)
    converted = open_converted(path, source)
    assert set(converted.parts) >= {name for name in converted.floats.tensors if not name.startswith("rope")}
    codes = _codes(source, tmp_path / "codes")
    take = {
        name: FORMATS.get("q4_0")
        for name in converted.parts
        if all(codes.tensors[each].dtype == "q4_0" for each in converted.sources(name))
    }
    assert sum(name.startswith("blk.") for name in take) >= 8
    view, floats = converted.view(codes, take), read_by_gguf(path)
    for name in take:
        got, exact = view.tensors[name].load(), converted.floats.tensors[name].load()
        assert isinstance(got, QTensor) and got.format.name == "q4_0"
        want = FORMATS.get("q4_0").encode(exact)
        assert torch.equal(got.planes["blocks"], want.planes["blocks"]), name
        if name in floats:
            raw = got.planes["blocks"].numpy()
            theirs = torch.from_numpy(dequantize(raw, GGMLQuantizationType.Q4_0))
            assert (theirs - floats[name][1]).abs().max() < 0.13 * exact.abs().max()


def test_equal_rows_are_told_apart_by_names(tmp_path: Path) -> None:
    source = open_checkpoint(
        change_weights(
            save_tiny("LlamaForCausalLM", tmp_path / "source"),
            dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), torch.zeros_like)
            | {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros_like for i in (0, 1)},
        )
    )
    converted = open_converted(write_float_gguf(source, tmp_path / "float.gguf"), source)
    assert converted.sources("output.weight") == ("lm_head.weight",)
    assert converted.sources("token_embd.weight") == ("model.embed_tokens.weight",)
    assert converted.sources("blk.1.ffn_up.weight") == ("model.layers.1.mlp.up_proj.weight",)


def test_a_changed_row_is_not_found(tmp_path: Path) -> None:
    _, path = _pair("LlamaForCausalLM", tmp_path)

    def one_bit(w: torch.Tensor) -> torch.Tensor:
        w[3, 5] = torch.nextafter(w[3, 5], torch.tensor(9.0))
        return w

    change_weights(tmp_path / "source", {"model.layers.1.mlp.up_proj.weight": one_bit})
    converted = open_converted(path, open_checkpoint(tmp_path / "source"))
    assert "blk.1.ffn_up.weight" not in converted.parts and "blk.0.ffn_up.weight" in converted.parts


def test_values_come_back_under_the_models_names(tmp_path: Path) -> None:
    source, path = _pair("MixtralForCausalLM", tmp_path)
    out = tmp_path / "q8_0.gguf"
    fewbits.quantize(path, out, to="q8_0", effort="fast", verify=False)
    restored = open_converted(path, source).restored(source, out)
    by_table = open_checkpoint(out)
    for name, tensor in by_table.tensors.items():
        want, got = tensor.load(), restored.tensors[name].load()
        assert restored.tensors[name].kind == tensor.kind
        as_floats = [x.decode() if isinstance(x, QTensor) else x.float() for x in (want, got)]
        assert torch.equal(*as_floats), name


def test_experts_of_an_unknown_architecture_are_quantized_one_by_one(tmp_path: Path) -> None:
    """A float GGUF of any architecture is an input: its arrays of experts too."""
    _, path = _pair("MixtralForCausalLM", tmp_path)
    data = path.read_bytes()
    assert data.count(b"llama") > 3
    unknown = tmp_path / "unknown.gguf"
    unknown.write_bytes(data.replace(b"llama", b"lxxma"))
    receipt = fewbits.quantize(unknown, tmp_path / "u.gguf", to="q4_0", effort="fast", verify=False)
    known = fewbits.quantize(path, tmp_path / "k.gguf", to="q4_0", effort="fast", verify=False)
    ours, theirs = (read_by_gguf(tmp_path / name) for name in ("u.gguf", "k.gguf"))
    experts = [name for name in theirs if name.endswith("_exps.weight")]
    assert len(experts) == 6 and {theirs[name][0] for name in experts} == {"q4_0"}
    assert all(ours[name][2] == theirs[name][2] for name in experts)
    rows = {row.gguf_name: row for row in receipt.tensors}
    assert all(
        rows[row.gguf_name].relative_error == row.relative_error
        for row in known.tensors
        if row.gguf_name in experts
    )


def test_without_the_converter_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWBITS_CONVERTER", str(tmp_path / "bin" / "python"))
    assert not converted_architectures()
    with pytest.raises(ModelError, match=r"Glm4ForCausalLM: .*make converter.*native directory"):
        check_converts({"architectures": ["Glm4ForCausalLM"]})


def test_a_model_without_a_tokenizer_is_refused_before_the_converter_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny("LlamaForCausalLM", tmp_path / "model")
    for path in model.glob("*token*"):
        path.unlink()
    monkeypatch.setattr("fewbits.workflow.converted.architecture", lambda config: None)
    monkeypatch.setattr("fewbits.workflow.converted.check_converts", lambda config: None)
    with pytest.raises(ModelError, match=r"no tokenizer files, which llama.cpp's converter needs"):
        fewbits.quantize(model, tmp_path / "o.gguf", to="q4_0", effort="fast")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("model_type", "given"),
    [
        ("bamba", {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]}),
        ("glm4_moe_lite", {"num_hidden_layers": 4}),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2}),
        ("minimax_m2", {"rotary_dim": 64}),
        ("nemotron_h", {"hybrid_override_pattern": "ME*E"}),
        ("gpt2", {"n_positions": 64}),
        ("phi", {"rope_theta": 5e5, "partial_rotary_factor": 0.25}),
    ],
)
def test_older_fields_mean_the_same_to_transformers(model_type: str, given: dict[str, object]) -> None:
    """Its class reads the older fields, the newer ones left out, to the same config."""
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[model_type]
    config = known.from_dict({"model_type": model_type, **given})
    whole = full_config(Checkpoint(Path("model"), HUGGINGFACE, {}, config.to_dict()))
    older = with_old_names(whole)
    assert all(older[name] == value for name, value in given.items())
    newer = {"layer_types", "layers_block_type", "rope_parameters", "mlp_layer_types"}
    newer |= {name for name in older if isinstance(getattr(known, name, None), property)}
    newer -= given.keys()
    again = known.from_dict({name: value for name, value in older.items() if name not in newer})
    full = {"partial_rotary_factor": 1.0}  # what no entry means
    found, wanted = (json.loads(json.dumps(each.to_dict())) for each in (again, config))
    for name, value in wanted.items():
        if name == "rope_parameters":
            value, found[name] = ({**full, **(each or {})} for each in (value, found[name]))
        assert found[name] == value, name
