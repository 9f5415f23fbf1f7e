"""GPTQ and AWQ directories and GPTQModel, in its own environment: it reads ours, we read its.

FEWBITS_GPTQMODEL: an interpreter that has gptqmodel 7.7 (`make gptqmodel` builds the default one).
FEWBITS_UPDATE_GOLDEN=1 writes tests/golden/gptq and tests/golden/awq anew.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.adapters.transformers import load_model
from fewbits.calibrate.tokens import Tokens
from fewbits.files.awq import AWQ
from fewbits.files.gptq import GPTQ
from fewbits.files.integers import group_of, integers
from fewbits.files.open import open_checkpoint
from fewbits.plan import Plan, Rule
from fewbits.plan.method import METHODS
from fewbits.qtensor import QTensor
from fewbits.storage.cache import cache_folder
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests.files.integer_cases import formula
from tests.tiny import VOCAB, change_weights, save_tiny

CACHE = cache_folder()
PYTHON = Path(os.environ.get("FEWBITS_GPTQMODEL", CACHE / "gptqmodel" / "bin" / "python"))
PEER = Path(__file__).parent / "gptqmodel_peer.py"
GOLDEN = Path(__file__).parent.parent / "golden"
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is missing: `make gptqmodel` builds it"),
]

# The package decodes the very values (compared in f32). GPTQ is computed in f32 by both, sums in another
# order: 3.1e-7 to 3.8e-7 of the logits' norm. AWQ's kernel takes its input and decodes its weights in
# f16, with 2^-11 = 4.9e-4 of rounding each: 1.3e-3 to 1.4e-3 measured, after two blocks.
BOUNDS = {"gptq": 1e-5, "gptq_v2": 1e-5, "awq": 5e-3}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
TOKENS = torch.randint(3, VOCAB, (24,), generator=torch.Generator().manual_seed(1)).tolist()
WINDOWS = torch.randint(3, VOCAB, (8, 64), generator=torch.Generator().manual_seed(2)).tolist()
MIXED = Plan(
    (Rule("*.1.mlp.down_proj.weight", "int8_g32"), Rule("*.0.self_attn.o_proj.weight", "f16"),
     Rule("*.0.mlp.up_proj.weight", "int4_channel"))
)  # fmt: skip
ORDERED = Plan(
    (Rule("*.1.mlp.down_proj.weight", "int8_g32_actorder"), Rule("*.0.self_attn.o_proj.weight", "f16"),
     Rule("*.self_attn.[qkv]_proj.weight", "int4_g64_actorder"))
)  # fmt: skip
WRITTEN = {
    "gptq int4": ("gptq", "int4_g64", Plan()),
    "gptq int2": ("gptq", "int2_g32", Plan()),
    "gptq int3": ("gptq", "int3_g64", Plan()),
    "gptq int8 channel": ("gptq", "int8_channel", Plan()),
    "gptq dynamic": ("gptq", "int4_g64", MIXED),
    "gptq_v2 int2": ("gptq_v2", "int2_g64_asym", Plan()),
    "gptq_v2 int3": ("gptq_v2", "int3_g64_asym", Plan()),
    "gptq_v2 int4": ("gptq_v2", "int4_g64_asym", Plan()),
    "gptq_v2 int8": ("gptq_v2", "int8_g128_asym", Plan()),
    "gptq act order": ("gptq", "int4_g32_actorder", Plan()),
    "gptq act order dynamic": ("gptq", "int4_g64", ORDERED),
    "gptq_v2 act order": ("gptq_v2", "int3_g32_asym_actorder", Plan()),
    "awq": ("awq", "int4_g64_asym", Plan()),
    "awq symmetric": ("awq", "int4_g64", Plan()),
    "awq channel": ("awq", "int4_channel_asym", Plan()),
}
MADE = {  # by GPTQModel: settings
    "desc_act": {"bits": 4, "group_size": 32, "desc_act": True, "sym": True, "act_group_aware": False},
    "asymmetric v1": {"bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    "asymmetric v2": {"bits": 4, "group_size": 32, "desc_act": False, "sym": False, "format": "gptq_v2"},
    "int3": {"bits": 3, "group_size": 64, "desc_act": False, "sym": True},
    "dynamic": {"bits": 4, "group_size": 64, "desc_act": False,
                "dynamic": {r"+:.*\.down_proj$": {"bits": 8, "group_size": 32}, r"-:.*\.o_proj$": {}}},
    "awq": {"bits": 4, "group_size": 32, "sym": False, "method": "awq", "format": "gemm"},
}  # fmt: skip
PACKED = [  # (format, layout of the bytes)
    *((f"int{bits}_g32{zero}", layout) for bits in (2, 3, 4, 8) for zero, layout in
      (("", "gptq"), ("_asym", "gptq"), ("_asym", "gptq_v2"))),
    ("int4_channel", "gptq"), ("int4_g32", "awq"), ("int4_g32_asym", "awq"),
]  # fmt: skip


def run(jobs: list, folder: Path) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    said = {"GPTQMODEL_CPU_WORKERS": "2", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    said |= {"TORCHDYNAMO_DISABLE": "1"}  # compiling takes longer than all the rest
    done = subprocess.run(
        [PYTHON.absolute(), PEER, folder / "jobs.json"], cwd=folder, env={**os.environ, **said},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of values that f16 holds, in which the package keeps what is not quantized."""
    path = save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("source") / "model", **TINY)
    return change_weights(path, dict.fromkeys(open_checkpoint(path).tensors, lambda w: w.half().float()))


