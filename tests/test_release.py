"""What follows the writing: the audit tells differences, the card says what is known, the push is careful."""

import json
import shutil
from dataclasses import replace

import pytest
from huggingface_hub import metadata_load

from fewbits.cli.main import main
from fewbits.errors import FileError
from fewbits.files.gguf.model import open_gguf
from fewbits.files.open import open_checkpoint
from fewbits.release.audit import audit
from fewbits.release.publish import card_path, finished, measured, push, read_receipt
from fewbits.release.verify import Outcome
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests.tiny import save_tiny

SAID = "---\nlicense: apache-2.0\nbase_model: org/base\ntags:\n- x\n---\n# Reference\n"
SAME = Outcome("llama.cpp", "same", "1.0", 0.1, 0.001, 8, 1.0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("release") / "reference")
    (path / "README.md").write_text(SAID)
    (path / "LICENSE").write_text("free")
    return open_checkpoint(path)


def quantized(model, out):
    quantize(model, out, Request("q8_0"))
    return out


@pytest.fixture(params=["m.gguf", "m"])
def output(reference, tmp_path, request):
    out = tmp_path / request.param
    return out, quantize(reference, out, Request("q8_0" if out.suffix else "int8_g32"))


def test_nothing_is_lost_on_the_way(reference, output):
    assert audit(reference, open_checkpoint(output[0])) == []


