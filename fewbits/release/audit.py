"""audit(): compares the side files with the reference: tokenizer, template, settings, license.

A quantized model that answers in another style than its reference has usually lost one of these. Both sides
are loaded as in a runtime: for a GGUF file, the tokenizer that its keys describe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapters.transformers import load_tokenizer
from ..errors import FewbitsError
from ..files.checkpoint import Checkpoint
from ..files.side_files import card_fields

SAMPLES = (
    "The price is 12,345.67; isn't it?\n\n\tdef f(x): return x**2",
    "Grüße aus Köln. Привет, мир! 今日は世界。 🙂",
)
TOKENS = ("bos", "eos", "pad", "unk")
KEPT = ("LICENSE", "NOTICE", "USE_POLICY", "generation_config.json")


def audit(reference: Checkpoint, quantized: Checkpoint) -> list[str]:
    """Every difference between the side files, one line each; empty if there is none."""
    findings = _tokenizers(reference, quantized) + _vocabularies(reference, quantized)
    if not quantized.gguf_keys:  # a single file has no side files
        missing = [
            name
            for name in reference.side_files
            if name.startswith(KEPT) and name not in quantized.side_files
        ]
        findings += [f"{name} of the reference is missing" for name in missing]
        findings += _generation(reference, quantized)
    card = reference.side_files.get("README.md")
    if card is not None and card.read_bytes()[:3] == b"---" and not card_fields(card):
        findings.append("the YAML of the reference's model card cannot be read; its license is not copied")
    return findings


def _tokenizers(reference: Checkpoint, quantized: Checkpoint) -> list[str]:
    try:
        ours = load_tokenizer(reference)
    except FewbitsError:
        return ["the reference has no tokenizer: nothing to compare"]
    try:
        theirs = load_tokenizer(quantized)
    except FewbitsError as error:
        return [f"the tokenizer cannot be loaded: {error}"]
    findings = []
    for kind in TOKENS:
        a, b = (getattr(tokenizer, f"{kind}_token_id") for tokenizer in (ours, theirs))
        if a != b and not (kind == "pad" and a is None):
            findings.append(f"{kind} token is {b}, the reference's {a}")
    a, b = (_template(tokenizer) for tokenizer in (ours, theirs))
    if bool(a) != bool(b):
        findings.append(f"a chat template {'appeared' if b else 'is missing'}")
    elif a != b:
        findings.append("the chat template differs")
    added = [set(tokenizer.get_added_vocab().items()) for tokenizer in (ours, theirs)]
    if added[0] != added[1]:
        changed = sorted(token for token, _ in added[0] ^ added[1])
        findings.append(f"{len(changed)} added tokens differ, such as {changed[0]!r}")
    for text in SAMPLES:
        if list(ours(text)["input_ids"]) != list(theirs(text)["input_ids"]):
            findings.append(f"{text[:20]!r} ... becomes other tokens")
    return findings


def _template(tokenizer: Any) -> str | None:
    """The chat template; of several by name, the default one."""
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def _vocabularies(reference: Checkpoint, quantized: Checkpoint) -> list[str]:
    """Rows of the embedding, including padding, and vocab_size of the configs."""
    if not quantized.config:  # a GGUF file of an architecture that only its engine knows
        return []
    sizes = [c.text_config.get("vocab_size") for c in (reference, quantized)]
    rows = [
        {t.shape[0] for name, t in c.tensors.items() if name.endswith("embed_tokens.weight")}
        for c in (reference, quantized)
    ]
    findings = []
    if sizes[0] != sizes[1]:
        findings.append(f"vocab_size is {sizes[1]}, the reference's {sizes[0]}")
    if rows[0] != rows[1]:
        findings.append(f"the embedding has {sorted(rows[1])} rows, the reference's {sorted(rows[0])}")
    return findings


def _generation(reference: Checkpoint, quantized: Checkpoint) -> list[str]:
    a, b = (_json(c.side_files.get("generation_config.json")) for c in (reference, quantized))
    keys = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    return [f"generation_config.json differs in {', '.join(keys)}"] if keys and a and b else []


def _json(path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
