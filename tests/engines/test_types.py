"""Every tensor type and every file type that fewbits writes, in the real engine, against our own forward.

The engine multiplies quantized weights with activations that it rounds first, by the weight's type:

    q4_0 q5_0 q8_0 iq4_nl mxfp4           Q8_0: int8 codes, one f16 scale for 32 values
    q4_1 q5_1                             Q8_1: the same, and the f16 sum of each 32
    q2_k .. q6_k iq1_s .. iq4_xs tq1_0 tq2_0   Q8_K: int8 codes, one f32 scale for 256 values
    f16, bf16, f32                        the type itself

Our forward with that rounding put in must be the engine's; without it, no farther than it explains.
A rounded activation is off by a step / sqrt(12) in root mean square, which is, of a normal value,

    Q8_0, Q8_1    the largest of 32 is 2.1 sigma:    2.1 / 127 / sqrt(12)    = 0.0048
    Q8_K          the largest of 256 is 2.8 sigma:   2.8 / 127 / sqrt(12)    = 0.0064
    f16, bf16     a step is 0.72 * 2^-10, 2^-7:      0.72 * 2^-10 / sqrt(12) = 0.00020, and 0.0016

and these two layers make 4.0 to 6.2 times that of it in the logits (measured); `AMPLIFIED` is 10.
"""

import os
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from fewbits.adapters.llamacpp import engine_logits, engine_quantize
from fewbits.adapters.transformers import load_model
from fewbits.blocks.rounding import rounding
from fewbits.files.checkpoint import LazyTensor
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS, kind_of
from fewbits.formats.ggml import Ggml, format_of
from fewbits.plan import Plan, Rule
from fewbits.plan.mixtures import RECIPES
from fewbits.qtensor import QTensor
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests.tiny import read_by_gguf, save_tiny, write_float_gguf

pytestmark = pytest.mark.engine

TYPES = [name for name, form in FORMATS.items() if isinstance(form, Ggml) or name in ("f16", "bf16", "f32")]
FILE_TYPES = [name for name, r in RECIPES.items() if name == r.name and format_of(r.default) in FORMATS]
TOKENS = torch.arange(10, 31)
SAME = 3e-5  # f32 sums in another order: see test_architectures.py
AMPLIFIED = 10
Q8_1 = ("q4_1", "q5_1")


def rounding_error(name: str) -> float:
    """Root mean square, of a normal value."""
    floats = {"f32": 0.0, "f16": 0.72 * 2**-10 / 12**0.5, "bf16": 0.72 * 2**-7 / 12**0.5}
    return floats[name] if name in floats else 0.0048 if FORMATS.get(name).block == 32 else 0.0064


def as_the_engine(name: str, weight: LazyTensor) -> Callable[..., torch.Tensor]:
    """A hook that computes a linear layer again, its input rounded."""

    def forward(module: torch.nn.Linear, inputs: tuple[torch.Tensor], _output: torch.Tensor) -> torch.Tensor:
        x = rounding(name)(inputs[0])
        y = torch.nn.functional.linear(x, module.weight, module.bias)
        if name not in Q8_1:
            return y
        # The minimum of a block (its second f16) multiplies a sum that is rounded apart from the codes.
        blocks = weight.load().planes["blocks"].view(weight.shape[0], -1, FORMATS.get(name).planes[0].entries)
        minimum = blocks[..., 2:4].contiguous().view(torch.float16).float().squeeze(-1)
        values = inputs[0].unflatten(-1, (-1, 32))
        scale = values.abs().amax(-1) / 127
        sums = ((values * (1 / scale)[..., None]).round().sum(-1) * scale).half().float()
        return y + (sums - x.unflatten(-1, (-1, 32)).sum(-1)) @ minimum.T

    return forward


