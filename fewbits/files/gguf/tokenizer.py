"""Tokenizers between tokenizer.json and the `tokenizer.ggml.*` keys of GGUF.

Two families, and the keys that hold them:

    BPE  tokenizer.ggml.model = "gpt2"   tokens in byte-level letters, merges "a b" in order of rank,
                                         pre = the name of the pre-tokenizer (model/pretokenizers.toml)
    SPM  tokenizer.ggml.model = "llama"  pieces with "▁" for a space, a score each, <0xHH> byte tokens;
                                         the best-scored adjacent pair is merged first

Token types are numbers of `gguf.TokenType`. A tokenizer.json of the SPM family has merges instead of
scores; minus the rank of a piece's first merge is a score with the same order. Ids without a token are
filled with unused `[PADi]`. The written tokenizer is read back and compared on a probe text, so a
tokenizer that GGUF cannot express is an error, never a wrong file.
Facts: llama.cpp, src/llama-vocab.cpp. tokenizer.json: the `tokenizers` library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import hexdigits
from typing import Any

from gguf import TokenType
from gguf.constants import Keys

from ...errors import ModelError, raise_all
from ...model.pretokenizers import pretokenizer_name, pretokenizer_row
from .file import GGUFValue, GGUFValueType

_SPACE = "▁"
_PROBE = (
    "Hello, World!  It's 12345 tokens; they'll SEE  that I'd   say 3.14159?\n\n\tdef f(x):\n    return x**2\n"
    "Grüße aus Köln, où çà? Привет мир — γειά σου. 今日は世界、你好 2024年 안녕 مرحبا नमस्ते "
    "🙂👩‍💻\r\n  trailing  "
)


def strings(values: Sequence[str]) -> GGUFValue:
    return GGUFValue(GGUFValueType.ARRAY, list(values), GGUFValueType.STRING)


def tokenizer_keys(
    spec: Mapping[str, Any], vocab_size: int, pre: str | None = None, sentencepiece: Path | None = None
) -> dict[str, GGUFValue]:
    """tokenizer.json as a dictionary -> model, pre, tokens, token types, scores or merges, add_space_prefix.

    vocab_size: rows of the embedding. pre: the pre-tokenizer's name instead of recognizing it (then
    nothing is compared). sentencepiece: a tokenizer.model with scores, used if the package is installed.
    Raises ModelError for a tokenizer that GGUF cannot express.
    """
    model = spec.get("model", {})
    if model.get("type") != "BPE":
        raise ModelError(
            f"tokenizer.json: model {model.get('type')!r} has no way to GGUF here; BPE (byte-level or with "
            "byte fallback) has. The native directory keeps any tokenizer"
        )
    if _is_spm(spec):
        keys = _spm_keys(spec, vocab_size, sentencepiece)
    else:
        keys = _bpe_keys(spec, vocab_size, pre or pretokenizer_name(spec))
    if pre is None:
        _compare(spec, keys)
    return keys


def with_added(spec: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json with the tokens that only tokenizer_config.json has (added_tokens_decoder)."""
    known = {token["id"]: token for token in spec.get("added_tokens", [])}
    more = settings.get("added_tokens_decoder") or {}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    for index, token in more.items():
        said = {field: token[field] for field in (*flags, "content") if field in token}
        known.setdefault(int(index), {"id": int(index), **flags, **said})
    return {**spec, "added_tokens": [known[index] for index in sorted(known)]}


def _is_spm(spec: Mapping[str, Any]) -> bool:
    """SentencePiece-style: byte fallback tokens and "▁" for spaces, no byte-level alphabet."""
    return bool(spec["model"].get("byte_fallback"))


# ---- reading tokenizer.json -------------------------------------------------------------------------


def _tokens(spec: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """The text and type of every id; ids without a token become unused `[PADi]`."""
    vocab = {index: text for text, index in spec["model"]["vocab"].items()}
    added = {token["id"]: token for token in spec.get("added_tokens", [])}
    count = max([*vocab, *added], default=-1) + 1
    if count > vocab_size:
        raise ModelError(
            f"tokenizer.json has ids up to {count - 1}, the embedding has {vocab_size} rows; "
            "is config.vocab_size right?"
        )
    tokens, types = [], []
    spm, unknown = _is_spm(spec), spec["model"].get("unk_token")
    for index in range(vocab_size):
        text, kind = vocab.get(index, f"[PAD{index}]"), TokenType.NORMAL
        if index in added:
            text = added[index]["content"]
            kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
            text = text.replace(_SPACE, " ") if spm and not added[index]["special"] else text
        elif index not in vocab:
            kind = TokenType.UNUSED
        elif spm and _byte(text) is not None:
            kind = TokenType.BYTE
        tokens.append(text)
        types.append(TokenType.UNKNOWN if spm and text == unknown else kind)
    faults = [f"token {text!r} stands at two ids" for text in _repeated(tokens)]
    raise_all(ModelError, "tokenizer.json to GGUF", faults)
    return tokens, types


def _repeated(tokens: Sequence[str]) -> list[str]:
    seen: set[str] = set()
    return [text for text in tokens if text in seen or seen.add(text)]  # type: ignore[func-returns-value]


def _byte(text: str) -> int | None:
    """`<0x0A>` -> 10; None for any other text."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return int(text[3:5], 16) if set(text[3:5]) <= set(hexdigits) else None
    return None


def _merges(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges in order of rank; older files write "a b", newer ["a", "b"]."""
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in spec["model"]["merges"]]
    return [(left, right) for left, right in pairs]


