"""Directories of any layout, made of tensors in memory."""

import json
from pathlib import Path

import torch

from fewbits.dtypes import BF16
from fewbits.files.directory import Directory, laid_out
from fewbits.files.open import FILE_TYPES
from fewbits.formats.base import Format
from fewbits.qtensor import QTensor
from fewbits.storage.stream import StreamFile

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
ONE_BLOCK = CONFIG | {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "head_dim": 64}


def kinds(tensors: dict) -> dict:
    return {
        name: (value.format if isinstance(value, QTensor) else BF16, tuple(value.shape))
        for name, value in tensors.items()
    }


def write_directory(path: Path, layout: Directory | str, tensors: dict, config=None, about=None) -> Path:
    """What a pipeline does: layout, stream, small files in their order."""
    layout = FILE_TYPES.get(layout) if isinstance(layout, str) else layout
    path.mkdir()
    rows = kinds(tensors)
    header, spans, keys = laid_out(layout, rows)
    with StreamFile.open(path / layout.weights, header, spans, "run") as file:
        for name, value in tensors.items():
            parts = layout.pack(value) if isinstance(value, QTensor) else (value,)
            for key, part in zip(keys[name], parts, strict=True):
                file.write(key, part)
        file.finish()
    for name, content in layout.settings(rows, config or CONFIG, about or {}).items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (path / name).write_bytes(data)
    return path


def one_block(quantized: dict, vocabulary: int = 8) -> dict:
    """A whole model of ONE_BLOCK: weights of its block as they are given, the others random in bf16."""
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    shapes: dict[str, tuple[int, ...]] = {f"{attention}.{part}_proj.weight": (256, 64) for part in "qkv"}
    shapes |= {f"{attention}.o_proj.weight": (64, 256), f"{mlp}.down_proj.weight": (64, 512)}
    shapes |= {f"{mlp}.{part}_proj.weight": (512, 64) for part in ("gate", "up")}
    shapes |= {f"model.layers.0.{norm}_layernorm.weight": (64,) for norm in ("input", "post_attention")}
    shapes |= dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), (vocabulary, 64))
    shapes["model.norm.weight"] = (64,)
    return {name: quantized.get(name, torch.randn(shape).bfloat16()) for name, shape in shapes.items()}


def random_qtensor(form: Format, n: int, k: int, seed: int = 0) -> QTensor:
    """Random weights, encoded: planes whose every value the format means; in act order, columns of which
    none is where it would be otherwise."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * torch.logspace(-2, 1, n)[:, None]
    w += 0.3 * torch.randn(n, 1, generator=generator)
    return form.encode(w, torch.arange(1.0, k + 1) if form.ordered else None)