def moves(q: QTensor) -> bool:
    """Are its columns in groups other than those of their places?"""
    return "g_idx" in q.planes and bool((q.planes["g_idx"][0].diff() < 0).any())


def reading(path: Path, method: str) -> list:
    return ["read", {"path": str(path), "tokens": TOKENS, "out": f"{path}.found", "method": method}]


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """Our directories, and what the package reads in them."""
    folder, jobs = tmp_path_factory.mktemp("written"), []
    for name, (file, to, plan) in WRITTEN.items():
        path, request = folder / name.replace(" ", "-"), Request(to=to, file=file, plan=plan)
        if "act order" in name:
            tokens = Tokens.of(torch.tensor(WINDOWS), "random")
            request = replace(request, method=METHODS["gptq"], tokens=tokens)
        quantize(open_checkpoint(source), path, request)
        jobs.append(reading(path, file.removesuffix("_v2")))
    run(jobs, folder)
    return folder


@pytest.mark.parametrize("name", WRITTEN)
def test_the_package_reads_what_we_write(written, name):
    file, path = WRITTEN[name][0], written / name.replace(" ", "-")
    ours, found = open_checkpoint(path), load_file(f"{path}.found")
    decoded = {key: value for key, value in found.items() if key.endswith(".weight")}
    coded = {key: tensor.load().decode() for key, tensor in ours.tensors.items() if tensor.quantized}
    assert decoded.keys() == coded.keys()
    assert len(coded) == (13 if "dynamic" in name else 14)
    for key, value in coded.items():
        assert torch.equal(value, decoded[key]), key
    moved = {key for key in coded if moves(ours.tensors[key].load())}
    assert len(moved) == {"gptq act order dynamic": 7, "gptq act order": 14}.get(name.replace("_v2", ""), 0)
    with torch.no_grad():
        all_logits = load_model(ours)(torch.tensor([[*TOKENS, *found["greedy"].tolist()]])).logits[0]
    logits, after = all_logits[: len(TOKENS)], all_logits[len(TOKENS) - 1 : -1]
    difference = float((logits - found["logits"]).norm() / logits.norm())
    largest = float((logits - found["logits"]).abs().max())
    # The token they take is ours too, or as good as it: no further below our best than both can be off.
    behind = after.amax(-1) - after.gather(1, found["greedy"][:, None])[:, 0]
    if measured := os.environ.get("FEWBITS_MEASURE"):
        with open(measured, "a") as log:
            log.write(f"{name} {difference:.2e} {largest:.2e} {float(behind.max()):.2e}\n")
    assert difference < BOUNDS[file]
    assert (behind <= 2 * largest).all()


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """Directories that the package quantized and saved, and what it reads in them."""
    folder, jobs = tmp_path_factory.mktemp("made"), []
    for name, settings in MADE.items():
        path = folder / name.replace(" ", "-")
        given = {"path": str(source), "out": str(path), "settings": settings, "windows": WINDOWS}
        jobs += [["quantize", given], reading(path, settings.get("method", "gptq"))]
    run(jobs, folder)
    return folder


@pytest.mark.parametrize("name", MADE)
def test_we_read_what_the_package_writes(made, name):
    path = made / name.replace(" ", "-")
    tensors, found = open_checkpoint(path).tensors, load_file(f"{path}.found")
    decoded = {key: value for key, value in found.items() if key.endswith(".weight")}
    assert len(decoded) == (12 if name == "dynamic" else 14)
    for key, value in decoded.items():
        loaded = tensors[key].load()
        assert isinstance(loaded, QTensor) and torch.equal(loaded.decode(), value), key
        assert moves(loaded) == (name == "desc_act")


@pytest.mark.parametrize(("format", "layout"), PACKED)
def test_the_golden_bytes_are_the_package_s(format, layout, packed):
    """Those in tests/golden, which the default suite compares with ours."""
    family = layout.removesuffix("_v2")
    file, prefix = GOLDEN / family / "gptqmodel.safetensors", f"{format}.{layout}."
    if os.environ.get("FEWBITS_UPDATE_GOLDEN") == "1":
        kept = load_file(file) if file.exists() else {}
        save_file(kept | {prefix + key: value for key, value in packed[format, layout].items()}, file)
    golden = load_file(file)
    for key, value in packed[format, layout].items():
        assert torch.equal(golden[prefix + key], value), key


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The package's own bytes of weights by formula."""
    folder, jobs, outputs = tmp_path_factory.mktemp("packed"), [], {}
    for format, layout in PACKED:
        q = formula(format)
        _, scale, zero = integers(q)
        group = torch.arange(q.shape[1]) // group_of(q.format, q.shape[1])
        given = folder / f"{format}.given"
        arrays = {"weight": q.decode(), "scales": scale.float(), "zeros": zero.float(), "g_idx": group.int()}
        save_file(arrays, given)
        outputs[format, layout] = folder / f"{format}.{layout}"
        options = {"bits": q.format.bits, "group_size": q.format.cells.columns or -1}
        options |= {"sym": q.format.zero == "none", "out": str(outputs[format, layout])}
        jobs.append(["pack", {"given": str(given), "layout": layout, **options}])
    run(jobs, folder)
    return {case: load_file(path) for case, path in outputs.items()}


def test_every_layout_is_among_the_golden():
    layouts = {layout for _, layout in PACKED}
    assert layouts == {GPTQ(1).name, GPTQ(2).name, AWQ().name}