# ---- tokenizer.json -> keys ----------------------------------------------------------------------


def _bpe_keys(spec: Mapping[str, Any], vocab_size: int, pre: str) -> dict[str, GGUFValue]:
    tokens, types = _tokens(spec, vocab_size)
    merges = _merges(spec)
    faults = []
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp has none; NFC does not change ordinary text
        faults.append(f"normalizer {normalizer!r}: llama.cpp has none for byte-level BPE")
    if any(" " in left or " " in right for left, right in merges):
        faults.append("a merge contains a space; the merges are not byte-level")
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if spec["model"].get(field):
            faults.append(f"model.{field} = {spec['model'][field]!r}: llama.cpp has no such thing")
    raise_all(ModelError, "tokenizer.json to GGUF", faults)
    return {
        Keys.Tokenizer.MODEL: GGUFValue(GGUFValueType.STRING, "gpt2"),
        Keys.Tokenizer.PRE: GGUFValue(GGUFValueType.STRING, pre),
        Keys.Tokenizer.LIST: strings(tokens),
        Keys.Tokenizer.TOKEN_TYPE: GGUFValue(
            GGUFValueType.ARRAY, [int(t) for t in types], GGUFValueType.INT32
        ),
        Keys.Tokenizer.MERGES: strings([f"{left} {right}" for left, right in merges]),
    }


def _spm_keys(spec: Mapping[str, Any], vocab_size: int, sentencepiece: Path | None) -> dict[str, GGUFValue]:
    tokens, types = _tokens(spec, vocab_size)
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(_merges(spec)):
        rank.setdefault(left + right, index)
    scores = [-float(rank.get(text, len(rank))) for text in tokens]
    for index, score in _model_scores(sentencepiece).items():
        if index < vocab_size and types[index] == TokenType.NORMAL:
            scores[index] = score
    return {
        Keys.Tokenizer.MODEL: GGUFValue(GGUFValueType.STRING, "llama"),
        Keys.Tokenizer.PRE: GGUFValue(GGUFValueType.STRING, "default"),
        Keys.Tokenizer.LIST: strings(tokens),
        Keys.Tokenizer.SCORES: GGUFValue(GGUFValueType.ARRAY, scores, GGUFValueType.FLOAT32),
        Keys.Tokenizer.TOKEN_TYPE: GGUFValue(
            GGUFValueType.ARRAY, [int(t) for t in types], GGUFValueType.INT32
        ),
        Keys.Tokenizer.ADD_PREFIX: GGUFValue(GGUFValueType.BOOL, _adds_space(spec)),
    }


def _model_scores(path: Path | None) -> dict[int, float]:
    """Scores of a tokenizer.model; empty without the file or the `sentencepiece` package."""
    if path is None:
        return {}
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        return {}
    processor = SentencePieceProcessor(model_file=str(path))
    return {index: processor.GetScore(index) for index in range(processor.vocab_size())}


def _adds_space(spec: Mapping[str, Any]) -> bool:
    """Whether a space is added before the text: a Prepend normalizer, or a Metaspace pre-tokenizer that
    prepends."""
    normalizer, pre = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    metaspace = [step for step in pre.get("pretokenizers", [pre]) if step.get("type") == "Metaspace"]
    return any(step.get("type") == "Prepend" for step in steps) or any(
        step.get("prepend_scheme", "always") != "never" for step in metaspace
    )


def _compare(spec: Mapping[str, Any], keys: Mapping[str, GGUFValue]) -> None:
    """ModelError unless both tokenizers split the probe and the vocabulary's own pieces alike."""
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_str(json.dumps(spec))
    ours = Tokenizer.from_str(json.dumps(tokenizer_json({key: value.plain() for key, value in keys.items()})))
    texts = [_PROBE, *_PROBE.split("\n")]
    for text in texts:
        wanted = theirs.encode(text, add_special_tokens=False).ids
        got = ours.encode(text, add_special_tokens=False).ids
        if wanted != got:
            at = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), -1)
            raise ModelError(
                f"tokenizer.json: GGUF cannot express this tokenizer: on a probe of {len(wanted)} tokens its "
                f"rules differ from token {at} on ({wanted[at : at + 4]}, through GGUF {got[at : at + 4]}); "
                "a native directory keeps it (--file native)"
            )


