"""What transformers' loader reads otherwise than it is meant is refused before it is written."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits
from fewbits.errors import FormatError

pytest.importorskip("compressed_tensors")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore:.*are held as floats")]

TINY = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CASES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"intermediate_size": 96},  # its head has another name in files
    "bert": {"intermediate_size": 96, "is_decoder": True},  # its head is a copy of the table
    "mixtral": {"intermediate_size": 96, "num_local_experts": 4, "num_key_value_heads": 2},
}
REFUSED: dict[str, dict[str, Any]] = {
    "falcon": {},  # its class initializes weights that are not there
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 64},  # no linear maps
    "granitemoe": {"intermediate_size": 96, "num_local_experts": 4, "num_key_value_heads": 2},  # arrays
}


def saved(kind: str, fields: dict[str, Any], folder: Path) -> None:
    config = transformers.CONFIG_MAPPING[kind](**TINY | fields)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize("kind", CASES)
def test_what_is_written_is_read_by_transformers_to_the_same_logits(kind: str, tmp_path: Path) -> None:
    saved(kind, CASES[kind], tmp_path / "float")
    out = tmp_path / "int4"
    fewbits.quantize(
        tmp_path / "float", out, to="int4_g32", effort="fast", file="compressed-tensors", verify=False
    )
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        found = fewbits.load(out)(input_ids=ids).logits
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, output_loading_info=True
        )
        moved = (model.eval()(input_ids=ids).logits - found).norm() / (found - found.mean()).norm()
    assert moved < (
        2e-3 if kind == "mixtral" else 1e-5
    )  # it decodes experts in the type of their scales, f16
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_not_be_read_is_refused_before_it_is_written(kind: str, tmp_path: Path) -> None:
    saved(kind, REFUSED[kind], tmp_path / "float")
    out = tmp_path / "int4"
    with pytest.raises(
        FormatError, match="transformers does not read a compressed-tensors directory of this"
    ):
        fewbits.quantize(
            tmp_path / "float", out, to="int4_g32", effort="fast", file="compressed-tensors", verify=False
        )
    assert not out.exists()
