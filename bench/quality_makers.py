"""Who quantizes: fewbits, llama.cpp with an importance matrix, GPTQModel. All on the same tokens.

Each gives an Output and leaves a record beside it when it is whole, so that it is not made twice.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from quality_inputs import Inputs, say
from report import peak_of

from fewbits import Plan, Rule
from fewbits.adapters.llamacpp import engine_quantize
from fewbits.calibrate.imatrix import gguf_importance, read_imatrix, write_imatrix
from fewbits.files.checkpoint import Checkpoint
from fewbits.files.open import open_checkpoint
from fewbits.model.sites import sites
from fewbits.plan.method import EFFORTS
from fewbits.plan.mixtures import RECIPES
from fewbits.workflow.blockwise import Streaming
from fewbits.workflow.blockwise.collect import collect
from fewbits.workflow.request import Request
from fewbits.workflow.run import convert
from fewbits.workflow.run import run as quantize

BLOCKS = "model.layers.*_proj"  # all linear weights of the blocks
PEER = Path(__file__).parent / "peers" / "gptqmodel_quantize.py"
GPTQ = {"bits": 4, "group_size": 64, "sym": True}


@dataclass(frozen=True)
class Row:
    """One format of the table. to: a llama.cpp file type, or a format for the linear weights of the blocks.
    reach, aim: KL divergence, in nats a token. whole: the file type's mixture, embedding and output too."""

    name: str
    to: str
    reach: float
    aim: float
    peer: str | None = None
    whole: bool = False
    activations: str | None = None
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """path: what open_checkpoint reads. bits: of a quantized weight, None where the checkpoint shows them."""

    path: str
    seconds: float
    bits: float | None = None


def ours(given: Inputs, row: Row, effort: str) -> Output:
    name = f"{row.name}-{effort}"
    kept = _kept(given, name)
    if kept is not None:
        return kept
    method = EFFORTS[effort]
    method = replace(method, transforms=(*row.transforms, *method.transforms))
    what = {"to": row.to, "file": "gguf"} if row.whole else {"plan": Plan((Rule(BLOCKS, row.to),))}
    out = given.folder / (f"{name}.gguf" if row.whole else name)
    request = Request(**what, method=method, tokens=given.tokens, overwrite=True)
    receipt = quantize(given.checkpoint, out, request, say)
    return _keep(given, name, Output(str(out), receipt.seconds))


# ---- llama.cpp -----------------------------------------------------------------------------------


def by_llama(given: Inputs, row: Row) -> Output:
    """Seconds are the engine's alone, without taking the importance matrix. For a format of the blocks'
    weights every one of them gets it (`pure`): the mixture gives some a larger type."""
    name = f"{row.name}-llama.cpp"
    kept = _kept(given, name)
    if kept is not None:
        return kept
    source, out = given.folder / "reference.gguf", given.folder / f"{name}.gguf"
    importance = _importance(given)
    convert(given.checkpoint, source, overwrite=True)
    start, threads = time.monotonic(), torch.get_num_threads()
    engine_quantize(source, out, RECIPES[row.to].file_type, threads, importance, pure=not row.whole)
    return _keep(given, name, Output(str(out), time.monotonic() - start))


def _importance(given: Inputs) -> dict[str, Any]:
    """Mean x^2 of each input over the calibration tokens, as llama-imatrix takes it, by GGUF name."""
    path, checkpoint = given.folder / "imatrix.gguf", given.checkpoint
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=given.folder) as parts:
            seen = collect(checkpoint, given.tokens, Streaming(), Path(parts), hessian=False, progress=say)
            write_imatrix(seen, checkpoint, path)
    means = gguf_importance(read_imatrix(path, checkpoint), checkpoint)
    return {name: values.numpy() for name, values in means.items()}


def with_references_tables(quantized: Checkpoint, reference: Checkpoint) -> Checkpoint:
    """The quantized model, its linear weights outside the blocks (embedding, output) as in its reference."""
    outside = {site.name for site in sites(reference) if site.block is None} & set(quantized.tensors)
    return replace(
        quantized, tensors={**quantized.tensors, **{name: reference.tensors[name] for name in outside}}
    )


# ---- GPTQModel -----------------------------------------------------------------------------------


def by_gptqmodel(given: Inputs, row: Row, python: Path) -> Output:
    name = f"{row.name}-GPTQModel"
    kept = _kept(given, name)
    if kept is not None:
        return kept
    out = given.folder / name
    about = run_gptqmodel(given, out, python)
    return _keep(given, name, Output(str(out), about["seconds"], row_bits(GPTQ)))


def row_bits(settings: dict[str, Any]) -> float:
    """Codes, and a scale (f16) and a zero (4 bits) for each group."""
    return settings["bits"] + (16 + settings["bits"]) / settings["group_size"]


def run_gptqmodel(given: Inputs, out: Path, python: Path, windows: int | None = None) -> dict[str, Any]:
    """Quantize in a process of its own -> what the script says of it, and its peak memory and wall time.

    windows: fewer than all. In a new environment the first run compiles parts of GPTQModel.
    """
    folder = given.folder.resolve()  # it writes logs where it runs
    tokens, settings, said = (folder / f"gptqmodel-{name}.json" for name in ("tokens", "settings", "out"))
    tokens.write_text(json.dumps(given.tokens.windows[:windows].tolist()))
    settings.write_text(json.dumps(GPTQ))
    paths = (Path(given.checkpoint.path), tokens, out, settings)
    command = [str(python.absolute()), str(PEER.resolve()), *(str(path.resolve()) for path in paths)]
    # On two cores it starts only with this many workers said; ours runs on the CPU, so does it.
    cores = {"GPTQMODEL_CPU_WORKERS": str(max(2, torch.get_num_threads())), "CUDA_VISIBLE_DEVICES": ""}
    peak, wall, code = peak_of(command, said, cores | {"PYTHONPATH": ""}, folder)
    lines = said.read_text().splitlines()
    if code != 0:
        raise SystemExit("\n".join([*lines[-20:], f"{PEER.name} ended with exit code {code}"]))
    about = next(line for line in reversed(lines) if line.startswith('{"seconds"'))
    return json.loads(about) | {"peak_bytes": peak, "wall": wall}


# ---- what is kept --------------------------------------------------------------------------------


def _kept(given: Inputs, name: str) -> Output | None:
    record = given.folder / f"{name}.done.json"
    return Output(**json.loads(record.read_text())) if record.exists() else None


def _keep(given: Inputs, name: str, output: Output) -> Output:
    (given.folder / f"{name}.done.json").write_text(json.dumps(asdict(output)))
    return output


def opened(given: Inputs, row: Row, output: Output) -> Checkpoint:
    """The output, ready to be evaluated. A rotated model's tables are its own."""
    quantized = open_checkpoint(Path(output.path))
    own = row.whole or "rotate" in row.transforms
    return quantized if own else with_references_tables(quantized, given.checkpoint)


def bits_of(quantized: Checkpoint) -> float:
    """A quantized weight's."""
    coded = [tensor for tensor in quantized.tensors.values() if tensor.quantized]
    return 8 * sum(tensor.nbytes for tensor in coded) / sum(prod(tensor.shape) for tensor in coded)