# ---- keys -> tokenizer.json ----------------------------------------------------------------------


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF keys with plain values -> a tokenizer.json that splits text like llama.cpp.

    Unlike other converters it keeps every split of the pre-tokenizer (the single digits of `smollm`).
    Raises ModelError for a tokenizer model or pre-tokenizer that is unknown.
    """
    model = metadata.get(Keys.Tokenizer.MODEL)
    builders = {"gpt2": _bpe_json, "llama": _spm_json}
    if model not in builders:
        raise ModelError(
            f"{Keys.Tokenizer.MODEL} = {model!r}: only {' and '.join(builders)} can be rebuilt; "
            "give a Hugging Face tokenizer beside the file"
        )
    tokens = metadata[Keys.Tokenizer.LIST]
    types = metadata.get(Keys.Tokenizer.TOKEN_TYPE) or [TokenType.NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ModelError(f"{Keys.Tokenizer.TOKEN_TYPE} has {len(types)} entries for {len(tokens)} tokens")
    spec: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None}
    special = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    spec["added_tokens"] = [_added(i, tokens[i], types[i]) for i in range(len(tokens)) if types[i] in special]
    spec |= builders[model](metadata, tokens, types)
    spec["post_processor"] = _post_processor(metadata, tokens, model)
    return spec


def _added(index: int, text: str, kind: int) -> dict[str, Any]:
    return {
        "id": index,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": kind != TokenType.USER_DEFINED,
    }


def _bpe_json(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    row = pretokenizer_row(metadata.get(Keys.Tokenizer.PRE))
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in row.split
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    merges = [list(_pair(merge)) for merge in metadata[Keys.Tokenizer.MERGES]]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "decoder": level | {"add_prefix_space": True, "use_regex": True},
        "model": _model(_vocab(tokens, types), merges, ignore_merges=row.ignore_merges),
    }


def _pair(merge: str) -> tuple[str, str]:
    """llama.cpp searches the separating space from the second character on."""
    cut = merge.find(" ", 1)
    if cut < 0:
        raise ModelError(f"{Keys.Tokenizer.MERGES}: {merge!r} is not two tokens with a space between")
    return merge[:cut], merge[cut + 1 :]


def _spm_json(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    scores = metadata.get(Keys.Tokenizer.SCORES)
    if scores is None or len(scores) != len(tokens):
        raise ModelError(f"{Keys.Tokenizer.SCORES} must have {len(tokens)} entries, one for each token")
    mergeable = {tokens[i]: float(scores[i]) for i in range(len(tokens)) if types[i] == TokenType.NORMAL}
    merges = []
    for text, score in mergeable.items():
        merges += [
            (-score, cut, text[:cut], text[cut:])
            for cut in range(1, len(text))
            if text[:cut] in mergeable and text[cut:] in mergeable
        ]
    merges.sort(key=lambda merge: merge[0])
    unknown = next((tokens[i] for i in range(len(tokens)) if types[i] == TokenType.UNKNOWN), None)
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    strip: list[dict[str, Any]] = []
    if metadata.get(Keys.Tokenizer.ADD_PREFIX, True):
        steps.insert(0, {"type": "Prepend", "prepend": _SPACE})
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    back = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}]
    decoders = [*back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _model(
            _vocab(tokens, types),
            [[a, b] for _, _, a, b in merges],
            unk_token=unknown,
            byte_fallback=True,
            fuse_unk=True,
        ),
    }


def _vocab(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Text -> id, without ids that have no token (see `_tokens`)."""
    filler = {i for i, kind in enumerate(types) if kind == TokenType.UNUSED and tokens[i] == f"[PAD{i}]"}
    return {text: i for i, text in enumerate(tokens) if i not in filler}


def _model(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], **given: Any) -> dict[str, Any]:
    """A BPE model of tokenizer.json, without the merges whose parts or result are no tokens."""
    usable = [pair for pair in merges if pair[0] in vocab and pair[1] in vocab and "".join(pair) in vocab]
    fields = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return fields | given | {"vocab": vocab, "merges": usable}


def _post_processor(metadata: Mapping[str, Any], tokens: Sequence[str], model: str) -> dict[str, Any] | None:
    """BOS before and EOS after the text according to the metadata, else llama.cpp's defaults."""
    adds_bos = model == "llama" or pretokenizer_row(metadata.get(Keys.Tokenizer.PRE)).add_bos
    wanted = [
        ("bos", metadata.get(Keys.Tokenizer.ADD_BOS, adds_bos), metadata.get(Keys.Tokenizer.BOS_ID)),
        ("eos", metadata.get(Keys.Tokenizer.ADD_EOS, False), metadata.get(Keys.Tokenizer.EOS_ID)),
    ]
    ids = {name: index for name, on, index in wanted if on and index is not None and index < len(tokens)}
    if not ids:
        return None

    def frame(sequence: str) -> list[dict[str, Any]]:
        body = [{"Sequence": {"id": sequence, "type_id": 0}}]
        special = {
            name: [{"SpecialToken": {"id": tokens[index], "type_id": 0}}] for name, index in ids.items()
        }
        return special.get("bos", []) + body + special.get("eos", [])

    return {
        "type": "TemplateProcessing",
        "single": frame("A"),
        "pair": frame("A") + frame("B"),
        "special_tokens": {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in sorted(set(ids.values()))
        },
    }
