"""Calibration text: windows are the text's own tokens; nothing is dropped, cut short or replaced silently."""

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbits.adapters.transformers import load_tokenizer
from fewbits.calibrate import documents, tokens
from fewbits.calibrate.documents import parse_dataset, read_characters, read_json_lines
from fewbits.calibrate.tokens import bos_of, read_tokens
from fewbits.errors import CalibrationError, FileError
from fewbits.files.open import open_checkpoint
from tests.tiny import CORPUS

CHAT = [{"role": "user", "content": "Hello world"}, {"role": "assistant", "content": "the lazy dog"}]
IN_ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)


def write_lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def with_template(checkpoint, folder, template):
    shutil.copytree(checkpoint.path, folder)
    (folder / "chat_template.jinja").write_text(template)
    return open_checkpoint(folder)


# ---- a text file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 100, 10**6])
def test_windows_are_the_texts_first_tokens(model, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(documents, "CHUNK", chunk)
    (tmp_path / "text.txt").write_text(CORPUS, encoding="utf-8")
    tokenizer = load_tokenizer(model)
    whole = torch.tensor(tokenizer(CORPUS).input_ids)
    found = read_tokens(model, str(tmp_path / "text.txt"), 100, context=16)
    expected = whole[: 7 * 16].view(7, 16).clone()
    if bos_of(tokenizer) is not None:
        expected[:, 0] = tokenizer.bos_token_id
    assert torch.equal(found.windows, expected) and found.windows.dtype == torch.int64
    assert found.notes == () and found.count == 112
    assert (
        found.digest
        == sha256(b"".join(t.to_bytes(8, "little") for t in expected.flatten().tolist())).hexdigest()
    )


def test_a_file_is_read_no_further_than_needed(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK", 1024)
    path = tmp_path / "text.txt"
    path.write_bytes(CORPUS.encode() + b"\xff")
    read_tokens(plain, str(path), 64, context=16)
    with pytest.raises(CalibrationError, match=f"byte {len(CORPUS.encode())} is not UTF-8.*iconv"):
        read_tokens(plain, str(path), 5000, context=16)
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"text": CORPUS}) + "\n") * 9 + "{", encoding="utf-8")
    read_tokens(plain, str(rows), 64, context=16)
    with pytest.raises(CalibrationError, match="line 10: not JSON"):
        read_tokens(plain, str(rows), 5000, context=16)


@IN_ONE_FOLDER
@given(text=st.text(), chunk=st.integers(1, 9), bad=st.sampled_from([b"\xff", b"\xc3(", b"\xe2\x82"]))
def test_utf8_is_read_whatever_the_chunks_and_the_first_bad_byte_named(
    tmp_path, monkeypatch, text, chunk, bad
):
    monkeypatch.setattr(documents, "CHUNK", chunk)
    path, raw = tmp_path / "text.txt", text.encode()
    path.write_bytes(raw)
    assert "".join(read_characters(path)) == text.removeprefix("\ufeff")
    path.write_bytes(raw + bad)
    with pytest.raises(CalibrationError, match=f"byte {len(raw)} is not UTF-8"):
        list(read_characters(path))


