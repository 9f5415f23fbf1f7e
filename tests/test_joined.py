"""Files whose query, key and value are one matrix, which transformers splits when it loads them."""

from pathlib import Path

import pytest
import torch
import transformers

import fewbits
from fewbits.adapters.as_loaded import as_loaded
from fewbits.calibrate.tokens import Tokens
from fewbits.files.open import open_checkpoint
from tests.encoders import save_encoder
from tests.tiny import alike

TEXT = Tokens.of(torch.randint(5, 300, (8, 24), generator=torch.Generator().manual_seed(1)), "random")
IDS = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def hidden(model: transformers.PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=IDS).last_hidden_state


@pytest.mark.parametrize("name", ["GteModel", "NomicBertModel", "JinaEmbeddingsV3Model"])
def test_joined_tensors_are_quantized_in_their_parts(name: str, tmp_path: Path) -> None:
    path = save_encoder(name, tmp_path / "float")
    cls = getattr(transformers, name)
    parent, info = cls.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    stored, parts = open_checkpoint(path), as_loaded(open_checkpoint(path))
    joined = [each for each in stored.tensors if each not in parts.tensors]
    assert joined and any(joined[0] in note for note in parts.notes)
    state = parent.state_dict()
    for key in (key for key in state if "q_proj" in key or "v_proj" in key):
        assert torch.equal(parts.tensors[key].load(), state[key])

    receipt = fewbits.quantize(path, tmp_path / "int4", to="int4_g32", method="gptq", calibrate=TEXT)
    assert receipt.coverage["share"] == 1 and any(
        "joined tensors are split" in note for note in receipt.notes
    )
    fewbits.convert(tmp_path / "int4", tmp_path / "decoded", file="huggingface")
    decoded, info = cls.from_pretrained(tmp_path / "decoded", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert alike(hidden(fewbits.load(tmp_path / "int4")), hidden(decoded))
    apart = (hidden(decoded) - hidden(parent)).norm() / hidden(parent).norm()
    assert 0 < apart < 0.5  # of noise, 1.4
