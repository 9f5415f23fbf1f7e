"""Importance matrices and the real llama.cpp: its library, and its programs where they are installed.

Two bits (IQ2_XXS) are refused by llama.cpp for a tensor of which the importance matrix says nothing, and
an entry of another size is refused for any type, so what it quantizes, it has found under the right name.

With `llama-quantize` and `llama-imatrix` on the PATH the files themselves go through them, and
FEWBITS_UPDATE_GOLDEN=1 makes golden/imatrix.* anew.
"""

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from fewbits.adapters.llamacpp import engine_quantize, engine_tokenize
from fewbits.adapters.transformers import load_model
from fewbits.calibrate.imatrix import gguf_importance, read_imatrix, write_imatrix
from fewbits.calibrate.statistics import identify
from fewbits.calibrate.stats import Stats
from fewbits.errors import KernelError
from fewbits.files.checkpoint import Checkpoint
from fewbits.files.open import open_checkpoint
from tests.statistics_cases import GOLDEN, GOLDEN_CHUNK, MIXTRAL, NAMES, seen_of
from tests.tiny import CORPUS, read_by_gguf, save_tiny, write_float_gguf

pytestmark = pytest.mark.engine

IQ2_XXS = 19  # LLAMA_FTYPE_MOSTLY_IQ2_XXS
Q4_0 = 2
CONTEXT = 64
PROGRAMS = ("llama-imatrix", "llama-quantize")
needs_programs = pytest.mark.skipif(
    not all(shutil.which(program) for program in PROGRAMS), reason=f"{' and '.join(PROGRAMS)} are not on PATH"
)


def made(name: str, folder: Path, **fields: int) -> tuple[Checkpoint, Path]:
    """A tiny model, and the same as GGUF."""
    checkpoint = open_checkpoint(save_tiny(name, folder / name, **fields))
    return checkpoint, write_float_gguf(checkpoint, folder / "float.gguf")


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_every_architecture_finds_its_importance(tmp_path, name):
    checkpoint, source = made(name, tmp_path)
    rows = gguf_importance(seen_of(checkpoint, hessian=False), checkpoint)
    quantized = partial(engine_quantize, source, tmp_path / "q.gguf", IQ2_XXS)
    quantized(imatrix={key: values.numpy() for key, values in rows.items()})
    types = {kind for key, (kind, *_) in read_by_gguf(tmp_path / "q.gguf").items() if key in rows}
    assert "iq2_xxs" in types
    for lost in ("blk.0.attn_q.weight", next(key for key in rows if "ffn_up" in key)):
        with pytest.raises(KernelError, match=f"Missing importance matrix for tensor {lost}"):
            quantized(imatrix={key: values.numpy() for key, values in rows.items() if key != lost})


def test_the_engine_weighs_by_what_was_read(tmp_path):
    """Written, read and used: the same file as from the numbers themselves, another than without."""
    checkpoint, source = made("MixtralForCausalLM", tmp_path)
    found = seen_of(checkpoint, hessian=False, unseen=("experts.2.",))
    write_imatrix(found, checkpoint, tmp_path / "imatrix.dat", CONTEXT)
    written = read_imatrix(tmp_path / "imatrix.dat", checkpoint, CONTEXT)
    results = []
    for statistics in (found, written, None):
        rows = gguf_importance(statistics, checkpoint) if statistics else {}
        engine_quantize(source, tmp_path / "q.gguf", Q4_0, imatrix={k: v.numpy() for k, v in rows.items()})
        results.append({key: raw for key, (_, _, raw) in read_by_gguf(tmp_path / "q.gguf").items()})
    assert results[0] == results[1] and results[0] != results[2]


def run(program: str, *arguments: object, folder: Path) -> str:
    command = [program, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def collect(source: Path, folder: Path, context: int, chunks: int) -> None:
    """llama-imatrix on CORPUS -> imatrix.gguf and imatrix.dat in `folder`."""
    (folder / "text.txt").write_text(CORPUS)
    sizes = ("-c", context, "-b", context, "-ub", context, "--chunks", chunks, "-t", 1, "--no-ppl")
    for kind in ("gguf", "dat"):
        files = ("-m", source, "-f", "text.txt", "-o", f"imatrix.{kind}", "--output-format", kind)
        run("llama-imatrix", *files, *sizes, folder=folder)


@needs_programs
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM"])
def test_llama_imatrix_sees_what_the_model_computes(tmp_path, name):
    """Its key and value cache is f16, which rounds by 2^-11: 5e-4 in a value, 1e-3 in its square."""
    checkpoint, source = made(name, tmp_path)
    collect(source, tmp_path, CONTEXT, 3)
    tokens = torch.tensor(engine_tokenize(source, CORPUS, add_special=True)[: 3 * CONTEXT]).view(3, CONTEXT)
    seen: dict[str, Stats] = {}

    def watch(
        site: str, _module: torch.nn.Module, inputs: tuple[torch.Tensor], _output: torch.Tensor
    ) -> None:
        stats = Stats.of(inputs[0], hessian=False)
        seen[site] = seen[site] + stats if site in seen else stats

    model = load_model(checkpoint)
    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(partial(watch, f"{module_name}.weight"))
    with torch.no_grad():
        model(tokens)
    for suffix in ("gguf", "dat"):
        found = read_imatrix(tmp_path / f"imatrix.{suffix}", checkpoint, CONTEXT)
        assert (found.tokens, found.model) == (tokens.numel(), identify(checkpoint))
        shared = [site for site in seen if site in found.sites]
        assert len(shared) >= 4
        for site in shared:
            ours, theirs = seen[site], found.of(site)
            assert theirs is not None and ours.count == theirs.count
            error = (ours.mean_square - theirs.mean_square).norm() / ours.mean_square.norm()
            assert error < 1e-3, site


@needs_programs
@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_llama_quantize_takes_our_file_for_its_own(tmp_path, suffix):
    checkpoint, source = made("MixtralForCausalLM", tmp_path)
    collect(source, tmp_path, CONTEXT, 2)
    found = read_imatrix(tmp_path / f"imatrix.{suffix}", checkpoint, CONTEXT)
    write_imatrix(found, checkpoint, tmp_path / f"ours.{suffix}", CONTEXT)
    results = []
    for imatrix in (f"imatrix.{suffix}", f"ours.{suffix}"):
        said = run("llama-quantize", "--imatrix", imatrix, source, "q.gguf", "Q4_0", 1, folder=tmp_path)
        assert "loaded 16 importance matrix entries" in said and "datasets=['text.txt']" in said
        results.append({key: raw for key, (_, _, raw) in read_by_gguf(tmp_path / "q.gguf").items()})
    assert results[0] == results[1]


@needs_programs
@pytest.mark.skipif("FEWBITS_UPDATE_GOLDEN" not in os.environ, reason="FEWBITS_UPDATE_GOLDEN=1 makes it anew")
def test_make_the_golden_files(tmp_path):
    """One expert must have seen nothing: with another version of torch it may take another seed."""
    checkpoint, source = made("MixtralForCausalLM", tmp_path, **MIXTRAL)
    collect(source, tmp_path, GOLDEN_CHUNK, 1)
    assert read_imatrix(tmp_path / "imatrix.gguf", checkpoint).unseen
    for suffix in ("gguf", "dat"):
        shutil.copy(tmp_path / f"imatrix.{suffix}", GOLDEN / f"imatrix.{suffix}")
