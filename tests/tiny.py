"""Tiny random models and tokenizers for every test: real structure, no weights worth having.

save_tiny("Qwen2ForCausalLM", path)    a Hugging Face directory as transformers writes it
write_float_gguf(checkpoint, path)     the same as GGUF, weights in f32, without the pipeline
read_by_gguf(path)                     what an outside reader finds in a GGUF file
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fewbits.files.checkpoint import Checkpoint
from fewbits.files.gguf.file import gguf_header
from fewbits.files.gguf.metadata import gguf_metadata
from fewbits.model.archs import gguf_entries, require_architecture, rope_rows
from fewbits.model.pretokenizers import pretokenizer_row

CORPUS = (
    "The quick brown fox jumps over the lazy dog. It's the year 2024, they'll see 12345 foxes; I'd say 42 "
    "Numbers such as 3.14159 and 1000000 are cut digit by digit, or three at a time, as rules have it. "
    "def add(first, second):\n    return first + second\n\n\tif x >= 10: print('ten or more')\n"
    "Grüße aus Köln; où est la bibliothèque? Привет, мир. 今日は世界。你好,世界! "
) * 4
TEXTS = (
    "Hello world, it's 2024 and I'd like 12345 foxes!",
    "  leading and   inner spaces\n\nnew lines\t tabs \r\n end  ",
    "Grüße, Привет мир, 你好 123 世界 🙂 ÆØÅ",
    "def f(x):\n    return x**2 + 3.14159  # they'll SEE",
    "",
)
VOCAB = 600  # rows of the embedding: more than the tokenizers have tokens, so that some are padding
SPECIAL = ("<unk>", "<s>", "</s>")
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"


# ---- tokenizers ----------------------------------------------------------------------------------


def bpe_tokenizer(pre: str = "smollm", size: int = 560) -> dict[str, Any]:
    """A tokenizer.json: byte-level BPE trained on CORPUS, cut by the rules of `pre`."""
    row = pretokenizer_row(pre)
    tokenizer = Tokenizer(models.BPE(ignore_merges=row.ignore_merges))
    if pre == "smollm":  # as such files spell it
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    elif pre == "gpt-2":
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        from tokenizers import Regex

        steps = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in row.split]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return json.loads(tokenizer.to_str())


def spm_tokenizer(size: int = 560, add_space: bool = True) -> dict[str, Any]:
    """A tokenizer.json of the SentencePiece kind: byte fallback, every split of a piece a merge."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=size - 259, show_progress=False))
    vocab = json.loads(trained.to_str())["model"]["vocab"]
    pieces = [text for text in vocab if text not in SPECIAL]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    known = set(pieces)
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if add_space:
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
    special = [
        {"id": i, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, text in enumerate(SPECIAL)
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: i for i, text in enumerate(tokens)},
            "merges": merges,
        },
    }


# ---- models --------------------------------------------------------------------------------------

_COMMON = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {"sliding_window": 4096, "head_dim": 32}),
    "Qwen2ForCausalLM": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen3ForCausalLM": ("qwen3", {"head_dim": 32}),
    "Gemma3ForCausalLM": ("gemma3_text", {
        "head_dim": 64, "num_hidden_layers": 3, "query_pre_attn_scalar": 64, "sliding_window": 8,
        "rope_parameters": _GEMMA_ROPE,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "Phi3ForCausalLM": ("phi3", {"original_max_position_embeddings": 512}),
    "MixtralForCausalLM": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True,
        "head_dim": 64}),
}  # fmt: skip
"""architecture -> (model type, config fields beside the common ones)"""


def tiny_model(name: str, seed: int = 0, **given: Any) -> Any:
    """A random model of architecture `name`; biases and norms are random too, as bf16 can hold them."""
    import transformers

    model_type, fields = MODELS[name]
    config = transformers.CONFIG_MAPPING[model_type](**{**_COMMON, **fields, **given})
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.copy_((weight + 0.1 * torch.randn_like(weight)).bfloat16())
    return model


def save_tiny(
    name: str, path: Path, tokenizer: Mapping[str, Any] | None = None, seed: int = 0, **given: Any
) -> Path:
    """A tiny random model with its tokenizer as a Hugging Face directory at `path`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tiny_model(name, seed, **given).save_pretrained(path)
    spec = bpe_tokenizer() if tokenizer is None else tokenizer
    (path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def save_random(auto: str, kind: str, fields: Mapping[str, Any], path: Path) -> Any:
    """A random model of a model type, by one of transformers' Auto classes, saved -> the same, loaded."""
    import transformers

    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind].from_dict(dict(fields))
    model = getattr(transformers, auto).from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.1 * torch.randn_like(weight) + (weight if weight.ndim == 1 else 0))
    model.save_pretrained(path)
    return type(model).from_pretrained(path).eval()


def alike(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Logits that differ by rounding alone."""
    return bool((got - expected).norm() < 1e-4 * (expected - expected.mean()).norm())


# ---- files ---------------------------------------------------------------------------------------


def change_weights(model: Path, changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> Path:
    """Rewrite named tensors of a directory's model.safetensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    for name, change in changes.items():
        tensors[name] = change(tensors[name].clone())
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def read_by_gguf(path: Path) -> dict[str, tuple[str, torch.Tensor, bytes]]:
    """Tensor name -> (type, values as f32, bytes as they lie in the file), by the `gguf` package alone."""
    return {
        t.name: (
            t.tensor_type.name.lower(),
            torch.from_numpy(dequantize(t.data, t.tensor_type).copy()),
            t.data.tobytes(),
        )
        for t in GGUFReader(path).tensors
    }


def write_float_gguf(checkpoint: Checkpoint, path: Path, pre: str | None = None) -> Path:
    """Every tensor in f32, the plainest way."""
    arch = require_architecture(checkpoint.config)
    rows = []
    for entry in gguf_entries(arch, checkpoint.config, checkpoint.tensors):
        parts = [checkpoint.tensors[source].load().float() for source in entry.sources]
        value = (
            torch.tensor(entry.values) if not parts else parts[0] if len(parts) == 1 else torch.stack(parts)
        )
        if entry.rows == "rope":
            value = value[rope_rows(value.shape[0], entry.heads)]
        rows.append((entry.name, value + entry.add))
    header, offsets = gguf_header(
        gguf_metadata(checkpoint, arch, file_type=0, pre=pre), [(n, tuple(v.shape), "f32") for n, v in rows]
    )
    with path.open("wb") as file:
        file.write(header)
        for (_, value), offset in zip(rows, offsets, strict=True):
            file.write(bytes(offset - file.tell()))
            file.write(value.contiguous().numpy().tobytes())
        file.write(bytes(-file.tell() % 32))
    return path