LOSSES = {
    "chat_template.jinja": "chat template is missing",
    "tokenizer.json": "tokenizer cannot be loaded",
    "LICENSE": "LICENSE of the reference is missing",
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_told(reference, tmp_path, name):
    out = tmp_path / "m"
    quantize(reference, out, Request("int8_g32"))
    (out / name).unlink()
    assert any(LOSSES[name] in found for found in audit(reference, open_checkpoint(out)))


def test_other_special_tokens_and_added_tokens_are_told(reference, tmp_path):
    out = shutil.copytree(reference.path, tmp_path / "m")
    settings = json.loads((out / "tokenizer_config.json").read_text()) | {"eos_token": "<s>"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    assert any(
        "eos token is 1, the reference's 2" in found for found in audit(reference, open_checkpoint(out))
    )


def test_the_card_inherits_and_says_what_is_known(reference, output):
    out, receipt = output
    receipt = finished(receipt, reference, out, SAME)
    card, front = card_path(out).read_text(), metadata_load(card_path(out))
    assert front["license"] == "apache-2.0" and front["base_model"] == "org/base"
    assert front["base_model_relation"] == "quantized"
    assert "same" in card and "not measured" in card and "Reference" not in card
    figures = {"text": "t", "tokens": 9, "context": 8, "kl": 0.25, "kl_error": 0.01, "agreement": 0.5,
               "perplexity": 3.0, "reference_perplexity": 2.0}  # fmt: skip
    measured(out, figures)
    assert "0.2500" in card_path(out).read_text() and read_receipt(out).evaluation["kl"] == 0.25
    assert read_receipt(out).verified["verdict"] == "same"


def test_a_card_s_yaml_is_read_as_the_hub_reads_it(tmp_path, output, reference):
    """Quoted values and lists were lost, and a comment became part of the license."""
    out, receipt = output
    other = shutil.copytree(reference.path, tmp_path / "other")
    said = "---\nlicense: 'apache-2.0'  # since 2024\nlanguage:\n- en\n- 'no'\nbase_model:\n- org/one\n---\n"
    (other / "README.md").write_text(said)
    finished(receipt, open_checkpoint(other), out, None)
    front = metadata_load(card_path(out))
    assert (front["license"], front["language"], front["base_model"]) == (
        "apache-2.0",
        ["en", "no"],
        "org/one",
    )
    keys = open_gguf(quantized(other, tmp_path / "g.gguf")).gguf_keys
    assert keys["general.license"].value == "apache-2.0" and keys["general.base_model.0.name"].value == "one"


DAMAGED = {
    "no YAML": "license: [apache",
    "a list": "- license",
    "nested too deeply": "[" * 20_000,
    "a tag that would run": "license: !!python/object/apply:os.system [true]",
    "not UTF-8": b"license: \xff",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_card_of_the_reference_is_told(reference, output, tmp_path, kind):
    out, receipt = output
    other = shutil.copytree(reference.path, tmp_path / "other")
    yaml = DAMAGED[kind] if isinstance(DAMAGED[kind], bytes) else DAMAGED[kind].encode()
    (other / "README.md").write_bytes(b"---\n" + yaml + b"\n---\n# Reference\n")
    receipt = finished(receipt, open_checkpoint(other), out, None)
    assert "license" not in metadata_load(card_path(out))
    assert any("model card cannot be read" in note for note in receipt.notes)


def test_a_card_says_how_the_file_type_is_run(reference, tmp_path):
    """A native directory needs `import fewbits.transformers`; the card still named `import fewbits`."""
    finished(quantize(reference, tmp_path / "m", Request("int8_g32")), reference, tmp_path / "m", None)
    code = card_path(tmp_path / "m").read_text().partition("## Run it\n\n```\n")[2].partition("\n```")[0]
    assert code.startswith("import fewbits.transformers;") and "from_pretrained('m')" in code


IN_THE_WAY = {
    "m.gguf.receipt.json": r"m\.gguf\.receipt\.json: is in the way",
    "m.gguf.README.md": r"m\.gguf\.README\.md: is in the way",
    "n/receipt.json": r"receipt\.json: is in the way",
    "n/README.md": "n: holds files that fewbits did not write",
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_a_user_s_own_file_under_the_name_of_a_receipt_or_card_stays(reference, tmp_path, name):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("---\nmine: too\n---\n{}")
    out, to = (tmp_path / "n", "int8_g32") if name[0] == "n" else (tmp_path / "m.gguf", "q8_0")
    with pytest.raises(FileError, match=IN_THE_WAY[name]):
        quantize(reference, out, Request(to))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    mine.unlink()
    finished(quantize(reference, out, Request(to)), reference, out, None)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    quantize(reference, out, Request(to))  # what lies there of the old output is ours


class Hub:
    """Keeps what it is given."""

    files: dict

    def create_repo(self, repo, private, exist_ok):
        return f"https://hub.test/{repo}"

    def create_commit(self, repo, operations, commit_message):
        Hub.files = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}


def test_push_takes_card_and_receipt_along(reference, output, monkeypatch, capsys):
    out, receipt = output
    finished(receipt, reference, out, SAME)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert main(["push", str(out), "org/name"]) == 0
    assert capsys.readouterr().out.strip() == "https://hub.test/org/name"
    assert {"README.md", "receipt.json" if out.is_dir() else "m.gguf.receipt.json"} <= set(Hub.files)
    assert ("model.safetensors" if out.is_dir() else "m.gguf") in Hub.files


def test_what_the_engine_refused_is_not_uploaded(reference, output, monkeypatch):
    out, receipt = output
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    finished(receipt, reference, out, Outcome("llama.cpp", "differs", "1.0", 9.0, 5.0, 0, 1.0))
    with pytest.raises(FileError, match=r"verification in llama\.cpp failed"):
        push(out, "org/name")
    with pytest.raises(FileError, match="only outputs of fewbits have a receipt"):
        push(reference.path, "org/name")


def test_a_name_that_is_none_is_refused(reference, output):
    out, receipt = output
    finished(receipt, reference, out, None)
    with pytest.raises(FileError, match="give org/name"):
        push(out, "name")


@pytest.mark.parametrize(("outcome", "code"), [(SAME, 0), (replace(SAME, verdict="differs", kl=5.0), 4)])
def test_the_engine_has_the_last_word(reference, tmp_path, monkeypatch, capsys, outcome, code):
    for module in ("fewbits.cli.verify", "fewbits.workflow.quantize"):
        monkeypatch.setattr(f"{module}.verify", lambda *given, **named: outcome)
    out, again = tmp_path / "m.gguf", tmp_path / "again.gguf"
    assert (
        main(["quantize", str(reference.path), "--to", "q8_0", "--effort", "fast", "--out", str(out)]) == code
    )
    assert outcome.line() in capsys.readouterr().err
    assert read_receipt(out).verified == outcome.to_dict() and card_path(out).exists()
    assert main(["verify", str(out)]) == code
    assert capsys.readouterr().out == outcome.line() + "\n"
    assert main(["convert", str(out), str(again), "--no-verify"]) == 0
    assert read_receipt(again).verified == {}
