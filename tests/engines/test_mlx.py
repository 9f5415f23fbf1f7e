"""MLX directories in mlx itself (its CPU build): `pip install "mlx[cpu]" mlx-lm`.

FEWBITS_UPDATE_GOLDEN=1 writes tests/golden/mlx anew.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewbits.adapters.transformers import load_model
from fewbits.files.directory import FILE_TYPES
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from fewbits.plan import Plan, Rule
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests.files.directories import random_qtensor
from tests.tiny import VOCAB, save_tiny

mx = pytest.importorskip("mlx.core")
pytestmark = pytest.mark.engine
GOLDEN = Path(__file__).parent.parent / "golden" / "mlx" / "mlx.safetensors"
MLX = FILE_TYPES.get("mlx")
BITS = (2, 3, 4, 5, 6, 8)
KINDS = ("", "_bf16", "_asym", "_asym_bf16", "_asym_float", "_asym_float_bf16", "_asym_float_f32")
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
MIXED = Plan(
    (Rule("*.1.mlp.down_proj.weight", "int8_g32_asym"), Rule("*.0.mlp.up_proj.weight", "f16"),
     Rule("*.0.self_attn.q_proj.weight", "int4_g64"), Rule("*embed_tokens*", "int6_g64"))
)  # fmt: skip
# Tables that are not quantized are f32 here, and so is all that follows: both sum in another order, 9.5e-7 to
# 1.1e-6 of the logits' norm measured. A quantized table makes its scales' dtype that of all activations: f16,
# with 2^-11 = 4.9e-4 of rounding at each step, 1.4e-3 measured.
MODELS = {
    "int4_g64_asym": (Plan(), 1e-5),
    "int3_g32_asym_bf16": (Plan(), 1e-5),
    "int4_g64": (Plan(), 1e-5),
    "int4_g64_asym_float": (Plan(), 1e-5),
    "int2_g128": (Plan(), 1e-5),
    "int5_g32_asym": (MIXED, 5e-3),
}


def arrays(q):
    """A weight as mlx gets it: u32 words, scales, biases."""
    words, scale, bias = MLX.pack(q)
    dtype = {torch.float16: mx.float16, torch.bfloat16: mx.bfloat16, torch.float32: mx.float32}[scale.dtype]
    # numpy has no bf16; f32 holds it
    return mx.array(words.numpy()), *(mx.array(x.float().numpy()).astype(dtype) for x in (scale, bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_decodes_the_very_values(bits, kind):
    """Symmetric and float ones with their scales taken to f32, so that nothing is rounded."""
    q = random_qtensor(FORMATS.get(f"int{bits}_g64{kind}"), 64, 128)
    words, scale, bias = arrays(q)
    wide = [part.astype(mx.float32) for part in (scale, bias)]
    found = mx.dequantize(words, *wide, group_size=64, bits=bits)
    assert torch.equal(torch.tensor(found.tolist()), q.decode())
    if kind.startswith("_asym") and "float" not in kind:
        assert scale.dtype == bias.dtype == mx.float32


@pytest.mark.parametrize("bits", BITS)
def test_mlx_multiplies(bits):
    """f32: products of 128 terms in another order, 128 * 2^-24 of their size at most."""
    q = random_qtensor(FORMATS.get(f"int{bits}_g32_asym"), 64, 128)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    y = mx.quantized_matmul(mx.array(x.numpy()), *arrays(q), transpose=True, group_size=32, bits=bits)
    bound = (x.abs() @ q.decode().abs().T) * 128 * 2.0**-24
    assert ((torch.tensor(y.tolist()) - x @ q.decode().T).abs() <= bound).all()


def test_the_golden_bytes_are_mlx_s():
    """Those in tests/golden, which the default suite reads."""
    i, j = torch.arange(8)[:, None], torch.arange(64)[None]
    w = mx.array((((i * 5 + j * 3 + i * j) % 61 - 30) / 16 + i / 32).numpy())
    made = {}
    for bits in BITS:
        for name in ("float16", "bfloat16", "float32"):
            q, *rest = mx.quantize(w.astype(getattr(mx, name)), group_size=32, bits=bits)
            wide = [part.astype(mx.float32) for part in rest]
            parts = (q, *rest, mx.dequantize(q, *wide, group_size=32, bits=bits))
            names = ("weight", "scales", "biases", "decoded")
            made |= {f"{bits}.{name}.{key}": part for key, part in zip(names, parts, strict=True)}
    if os.environ.get("FEWBITS_UPDATE_GOLDEN") == "1":
        mx.save_safetensors(str(GOLDEN), made)
    golden = load_file(GOLDEN)
    assert golden.keys() == made.keys()
    for key, value in made.items():
        assert golden[key].tolist() == value.tolist(), key


@pytest.mark.parametrize("format", MODELS)
def test_mlx_lm_runs_what_we_write(format, tmp_path):
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    (plan, bound), generator = MODELS[format], torch.Generator().manual_seed(1)
    source = open_checkpoint(save_tiny("LlamaForCausalLM", tmp_path / "source", **TINY))
    quantize(source, tmp_path / "m", Request(to=format, file="mlx", plan=plan))
    checkpoint = open_checkpoint(tmp_path / "m")
    ours, ids = load_model(checkpoint), torch.randint(3, VOCAB, (1, 24), generator=generator)
    theirs, _ = mlx_lm.load_model(tmp_path / "m")
    greedy = [ids.tolist()[0], ids.tolist()[0]]
    with torch.no_grad():
        logits, found = ours(ids).logits[0], torch.tensor(theirs(mx.array(ids.tolist())).tolist())[0]
        for _ in range(8):
            greedy[0].append(int(ours(torch.tensor([greedy[0]])).logits[0, -1].argmax()))
            greedy[1].append(int(mx.argmax(theirs(mx.array([greedy[1]]))[0, -1]).item()))
    difference = float((logits - found).norm() / logits.norm())
    if measured := os.environ.get("FEWBITS_MEASURE"):
        with open(measured, "a") as log:
            log.write(f"mlx {format} {difference:.2e} {float((logits - found).abs().max()):.2e}\n")
    assert difference < bound
    assert greedy[0] == greedy[1]
