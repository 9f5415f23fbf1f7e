"""Programs of torch.export: what torch alone computes from the file, against the model."""

import subprocess
import sys

import pytest
import torch

import fewbits
from fewbits.cli.main import main
from tests.encoders import save_encoder
from tests.tiny import change_weights, save_tiny

RUN = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
torch.save(program(**torch.load(sys.argv[2])), sys.argv[3])
assert not any(name.split(".")[0] in ("fewbits", "transformers") for name in sys.modules)
"""


@pytest.mark.parametrize(("name", "to"), [("DistilBertForSequenceClassification", "int8_channel"),
                                          ("BertModel", "int4_g32_asym")])  # fmt: skip
def test_torch_alone_computes_what_the_model_does(tmp_path, capsys, name, to):
    native, out = tmp_path / "native", tmp_path / "model.pt2"
    fewbits.quantize(save_encoder(name, tmp_path / "m"), native, to=to, effort="fast", verify=False)
    assert main(["convert", str(native), str(out)]) == 0
    assert "within" in capsys.readouterr().out
    model = fewbits.load(native)
    given = {
        "input_ids": torch.randint(5, 300, (4, 33)),
        "attention_mask": torch.ones(4, 33, dtype=torch.int64),
    }
    given["attention_mask"][2, 20:] = 0
    if name == "BertModel":
        given["token_type_ids"] = torch.ones(4, 33, dtype=torch.int64)
    torch.save(given, tmp_path / "given.pt")
    files = [str(tmp_path / file) for file in ("model.pt2", "given.pt", "found.pt")]
    subprocess.run([sys.executable, "-c", RUN, *files], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        wanted = model(**given)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], atol=1e-5, rtol=1e-5)
    state = torch.export.load(out).state_dict
    held = sum(value.nbytes for value in state.values())
    assert held == sum(tensor.nbytes for tensor in fewbits.open(native).tensors.values())


def test_what_generates_text_or_exists_is_refused(tmp_path, capsys):
    model = save_tiny("LlamaForCausalLM", tmp_path / "m")
    assert main(["convert", str(model), str(tmp_path / "model.pt2")]) == 1
    assert "generates text" in capsys.readouterr().err
    (tmp_path / "there.pt2").write_text("x")
    encoder = save_encoder("BertModel", tmp_path / "e")
    assert main(["convert", str(encoder), str(tmp_path / "there.pt2")]) == 1
    assert "exists" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "m", "there.pt2"]


def test_bad_input_is_named_and_nothing_is_written(tmp_path, capsys):
    encoder = save_encoder("BertModel", tmp_path / "e")
    out = tmp_path / "new" / "model.pt2"
    assert main(["quantize", str(encoder), "--to", "int8_channel", "--out", str(out)]) == 1
    assert f"fewbits convert DIRECTORY {out}" in capsys.readouterr().err
    change_weights(encoder, {"encoder.layer.0.output.dense.weight": lambda w: w * torch.nan})
    assert main(["convert", str(encoder), str(out)]) == 1
    assert "weights are damaged" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt2"))