def engine_and_ours(path: Path, name: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits `(t, vocab)` of single tokens: the engine's, ours, and ours with type `name`'s rounding.

    Single tokens: a value that falls on the other side of a rounding boundary (f32 sums in another
    order) moves all that follows, in that token only. Those without any agree exactly: a tenth of the
    tokens for f16, whose boundaries lie closest, and nearly all for the other types.
    """
    checkpoint = open_checkpoint(path)
    model = load_model(checkpoint)
    theirs = torch.cat([engine_logits(path, [token]) for token in TOKENS])
    with torch.no_grad():
        plain = model(TOKENS[:, None]).logits[:, 0]
        if name is None:
            return theirs, plain, plain
        for place, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(as_the_engine(name, checkpoint.tensors[f"{place}.weight"]))
        return theirs, plain, model(TOKENS[:, None]).logits[:, 0]


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Relative, for each token."""
    return (a - b).norm(dim=1) / b.norm(dim=1)


def record(what: str, *figures: float) -> None:
    if measured := os.environ.get("FEWBITS_MEASURE"):
        with open(measured, "a") as log:
            log.write(f"{what} {' '.join(f'{figure:.2e}' for figure in figures)}\n")


@pytest.mark.parametrize("name", TYPES)
def test_a_model_all_of_one_type(name: str, tmp_path: Path) -> None:
    source = save_tiny("LlamaForCausalLM", tmp_path / "source")
    plan = Plan((Rule("blk.*", name), Rule("output", name)))
    receipt = quantize(source, tmp_path / "m.gguf", Request(plan=plan))
    assert {row.format for row in receipt.tensors if row.rule} == {name}
    theirs, plain, emulated = engine_and_ours(tmp_path / "m.gguf", name)
    same, far = distance(emulated, theirs).quantile(0.1).item(), distance(plain, theirs).max().item()
    record(name, same, far)
    assert same < SAME
    assert far < max(SAME, AMPLIFIED * rounding_error(name))


@pytest.mark.parametrize("to", FILE_TYPES)
@pytest.mark.parametrize(
    "model", ["LlamaForCausalLM", "Qwen2ForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM"]
)
def test_every_file_type_runs(model: str, to: str, tmp_path: Path) -> None:
    source = save_tiny(model, tmp_path / "source")
    receipt = quantize(source, tmp_path / "m.gguf", Request(to))
    formats = {row.format for row in receipt.tensors}
    assert not receipt.changed()
    assert format_of(RECIPES[to].default) in formats or to == "mxfp4_moe"
    assert (to == "mxfp4_moe" and "Mi" in model) <= ("mxfp4_ggml" in formats)
    theirs, plain, _ = engine_and_ours(tmp_path / "m.gguf")
    # The median: where two experts score nearly alike, rounding picks another one now and then.
    far = distance(plain, theirs).median().item()
    record(f"{to} {model}", far)
    assert far < max(SAME, AMPLIFIED * max(rounding_error(name) for name in formats - {"f32"} or {"f32"}))


def test_what_llama_cpp_quantized_is_decoded_bit_for_bit(tmp_path: Path) -> None:
    """Every type in files that the engine made, against the `gguf` package."""
    seen = set()
    for model in ("LlamaForCausalLM", "MixtralForCausalLM"):
        source = open_checkpoint(save_tiny(model, tmp_path / model))
        float_file = write_float_gguf(source, tmp_path / "float.gguf")
        shapes = {name: w.shape for name, (_, w, _) in read_by_gguf(float_file).items() if w.ndim > 1}
        # The smallest types are not written without one.
        even = {name: np.ones(shape[-1] * prod(shape[:-2]), np.float32) for name, shape in shapes.items()}
        for name in FILE_TYPES:
            engine_quantize(float_file, tmp_path / "m.gguf", RECIPES[name].file_type, imatrix=even)
            seen |= decoded_alike(tmp_path / "m.gguf")
    assert seen == set(TYPES)


def decoded_alike(path: Path) -> set[str]:
    """-> the quantized types in the file, after comparing each tensor as the gguf package reads it."""
    types = set()
    for type_name, wanted, raw in read_by_gguf(path).values():
        name = format_of(type_name)
        form = kind_of(name)
        if isinstance(form, Ggml):
            types.add(name)
            rows = wanted.reshape(-1, wanted.shape[-1])
            blocks = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(rows.shape[0], -1)
            ours = QTensor(form, tuple(rows.shape), {"blocks": blocks}).decode()
            assert torch.equal(ours.view(torch.int32), rows.view(torch.int32)), name
    return types
