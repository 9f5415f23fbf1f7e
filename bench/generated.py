"""Checkpoints of a real model's shape with random weights, for what is measured of size alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from fewbits.storage.safetensors import lay_out

Rows = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Shape:
    """A llama's."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int

    def block(self, i: int) -> Rows:
        at, head = f"model.layers.{i}.", self.hidden // self.heads
        kv = head * self.kv_heads
        rows = {"q": (self.hidden, self.hidden), "k": (kv, self.hidden), "v": (kv, self.hidden),
                "o": (self.hidden, self.hidden)}  # fmt: skip
        mlp = {"gate": (self.inner, self.hidden), "up": (self.inner, self.hidden),
               "down": (self.hidden, self.inner)}  # fmt: skip
        norms = ("input", "post_attention")
        return [
            *((f"{at}self_attn.{part}_proj.weight", shape) for part, shape in rows.items()),
            *((f"{at}mlp.{part}_proj.weight", shape) for part, shape in mlp.items()),
            *((f"{at}{norm}_layernorm.weight", (self.hidden,)) for norm in norms),
        ]

    def shards(self) -> list[Rows]:
        """Names and shapes of all tensors, in three shards."""
        blocks = [row for i in range(self.layers) for row in self.block(i)]
        third = len(blocks) // 3
        table = (self.vocabulary, self.hidden)
        first = [("model.embed_tokens.weight", table), *blocks[:third]]
        last = [*blocks[2 * third :], ("model.norm.weight", (self.hidden,)), ("lm_head.weight", table)]
        return [first, blocks[third : 2 * third], last]


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """A Hugging Face directory, bf16, with a tokenizer of bytes -> bytes of weights written."""
    folder.mkdir(parents=True)
    pool = torch.randn(shape.inner * shape.hidden + 4096, generator=torch.Generator().manual_seed(0))
    pool = pool.mul_(0.02).bfloat16()
    weight_map, total = {}, 0
    for number, rows in enumerate(shape.shards()):
        name = f"model-{number + 1:05d}-of-00003.safetensors"
        header, _ = lay_out([(tensor, "bf16", size) for tensor, size in rows], {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header)
            for index, (tensor, size) in enumerate(rows):
                weight_map[tensor] = name
                for piece in pieces(pool, size, index):
                    total += file.write(piece.view(torch.uint8).numpy().data)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return total


def pieces(pool: torch.Tensor, shape: tuple[int, ...], index: int) -> Iterator[torch.Tensor]:
    """A tensor's values, taken from the pool at an offset of its own."""
    left = torch.Size(shape).numel()
    while left:
        start = (index * 37) % 4096
        piece = pool[start : start + min(left, pool.numel() - start)]
        yield piece
        left -= piece.numel()