def test_less_text_than_asked_for_is_used_and_said(plain, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(CORPUS, encoding="utf-8")
    held = len(load_tokenizer(plain)(CORPUS).input_ids)
    found = read_tokens(plain, str(path), 10_000, context=100)
    n = held // 100
    assert found.windows.shape == (n, 100)
    assert found.notes == (
        f"{path} holds {held} tokens, 10000 were requested: calibrating on {100 * n} in {n} windows of 100",
    )


@pytest.mark.parametrize("text", ["", "Hello world"])
@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_less_than_one_window_is_an_error_with_both_numbers(plain, tmp_path, text, name):
    path = tmp_path / name
    path.write_text(json.dumps({"text": text}) if name.endswith("jsonl") else text)
    with pytest.raises(CalibrationError, match=r"text.*: \d+ tokens, fewer than one window of 64 \(128 were"):
        read_tokens(plain, str(path), 100, context=64)


def test_what_cannot_be_asked_for_is_refused_at_once(plain, tmp_path):
    with pytest.raises(CalibrationError) as caught:
        read_tokens(plain, "self", 0, context=2**20)
    longest = plain.config["max_position_embeddings"]
    assert "0 tokens" in str(caught.value) and f"the model has {longest} positions" in str(caught.value)
    with pytest.raises(FileError, match=r"missing\.txt"):
        read_tokens(plain, str(tmp_path / "missing.txt"), 64)
    with pytest.raises(FileError, match="not a regular file"):
        read_tokens(plain, str(tmp_path), 64)
    (tmp_path / "text.txt").write_text(CORPUS, encoding="utf-8")
    other = replace(plain, as_loaded=True, config={**plain.config, "vocab_size": 9})
    with pytest.raises(CalibrationError, match=r"token \d+ is outside .* vocabulary of 9"):
        read_tokens(other, str(tmp_path / "text.txt"), 64, context=16)


# ---- documents -----------------------------------------------------------------------------------


def test_documents_are_shuffled_by_the_seed_and_parted(model, tmp_path):
    texts = [CORPUS[i : i + 60] for i in range(0, 1200, 60)]
    spec = write_lines(tmp_path / "rows.jsonl", [{"text": text} for text in texts] + [{"text": ""}])
    tokenizer = load_tokenizer(model)
    first, again, other = (
        tokens._from_documents(tokenizer, read_json_lines(tmp_path / "rows.jsonl"), 10**6, seed, None)[0]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    mark = tokenizer.eos_token_id if bos_of(tokenizer) is None else tokenizer.bos_token_id
    assert first.count(mark) == len(texts)
    alone = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert (
        Counter(map(tuple, split(first, mark))) == Counter(split(other, mark)) == Counter(map(tuple, alone))
    )
    found = [read_tokens(model, spec, 96, context=32, seed=seed) for seed in (1, 1, 2)]
    assert found[0].digest == found[1].digest != found[2].digest
    assert found[0].source == f"{spec} (seed 1)"


def split(stream, mark):
    """-> the runs between marks, empty ones left out."""
    parts = [[]]
    for token in stream:
        if token == mark:
            parts.append([])
        else:
            parts[-1].append(token)
    return [tuple(part) for part in parts if part]


def test_every_bad_line_is_named(plain, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n\nnot json\n[1]\n{"body": 1, "title": 2}\n{"messages": [{"role": "user"}]}\n'
        b'{"conversations": [{"from": [], "value": 1}]}\n' + b"[" * 100_000 + b"\n"
    )
    with pytest.raises(CalibrationError) as caught:
        read_tokens(plain, str(path), 16, context=16)
    said = str(caught.value)
    for part in (
        "line 3: not JSON",
        "line 4: list",
        "it has 'body', 'title'",
        "line 6: a message",
        "line 7: a message",
        "line 8",
    ):
        assert part in said
    assert "line 1:" not in said and "line 2:" not in said
    path.write_bytes(b'{"text": "ab"}\n{"text": "\xe4"}\n')
    with pytest.raises(CalibrationError, match="byte 25 is not UTF-8"):
        read_tokens(plain, str(path), 16, context=16)


def test_a_line_without_end_is_not_read_into_memory(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_LINE", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 5000)
    with pytest.raises(CalibrationError, match="line 1: longer than 1000 bytes"):
        read_tokens(plain, str(path), 16, context=16)


def test_conversations_go_through_the_models_own_template(model, tmp_path):
    rows = [{"messages": CHAT}] * 4
    shared = [{"from": "human", "value": "Hello world"}, {"from": "gpt", "value": "the lazy dog"}]
    tokenizer = load_tokenizer(model)
    one = tokenizer.apply_chat_template(CHAT, tokenize=False)
    expected = tokenizer(one, add_special_tokens=False).input_ids * 4
    n = len(expected) // 8 * 8
    for name, lines in (("messages", rows), ("conversations", [{"conversations": shared}] * 4)):
        found = read_tokens(model, write_lines(tmp_path / f"{name}.jsonl", lines), n, context=8)
        windows = torch.tensor(expected[:n]).view(-1, 8)
        assert torch.equal(found.windows[:, 1:], windows[:, 1:]) and found.notes == ()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("", "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "TypeError"),
        ("{% for m in", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_fails_is_said(plain, tmp_path, template, reason):
    broken = with_template(plain, tmp_path / "template", template)
    found = read_tokens(
        broken, write_lines(tmp_path / "chat.jsonl", [{"messages": CHAT}] * 3), 16, context=16
    )
    assert len(found.notes) == 1 and reason in found.notes[0]
    assert "1 of 1 conversations were joined as plain text" in found.notes[0]
    tokenizer = load_tokenizer(plain)
    expected = [*tokenizer("Hello world\n\nthe lazy dog").input_ids, tokenizer.eos_token_id]
    assert found.windows[0].tolist() == (expected * 3)[:16]


# ---- data sets -----------------------------------------------------------------------------------


@pytest.fixture
def fake_datasets(monkeypatch):
    """A stand-in for the datasets package: rows, and what was asked of it."""
    module = ModuleType("datasets")
    module.exceptions = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    module.rows = [{"text": CORPUS}, {"messages": CHAT}]
    module.asked = []

    def load_dataset(name, config, split, streaming):
        module.asked.append((name, config, split, streaming))
        if name == "nobody/nothing":
            raise FileNotFoundError("no such data set")
        return iter(module.rows)

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("hf:a/b", ("a/b", None, "train")),
        ("hf:a/b:en", ("a/b", "en", "train")),
        ("hf:a/b:validation", ("a/b", None, "validation")),
        ("hf:a/b:en:test", ("a/b", "en", "test")),
        ("hf:a/b::odd", ("a/b", None, "odd")),
    ],
)
def test_a_data_set_is_asked_for_by_name(plain, fake_datasets, spec, parts):
    found = read_tokens(plain, spec, 64, context=32)
    assert parse_dataset(spec) == parts and fake_datasets.asked == [(*parts, True)]
    assert found.windows.shape == (2, 32) and spec in found.source


def test_a_data_set_that_cannot_be_read_is_an_error(plain, fake_datasets, monkeypatch):
    with pytest.raises(CalibrationError, match=r"nobody/nothing.*no such data set"):
        read_tokens(plain, "hf:nobody/nothing", 64)
    fake_datasets.rows = [{"image": 1}]
    with pytest.raises(CalibrationError, match=r"row 0: .*'image'"):
        read_tokens(plain, "hf:a/b", 64)
    for spec in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(CalibrationError, match="not of the form"):
            read_tokens(plain, spec, 64)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        read_tokens(plain, "hf:a/b", 64)
