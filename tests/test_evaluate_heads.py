"""`evaluate` of classifiers, masked models and embeddings, against transformers' own pipelines."""

import itertools
import json
import re

import pytest
import torch
import transformers

import fewbits
from fewbits.cli.main import main
from fewbits.errors import CalibrationError, ModelError, PlanError
from fewbits.evaluation import Settings, Simulation, evaluate_head, labelled
from fewbits.evaluation.heads import macro_f1, spearman
from fewbits.evaluation.pooling import pooling_of
from fewbits.files.open import open_checkpoint
from tests.encoders import SENTENCES, save_encoder
from tests.tiny import change_weights

NAMES = {
    "sequence": "DistilBertForSequenceClassification",
    "token": "BertForTokenClassification",
    "masked": "BertForMaskedLM",
    "embedding": "BertModel",
    "llama": "LlamaForSequenceClassification",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """head -> a tiny model, and its int4 output."""
    folder, made = tmp_path_factory.mktemp("pairs"), {}

    def one(head):
        if head not in made:
            path = save_encoder(NAMES[head], folder / head)
            out = folder / f"{head}-int4"
            fewbits.quantize(path, out, to="int4_g32", effort="fast")
            made[head] = path, out
        return made[head]

    return one


def decoded(name, path, out):
    """transformers' own class with the decoded weights of an output."""
    model = getattr(transformers, name).from_pretrained(path).eval()
    loaded = {n: tensor.load() for n, tensor in open_checkpoint(out).tensors.items()}
    model.load_state_dict({n: t.decode() if hasattr(t, "decode") else t for n, t in loaded.items()})
    return model


def piped(task, model, path, **given):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return transformers.pipeline(task, model=model, tokenizer=tokenizer, **given)


def both(head, path, out):
    """transformers' class with the reference's weights, and with the output's."""
    return getattr(transformers, NAMES[head]).from_pretrained(path).eval(), decoded(NAMES[head], path, out)


@pytest.mark.parametrize("head", ["sequence", "llama"])
def test_classes_are_those_of_transformers_pipeline(pair, head):
    path, out = pair(head)
    found = []
    for model in both(head, path, out):
        said = piped("text-classification", model, path, top_k=None)(SENTENCES)
        said = [sorted((row["label"], row["score"]) for row in rows) for rows in said]
        found.append(torch.tensor([[score for _, score in rows] for rows in said]).double())
    a, b = found
    figures = evaluate_head(path, [out], SENTENCES).quantized_models[0].figures
    assert figures["KL mean"] == pytest.approx(float((a * (a / b).log()).sum(1).mean()), rel=1e-3)
    assert figures["agree %"] == pytest.approx(100 * float((a.argmax(1) == b.argmax(1)).double().mean()))
    same = evaluate_head(path, [path], SENTENCES).quantized_models[0].figures
    assert same == {"KL mean": 0, "+-": 0, "agree %": 100}


def test_accuracy_and_f1_are_those_of_the_pipelines_labels(pair, tmp_path, capsys):
    path, out = pair("sequence")
    model = decoded(NAMES["sequence"], path, out)
    said = [row["label"] for row in piped("text-classification", model, path)(SENTENCES)]
    truth = [f"LABEL_{i % 3}" for i in range(len(said))]
    right = sum(a == b for a, b in zip(said, truth, strict=True)) / len(truth)
    scores = []
    for name in sorted({*said, *truth}):
        hits = sum(a == b == name for a, b in zip(said, truth, strict=True))
        scores.append(2 * hits / (said.count(name) + truth.count(name)))
    file = tmp_path / "dev.jsonl"
    rows = [{"text": text, "label": label if i % 2 else int(label[-1])}
            for i, (text, label) in enumerate(zip(SENTENCES, truth, strict=True))]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    assert main(["evaluate", str(path), str(out), "--labels", str(file), "--json", "--record"]) == 0
    said = capsys.readouterr()
    assert re.search(r"fewbits evaluate: needs \d\.\d\d GiB of memory at most \(one model after", said.err)
    figures = json.loads(said.out)["quantized_models"][0]["figures"]
    assert figures["accuracy %"] == pytest.approx(100 * right)
    assert figures["F1 %"] == pytest.approx(100 * sum(scores) / len(scores))
    assert f"accuracy % {100 * right:.5g}" in (out / "README.md").read_text()


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "DistilBertForSequenceClassification"])
def test_two_texts_are_read_together_as_by_the_pipeline(name, tmp_path):
    """As in inference: a premise, a hypothesis. BERT is told which is which, DistilBERT is not."""
    path = save_encoder(name, tmp_path / "in")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = [{"text": a, "text_pair": b, "label": 0} for a, b in itertools.pairwise(SENTENCES)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = getattr(transformers, name).from_pretrained(path).eval()
    found = []
    for row in rows:
        given = tokenizer(row["text"], row["text_pair"], return_tensors="pt")
        assert bool(given.token_type_ids.any())
        if name[0] == "D":
            del given["token_type_ids"]
        with torch.no_grad():
            found.append(model(**given).logits[0])
    logits = torch.stack(found)
    change_weights(path, {"classifier.bias": lambda bias: bias - logits.mean(0)})  # every class is chosen
    chosen = (logits - logits.mean(0)).argmax(1).tolist()
    for row, label in zip(rows, chosen, strict=True):
        row["label"] = label
    examples = labelled("\n".join(map(json.dumps, rows)), "pairs")
    assert evaluate_head(path, [path], examples).reference.figures["accuracy %"] == 100
    alone = labelled("\n".join(json.dumps({"text": row["text"], "label": row["label"]}) for row in rows), "")
    assert evaluate_head(path, [path], alone).reference.figures["accuracy %"] < 100


def test_entities_are_those_of_transformers_pipeline(pair):
    path, out = pair("token")
    said = [
        [row["entity"] for rows in piped("token-classification", model, path, ignore_labels=[])(SENTENCES)
         for row in rows]
        for model in both("token", path, out)
    ]  # fmt: skip
    found = evaluate_head(path, [out], SENTENCES)
    assert found.rows == len(said[0])
    agreed = sum(a == b for a, b in zip(*said, strict=True)) / found.rows
    assert found.quantized_models[0].figures["agree %"] == pytest.approx(100 * agreed)


def test_embeddings_are_those_of_transformers_pipeline(pair):
    path, out = pair("embedding")
    a, b = (
        torch.stack([torch.tensor(row[0]).mean(0) for row in piped("feature-extraction", m, path)(SENTENCES)])
        for m in both("embedding", path, out)
    )
    figures = evaluate_head(path, [out], SENTENCES).quantized_models[0].figures
    cosine = torch.nn.functional.cosine_similarity(a, b)
    assert figures["cosine"] == pytest.approx(float(cosine.mean()), abs=1e-5)
    assert figures["lowest"] == pytest.approx(float(cosine.min()), abs=1e-5)
    assert 0.5 < figures["rank corr."] < 1


def test_masked_tokens_are_scored(pair):
    path, out = pair("masked")
    found = evaluate_head(path, [out], SENTENCES)
    assert found.rows >= len(SENTENCES)
    assert found.quantized_models[0].figures["KL mean"] > 0
    assert "accuracy %" in found.reference.figures


def test_activations_of_the_output_are_simulated(pair, tmp_path):
    path, _ = pair("sequence")
    fewbits.quantize(path, tmp_path / "w8", to="int8_channel", effort="fast", activations="int8_dynamic")
    own = evaluate_head(path, [tmp_path / "w8"], SENTENCES).quantized_models[0]
    assert own.simulated.activations == "int8_dynamic"
    assert own.simulated.sites == 12
    four = evaluate_head(path, [path], SENTENCES, Settings(simulation=Simulation("int4_dynamic")))
    assert 0 < own.figures["KL mean"] < four.quantized_models[0].figures["KL mean"]


def test_spearman_and_f1_of_small_cases():
    assert spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 3, 2, 4])) == pytest.approx(0.8)
    assert spearman(torch.tensor([1.0, 1, 2]), torch.tensor([3.0, 3, 1])) == pytest.approx(-1)
    assert macro_f1(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("asked", "mode"), [("cls_token", "first"), ("lasttoken", "last"), ("max_tokens", "max")]
)
def test_pooling_is_what_the_directory_says(tmp_path, asked, mode):
    path = save_encoder("BertModel", tmp_path / "m")
    (path / "modules.json").write_text("[]")
    (path / "1_Pooling").mkdir()
    given = {"pooling_mode_mean_tokens": False, f"pooling_mode_{asked}": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(given))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    pooling = pooling_of(open_checkpoint(path))
    assert (pooling.mode, pooling.longest) == (mode, 7)
    hidden, mask = torch.tensor([[[1.0], [5], [2], [9]]]), torch.tensor([[1, 1, 1, 0]])
    assert pooling(hidden, mask).item() == {"first": 1, "last": 2, "max": 5}[mode]
    (path / "2_Dense").mkdir()
    (path / "2_Dense" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="2_Dense changes the embeddings"):
        pooling_of(open_checkpoint(path))


def test_what_does_not_fit_is_refused(pair, tmp_path, capsys):
    path, _ = pair("sequence")
    bert, _ = pair("embedding")
    with pytest.raises(ModelError, match="its head is 'embedding', the reference's 'sequence'"):
        evaluate_head(path, [bert], SENTENCES)
    with pytest.raises(ModelError, match="labels are for classifiers of texts"):
        evaluate_head(bert, [bert], labelled('{"text": "a", "label": 1}', "x"))
    with pytest.raises(CalibrationError, match="label 'good' is none of LABEL_0"):
        evaluate_head(path, [path], labelled('{"text": "a", "label": "good"}', "x"))
    with pytest.raises(CalibrationError, match="line 2"):
        labelled('{"text": "a", "label": 1}\n{"text": "b"}', "x")
    with pytest.raises(PlanError, match="for models that generate text"):
        evaluate_head(path, [path], SENTENCES, Settings(simulation=Simulation(cache="int8")))
    assert main(["evaluate", str(path), str(path), "--sample", "64"]) == 1
    assert "generates no text; give --text FILE" in capsys.readouterr().err
