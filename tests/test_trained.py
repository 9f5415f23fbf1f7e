"""Weights that were trained for a grid keep every code. The checkpoints are made by others' quantizers: those
of the gguf package (llama.cpp's), torch's fp8, and the formulas of papers written out here."""

import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.algorithms import CalibrationWarning
from fewbits.calibrate.tokens import Tokens
from fewbits.cli.main import main
from fewbits.formats import FORMATS
from fewbits.formats.trained import kept_codes, trained_grids
from tests.tiny import save_tiny

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
SHAPE = (160, 512)
BLOCKS = {"q4_0": (18, 2), "q4_1": (20, 4), "q8_0": (34, 2), "tq2_0": (66, 0), "mxfp4": (17, 1)}
"""GGUF type -> bytes of a block, and where its codes begin (TQ2_0 has them first)."""


def weights(shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def by_gguf(name: str) -> tuple[np.ndarray, torch.Tensor]:
    """-> llama.cpp's blocks of random weights, by the gguf package, and what they decode to."""
    kind = gguf.GGMLQuantizationType[name.upper()]
    w = weights()
    if name == "tq2_0":  # ternary from the start, one scale a tensor, as BitNet b1.58 trains it
        w = (w / w.abs().mean()).round().clamp(-1, 1) * 0.013
    raw = gguf.quants.quantize(w.numpy(), kind)
    return raw, torch.from_numpy(gguf.quants.dequantize(raw, kind))


def codes_of(name: str, raw: np.ndarray) -> np.ndarray:
    size, start = BLOCKS[name]
    blocks = raw.reshape(-1, size)
    return blocks[:, :-2] if name == "tq2_0" else blocks[:, start:]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_codes_of_gguf_types_are_those_that_llama_cpps_quantizer_chose(name: str, dtype: str) -> None:
    raw, w = by_gguf(name)
    ours = "mxfp4_ggml" if name == "mxfp4" else name
    q, grid = kept_codes(w.to(TYPES[dtype]).float(), FORMATS.get(ours))
    assert q is not None, grid
    assert np.array_equal(codes_of(name, q.planes["blocks"].numpy()), codes_of(name, raw))
    if dtype == "f32":
        assert torch.equal(q.decode(), w)


def learned(bits: int, group: int | None, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes that need not reach the ends, times scales of no rule -> levels `(n, k)`, values f32."""
    generator = torch.Generator().manual_seed(1)
    n, k = SHAPE
    width = group or k
    top = 2**bits - 1
    normal = torch.randn(SHAPE, generator=generator) * top / 7
    zero = torch.full((n, k // width), 2.0 ** (bits - 1))
    if kind == "zero":
        zero = torch.randint(1, top, zero.shape, generator=generator).float()
    zero = zero.repeat_interleave(width, 1)
    levels = (normal + 0.3).round().clamp(-zero, top - zero)
    scale = (0.01 + 0.01 * torch.rand(n, k // width, generator=generator)).repeat_interleave(width, 1)
    return levels, levels * scale


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["symmetric", "zero"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (4, None), (3, 64), (2, 64)])
def test_learned_scales(bits: int, group: int | None, kind: str, dtype: str) -> None:
    levels, w = learned(bits, group, kind)
    name = f"int{bits}_" + ("channel" if group is None else f"g{group}") + ("_asym" if kind == "zero" else "")
    q, grid = kept_codes(w.to(TYPES[dtype]).float(), FORMATS.get(name))
    assert q is not None, grid
    found, codes = q.format.unpack(q)
    sign = found.groups(len(w))[0].sign().repeat_interleave(group or w.shape[1], 1)
    # A group whose levels have a common divisor has another scale; its values are the same.
    same = (found.level(codes) * sign == levels) | ((q.decode() - w).abs() <= w.abs() * 2**-8)
    assert bool(same.all())
    assert float((found.level(codes) * sign == levels).double().mean()) > (0.99 if bits > 2 else 0.9)


@pytest.mark.parametrize("dtype", TYPES)
def test_groups_with_a_minimum_as_mlx_has_them(dtype: str) -> None:
    groups = weights().reshape(-1, 64)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale, low = ((high - low) / 15).bfloat16().float(), low.bfloat16().float()
    codes = ((groups - low) / scale).round().clamp(0, 15)
    w = (codes * scale + low).reshape(SHAPE)
    q, grid = kept_codes(w.to(TYPES[dtype]).float(), FORMATS.get("int4_g64_asym_float"))
    assert q is not None, grid
    assert torch.equal(q.format.unpack(q)[1].reshape(-1, 64).float(), codes)


@pytest.mark.parametrize("dtype", TYPES)
def test_int8_rows_and_fp8_blocks(dtype: str) -> None:
    w = weights((256, 512))
    scale = w.abs().amax(1, keepdim=True) / 127
    codes = (w / scale).round()
    q, _ = kept_codes((codes * scale).to(TYPES[dtype]).float(), FORMATS.get("int8_channel"))
    assert q is not None and torch.equal(q.format.unpack(q)[0].level(q.format.unpack(q)[1]), codes)
    cells = w.reshape(2, 128, 4, 128)
    scale = cells.abs().amax((1, 3), keepdim=True) / 448
    fp8 = (cells / scale).to(torch.float8_e4m3fn)
    values = (fp8.float() * scale).reshape(w.shape)
    q, _ = kept_codes(values.to(TYPES[dtype]).float(), FORMATS.get("fp8_e4m3_block128"))
    assert q is not None
    assert torch.equal(q.planes["codes"].view(torch.float8_e4m3fn).float(), fp8.float().reshape(w.shape))


@pytest.mark.parametrize("dtype", TYPES)
def test_nf4(dtype: str) -> None:
    table = FORMATS.get("nf4").levels.sorted  # published: QLoRA, arXiv 2305.14314, appendix E
    assert [round(x, 4) for x in table[:2].tolist()] == [-1.0, -0.6962]
    groups = weights().reshape(-1, 64)
    absmax = groups.abs().amax(1, keepdim=True)
    codes = ((groups / absmax)[:, :, None] - table).abs().argmin(2)
    w = (table[codes] * absmax).reshape(SHAPE)
    q, _ = kept_codes(w.to(TYPES[dtype]).float(), FORMATS.get("nf4"))
    assert q is not None and torch.equal(q.format.unpack(q)[1].reshape(-1, 64).long(), codes)


@pytest.mark.parametrize("dtype", TYPES)
def test_other_weights_lie_on_no_grid(dtype: str) -> None:
    w = weights().to(TYPES[dtype]).float()
    assert not [*trained_grids(w)]
    # One weight off it is enough; so is one group of another scale.
    _, values = by_gguf("q4_0")
    values = values.bfloat16().float()
    values[77, 33] *= 1.07
    assert not [*trained_grids(values)]
    pruned = torch.where(torch.rand(SHAPE) < 0.7, 0.0, w)  # many equal values, no grid
    assert not [*trained_grids(pruned)]
    for constant in (torch.zeros(SHAPE), torch.ones(SHAPE), torch.where(torch.rand(SHAPE) < 0.5, 0.0, 0.5)):
        assert not [*trained_grids(constant)]


# ---- a model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint in bf16 whose linear weights gguf's quantizer has rounded to Q4_0, and its blocks."""
    path = save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("qat") / "model")
    file, blocks, kind = path / "model.safetensors", {}, gguf.GGMLQuantizationType.Q4_0
    tensors = load_file(file)
    for name, w in tensors.items():
        if "_proj" in name:
            blocks[name] = gguf.quants.quantize(w.float().numpy(), kind)
            tensors[name] = torch.from_numpy(gguf.quants.dequantize(blocks[name], kind))
    save_file({name: w.bfloat16() for name, w in tensors.items()}, file, {"format": "pt"})
    return path, blocks


TEXT = Tokens.of(torch.randint(3, 500, (8, 64), generator=torch.Generator().manual_seed(0)), "random")


@pytest.mark.parametrize("how", [{"effort": "fast"}, {"calibrate": TEXT}], ids=["fast", "gptq"])
@pytest.mark.parametrize("out", ["model.gguf", "native"])
def test_a_models_codes_are_kept(
    qat: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, how: dict, out: str
) -> None:
    path, blocks = qat
    receipt = fewbits.quantize(path, tmp_path / out, to="q4_0", verify=False, **how)
    assert any(note.startswith("14 weights, such as") and "codes are kept" in note for note in receipt.notes)
    rows = {row.name: row for row in receipt.tensors}
    tensors = fewbits.open(tmp_path / out).tensors
    for name, raw in blocks.items():
        assert rows[name].algorithm == "kept" and rows[name].options == {"grid": "int4_g32"}
        if "q_proj" in name or "k_proj" in name:
            continue  # GGUF has their rows in another order
        q = tensors[name].load()
        assert isinstance(q, fewbits.QTensor)
        ours = codes_of("q4_0", q.planes["blocks"].numpy())
        assert np.array_equal(ours, codes_of("q4_0", raw)), name
    assert rows["model.embed_tokens.weight"].algorithm != "kept"


def test_another_format_is_warned_of(qat: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    with pytest.warns(CalibrationWarning, match=r"nf4 does not hold .* --to int4_g32 or q4_0 .* keeps"):
        receipt = fewbits.quantize(qat[0], tmp_path / "nf4", to="nf4", effort="fast", verify=False)
    assert all(row.algorithm != "kept" for row in receipt.tensors)
    receipt = fewbits.quantize(qat[0], tmp_path / "q8", to="q8_0", effort="fast", verify=False)
    assert sum(row.algorithm == "kept" for row in receipt.tensors) == 14


def test_inspect_says_so(
    qat: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(qat[0]), "--no-tensors"]) == 0
    said = r"\d of 8 weights tried lie on the grid of int4_g32: trained for it; --to int4_g32 or q4_0"
    assert re.search(said, capsys.readouterr().out)
    assert main(["inspect", str(qat[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trained_for"]["int4_g32"] >= 6
    plain = save_tiny("LlamaForCausalLM", tmp_path / "plain")
    assert main(["inspect", str(plain), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trained_for"] == {}
