"""`fewbits lm-eval`: the harness on a task whose data is local."""

import json
import sys

import pytest
import torch

from fewbits import Plan
from fewbits.adapters.transformers import load_model, load_tokenizer
from fewbits.cli.main import main
from fewbits.files.open import open_checkpoint
from tests.packed_models import quantized

TASK = """
task: arithmetic_of_ours
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["one", "two", "three"]
doc_to_target: label
metric_list: [{metric: acc}]
"""


def write_task(path):
    """A task whose data lies beside it -> its directory, and the questions."""
    path.mkdir()
    rows = [{"question": f"{a} and {b} are", "label": (a + b) % 3} for a in range(3) for b in range(2)]
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "task.yaml").write_text(TASK.replace("DATA", str(path / "data.jsonl")))
    return rows


@torch.no_grad()
def picked(model, tokenizer, row):
    """The choice whose tokens are likeliest, by the decoded model."""
    sums = []
    for choice in ("one", "two", "three"):
        start, whole = (
            tokenizer(text)["input_ids"] for text in (row["question"], f"{row['question']} {choice}")
        )
        scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        sums.append(sum(float(scores[i - 1, whole[i]]) for i in range(len(start), len(whole))))
    return max(range(3), key=sums.__getitem__)


@pytest.mark.engine
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("file", ["native", "gguf"])
def test_lm_eval_scores_a_task_whose_data_is_local(tmp_path, capsys, monkeypatch, file):
    """Its accuracy is that of the decoded model's own choices."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path, rows = quantized(tmp_path, to="q4_k_m", plan=Plan(), file=file), write_task(tmp_path / "tasks")
    given = ["lm-eval", str(path), "--tasks", "arithmetic_of_ours", "--include-path", str(tmp_path / "tasks")]
    assert main([*given, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    checkpoint = open_checkpoint(path)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    right = [picked(model, tokenizer, row) == row["label"] for row in rows]
    assert (found["task"], found["metric"]) == ("arithmetic_of_ours", "acc")
    assert found["value"] == pytest.approx(sum(right) / len(right))
    assert main([*given[:3], "no_such_task"]) == 1
    assert "lm-eval has no task no_such_task" in capsys.readouterr().err


def test_without_lm_eval_one_message_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", str(quantized(tmp_path)), "--tasks", "x"]) == 1
    assert "pip install 'fewbits[harness]'" in capsys.readouterr().err
