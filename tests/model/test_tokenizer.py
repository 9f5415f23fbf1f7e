"""Tokenizers through GGUF keys and back: the same ids, or an error that says why not."""

import copy
import json
from typing import Any

import pytest
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fewbits.errors import ModelError
from fewbits.files.gguf.tokenizer import tokenizer_json, tokenizer_keys
from fewbits.model.pretokenizers import pretokenizer_name, pretokenizers
from tests.tiny import TEXTS, VOCAB, bpe_tokenizer, spm_tokenizer

NAMES = [row.names[0] for row in pretokenizers()]
SPM = spm_tokenizer()
SMOLLM = bpe_tokenizer("smollm")


def _through(spec: dict[str, Any]) -> Tokenizer:
    keys = tokenizer_keys(spec, VOCAB)
    return Tokenizer.from_str(json.dumps(tokenizer_json({k: v.plain() for k, v in keys.items()})))


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


BEFORE = {"spm": Tokenizer.from_str(json.dumps(SPM)), "bpe": Tokenizer.from_str(json.dumps(SMOLLM))}
AFTER = {"spm": _through(SPM), "bpe": _through(SMOLLM)}


@pytest.mark.parametrize("name", NAMES)
def test_every_pretokenizer_is_recognized_and_rebuilt(name: str) -> None:
    spec = bpe_tokenizer(name)
    assert pretokenizer_name(spec) == name
    before, after = Tokenizer.from_str(json.dumps(spec)), _through(spec)
    for text in (*TEXTS, "<s>special</s>!"):
        assert _ids(after, text) == _ids(before, text)


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(["spm", "bpe"]), text=st.text(max_size=40))
def test_any_text_is_cut_alike(kind: str, text: str) -> None:
    assert _ids(AFTER[kind], text) == _ids(BEFORE[kind], text)


def test_single_digits_survive() -> None:
    """The rules of smollm cut digits one by one; a byte-level tokenizer alone would join some."""
    assert [AFTER["bpe"].decode([i]) for i in _ids(AFTER["bpe"], "2024")] == list("2024")
    assert any(
        set(token) <= set("0123456789") and len(token) > 1
        for token in bpe_tokenizer("gpt-2")["model"]["vocab"]
    )


@pytest.mark.parametrize("add_space", [True, False])
def test_spm_keys(add_space: bool) -> None:
    keys = {k: v.plain() for k, v in tokenizer_keys(spm_tokenizer(add_space=add_space), VOCAB).items()}
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is add_space
    types = keys["tokenizer.ggml.token_type"]
    assert types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert types[3:259] == [TokenType.BYTE] * 256
    scores = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"], strict=True))
    first = {}
    for rank, (left, right) in enumerate(SPM["model"]["merges"]):
        first.setdefault(left + right, rank)
    order = sorted(first, key=lambda piece: first[piece])
    assert [scores[piece] for piece in order] == sorted((scores[piece] for piece in order), reverse=True)


def test_rows_without_a_token_are_padding() -> None:
    keys = {k: v.plain() for k, v in tokenizer_keys(SMOLLM, VOCAB).items()}
    used = len(SMOLLM["model"]["vocab"])
    assert keys["tokenizer.ggml.tokens"][used:] == [f"[PAD{i}]" for i in range(used, VOCAB)]
    assert set(keys["tokenizer.ggml.token_type"][used:]) == {TokenType.UNUSED}
    with pytest.raises(ModelError, match=rf"ids up to {used - 1}, the embedding has 100 rows"):
        tokenizer_keys(SMOLLM, 100)


def test_added_words_are_user_defined_tokens() -> None:
    spec = copy.deepcopy(SMOLLM)
    index = len(spec["model"]["vocab"])
    spec["added_tokens"].append(
        {**spec["added_tokens"][0], "id": index, "content": "<tool>", "special": False}
    )
    keys = {k: v.plain() for k, v in tokenizer_keys(spec, VOCAB).items()}
    assert keys["tokenizer.ggml.token_type"][index] == TokenType.USER_DEFINED
    assert index in _ids(_through(spec), "a <tool> b")


def test_bos_is_put_before_where_the_keys_say_so() -> None:
    keys = {k: v.plain() for k, v in tokenizer_keys(SPM, VOCAB).items()}
    keys |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    for bos, eos in ((True, False), (False, True), (True, True), (False, False)):
        flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
        ids = Tokenizer.from_str(json.dumps(tokenizer_json(keys | flags))).encode("a").ids
        assert (ids[0] == 1, ids[-1] == 2) == (bos, eos)


def _changed(spec: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    spec = copy.deepcopy(spec)
    *references, last = path.split(".")
    place = spec
    for reference in references:
        place = place[reference]
    place[last] = value
    return spec


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        (_changed(SMOLLM, "pre_tokenizer", {"type": "Whitespace"}), "Whitespace.*--file native"),
        (_changed(SMOLLM, "model.type", "Unigram"), "model 'Unigram' has no way to GGUF"),
        (_changed(SMOLLM, "normalizer", {"type": "Lowercase"}), "normalizer 'Lowercase'"),
        (_changed(SMOLLM, "model.end_of_word_suffix", "</w>"), "end_of_word_suffix"),
        (_changed(SPM, "normalizer", {"type": "Lowercase"}), "GGUF cannot express this tokenizer"),
        (_changed(SPM, "model.merges", SPM["model"]["merges"][:50]), "GGUF cannot express this tokenizer"),
        (_changed(SMOLLM, "model.merges", SMOLLM["model"]["merges"][:-100]), None),
    ],
)
def test_what_gguf_cannot_say_is_an_error(spec: dict[str, Any], fault: str | None) -> None:
    if fault is None:  # fewer merges are another tokenizer, and a valid one
        assert _ids(_through(spec), "The quick") == _ids(Tokenizer.from_str(json.dumps(spec)), "The quick")
    else:
        with pytest.raises(ModelError, match=fault):
            tokenizer_keys(spec, VOCAB)


def test_a_named_pretokenizer_is_taken_at_its_word() -> None:
    odd = _changed(SMOLLM, "pre_tokenizer", {"type": "Whitespace"})
    assert tokenizer_keys(odd, VOCAB, pre="smollm")["tokenizer.ggml.pre"].value == "smollm"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.pre": "never-heard-of"}, "never-heard-of.*known: gpt-2"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab' is not two tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "has 1 entries"),
    ],
)
def test_odd_keys_are_errors(change: dict[str, Any], fault: str) -> None:
    keys = {k: v.plain() for k, v in tokenizer_keys(SMOLLM, VOCAB).items()}
    with pytest.raises(ModelError, match=fault):
        tokenizer_json(keys | change)
