"""Tiny random models without a language model's head, as transformers saves them, and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tests.tiny import CORPUS, VOCAB

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
SENTENCES = [
    f"{line.strip()} and {i} foxes more" for i, line in enumerate(CORPUS.split(". ")) if line.strip()
]
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "initializer_range": 0.2,
}
_DISTILBERT = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 130,
               "initializer_range": 0.2}  # fmt: skip
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
_DECODER = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForSequenceClassification": ("bert", _COMMON),
    "BertForTokenClassification": ("bert", _COMMON),
    "BertForMaskedLM": ("bert", _COMMON),
    "BertModel": ("bert", _COMMON),
    "RobertaForSequenceClassification": ("roberta", _COMMON),
    "DistilBertForSequenceClassification": ("distilbert", _DISTILBERT),
    "ElectraForSequenceClassification": ("electra", {**_COMMON, "embedding_size": 32}),
    "DebertaForSequenceClassification": ("deberta", {**_COMMON, **_DISENTANGLED}),
    "DebertaV2ForSequenceClassification": ("deberta-v2", {**_COMMON, **_DISENTANGLED}),
    "MPNetModel": ("mpnet", _COMMON),
    "XLMRobertaModel": ("xlm-roberta", _COMMON),
    "ModernBertForMaskedLM": ("modernbert", {**_COMMON, "num_hidden_layers": 3}),
    "EuroBertForMaskedLM": ("eurobert", _DECODER),
    "CamembertForTokenClassification": ("camembert", _COMMON),
    "LlamaForSequenceClassification": ("llama", _DECODER),
    "Qwen3ForSequenceClassification": ("qwen3", _DECODER),
    "Qwen3Model": ("qwen3", _DECODER),
    "GteModel": ("gte", _COMMON),
    "NomicBertModel": ("nomic_bert", _COMMON),
    "JinaEmbeddingsV3Model": ("jina_embeddings_v3", _COMMON),
}
"""class -> model type and fields of its config"""


def wordpiece() -> dict[str, Any]:
    """A tokenizer.json that puts [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return json.loads(tokenizer.to_str())


def save_encoder(name: str, path: Path, labels: int = 3, seed: int = 0, **given: Any) -> Path:
    """A random model of class `name` as a Hugging Face directory at `path`."""
    import transformers

    kind, fields = ENCODERS[name]
    given = {"vocab_size": VOCAB, "num_labels": labels, "pad_token_id": 0, **fields, **given}
    torch.manual_seed(seed)
    model = getattr(transformers, name)(transformers.CONFIG_MAPPING[kind](**given)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps(wordpiece()), encoding="utf-8")
    settings = {f"{key}_token": token for key, token in SPECIAL.items()}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
