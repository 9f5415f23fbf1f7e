"""Models without a language model's head: which class runs them, quantizing them block by block, loading."""

import json

import pytest
import torch
import transformers

import fewbits
from fewbits.adapters.transformers import head_of, load_model, load_tokenizer
from fewbits.blocks.model import BlockModel
from fewbits.calibrate.tokens import read_tokens
from fewbits.errors import CalibrationError, ModelError
from fewbits.files.open import open_checkpoint
from tests.encoders import ENCODERS, SENTENCES, save_encoder
from tests.tiny import save_tiny

HEADS = {"Sequ": "sequence", "Toke": "token", "Mask": "masked", "Mode": "embedding"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> the directory of a tiny model of that class, made once."""
    folder, made = tmp_path_factory.mktemp("encoders"), {}

    def one(name):
        if name not in made:
            made[name] = save_encoder(name, folder / name)
        return made[name]

    return one


def final_norm(model):
    names = ("norm", "model.norm", "model.final_norm")
    return next((m for n, m in model.named_modules() if n in names), torch.nn.Identity())


@pytest.mark.parametrize("name", ENCODERS)
def test_the_class_and_its_blocks_are_transformers_own(saved, name):
    checkpoint = open_checkpoint(saved(name))
    reference = getattr(transformers, name).from_pretrained(saved(name)).eval()
    assert type(load_model(checkpoint)) is type(reference)
    assert HEADS[next(part for part in HEADS if part in name[3:])] == head_of(checkpoint)
    ids = torch.randint(5, 300, (3, 24), generator=torch.Generator().manual_seed(0))
    ids[0, 4] = 1  # RoBERTa's padding would shift the positions after it
    blocks = BlockModel(checkpoint)
    with torch.no_grad():
        states = reference(input_ids=ids, output_hidden_states=True).hidden_states
        hidden = blocks.embed(ids)
        torch.testing.assert_close(hidden, states[0])
        for i in range(blocks.n_blocks):
            hidden = blocks.block(i, blocks.weights(i))(hidden)
    torch.testing.assert_close(final_norm(reference)(hidden), states[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["DistilBertForSequenceClassification", "BertModel", "Qwen3Model"])
def test_quantized_model_equals_transformers_with_the_decoded_weights(saved, tmp_path, name):
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 4))
    receipt = fewbits.quantize(
        saved(name), out, to="int4_g32", calibrate=text, tokens=512, context=32, activations="int8_dynamic"
    )
    quantized = {row.name for row in receipt.tensors if row.relative_error}
    assert len(quantized) == 2 * (7 if "Qwen3" in name else 6)  # of the blocks, and nothing else
    assert {row.format for row in receipt.tensors if row.name in quantized} == {"int4_g32"}
    assert json.loads((out / "fewbits.json").read_text())["activations"]["scheme"] == "int8_dynamic"
    model = fewbits.load(out)
    assert type(model).__name__ == name
    reference = getattr(transformers, name).from_pretrained(saved(name)).eval()
    plain = {n: tensor.load() for n, tensor in open_checkpoint(out).tensors.items()}
    reference.load_state_dict({n: t.decode() if n in quantized else t for n, t in plain.items()})
    ids = load_tokenizer(open_checkpoint(out))(SENTENCES[0], return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids)[0], reference(input_ids=ids)[0], atol=1e-5, rtol=1e-5)


def test_calibrated_beats_rounding_to_nearest_on_its_own_text(saved, tmp_path):
    path, errors = saved("BertModel"), []
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 4))
    ids = load_tokenizer(open_checkpoint(path))(" ".join(SENTENCES), return_tensors="pt").input_ids[:, :96]
    expected = transformers.BertModel.from_pretrained(path).eval()(input_ids=ids).last_hidden_state.detach()
    for given in ({"effort": "fast"}, {"calibrate": text, "tokens": 512, "context": 32}):
        out = tmp_path / str(len(errors))
        fewbits.quantize(path, out, to="int3_g32", **given)
        found = load_model(open_checkpoint(out))(input_ids=ids).last_hidden_state.detach()
        errors.append((found - expected).norm().item())
    assert errors[1] < 0.9 * errors[0]


def test_default_text_is_the_vocabulary_and_a_note_says_so(saved, tmp_path):
    receipt = fewbits.quantize(saved("BertModel"), tmp_path / "out", to="int4_g32", tokens=256)
    assert receipt.method == fewbits.EFFORTS["good"].settings()
    assert receipt.calibration["source"].startswith("random tokens of the vocabulary")
    assert any("--calibrate FILE" in note for note in receipt.notes)


def test_windows_of_an_encoder_have_its_tokens_around_them(saved, tmp_path):
    checkpoint = open_checkpoint(saved("BertModel"))
    tokenizer = load_tokenizer(checkpoint)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES))
    for source in (str(text), "vocabulary"):
        windows = read_tokens(checkpoint, source, 96, 32).windows
        assert set(windows[:, 0].tolist()) == {tokenizer.cls_token_id}
        assert set(windows[:, -1].tolist()) == {tokenizer.sep_token_id}
        inside = windows[:, 1:-1]
        assert not torch.isin(inside, torch.tensor(tokenizer.all_special_ids)).all(1).any()


def test_a_model_that_generates_nothing_is_not_asked_to(saved):
    with pytest.raises(CalibrationError, match=r"generates no text.*--calibrate FILE"):
        read_tokens(open_checkpoint(saved("BertModel")), "self", 64, 16)


def test_an_architecture_without_a_class_is_named(saved, tmp_path):
    path = save_encoder("BertModel", tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["DebertaForQuestionAnswering"],
                                                           "model_type": "deberta-v2"}))  # fmt: skip
    with pytest.raises(ModelError, match=r"DebertaForQuestionAnswering.*DebertaV2ForMaskedLM \(masked\)"):
        head_of(open_checkpoint(path))


def test_files_of_sentence_transformers_make_an_embedding_model_and_are_kept(tmp_path):
    path = save_tiny("Qwen3ForCausalLM", tmp_path / "m")
    assert head_of(open_checkpoint(path)) == "causal"
    (path / "modules.json").write_text("[]")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    assert head_of(open_checkpoint(path)) == "embedding"
    bert = save_encoder("BertModel", tmp_path / "bert")
    (bert / "modules.json").write_text("[]")
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    fewbits.quantize(bert, tmp_path / "out", to="int8_channel", effort="fast")
    assert (tmp_path / "out/1_Pooling/config.json").read_text() == '{"pooling_mode_cls_token": true}'
    assert json.loads((tmp_path / "out/config.json").read_text())["hidden_size"] == 64


def test_card_and_transformers_loader_have_the_class(saved, tmp_path):
    import fewbits.transformers

    out = tmp_path / "out"
    fewbits.quantize(saved("DistilBertForSequenceClassification"), out, to="int8_channel", effort="fast")
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained('out')" in card
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    ids = torch.tensor([[2, 9, 3]])
    assert type(model.distilbert.transformer.layer[0].ffn.lin1.weight).__name__ == "PackedWeight"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, fewbits.load(out)(ids).logits)


def test_what_generates_text_alone_is_left_out_or_refused(saved, tmp_path):
    path = saved("BertModel")
    receipt = fewbits.quantize(path, tmp_path / "out", to="int4_g32", effort="best", tokens=256)
    assert any("not distilled" in note for note in receipt.notes)
    with pytest.raises(ModelError, match="use evaluate_head"):
        fewbits.evaluate(path, [path], "text " * 600)
