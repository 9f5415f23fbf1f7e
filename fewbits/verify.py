"""verify(): load a finished output in the engine it is for, and compare with what its bytes mean.

    the file, decoded by fewbits  ->  transformers, f32            ->  logits, greedy tokens  --.
    the file itself               ->  the engine, a process apart  ->  logits, greedy tokens  --+-> Outcome

Engines round activations (llama.cpp to 8 bits, others compute in f16), so logits differ a little; a wrong
nibble order or zero point makes another model. Between the two lies a wide gap: verdict `same` asks for a
mean KL divergence below SAME. On the demo model in 4 bits llama.cpp comes to 0.004, GPTQModel in bf16 to
0.002; one that reads zero points off by one comes to several nats (tests/engines/test_verify.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .adapters.hf import load_model, load_tokenizer
from .errors import FewbitsError, KernelError, ModelError
from .files.base import Checkpoint
from .files.open import open_checkpoint

SAME = 0.05  # nats a token
TEXT = "The capital of France is Paris, and the first ten prime numbers are 2, 3, 5, 7, 11, 13, 17, 19 and"
TOKENS, NEW = 32, 8
SCRIPTS = Path(__file__).parent / "engines"


@dataclass(frozen=True)
class Engine:
    """package: what must be importable. install: how to get it. variable: names the interpreter of an
    environment of its own; default: where `make` puts that. imports: for its process."""

    name: str
    script: str
    packages: tuple[str, ...]
    install: str
    variable: str | None = None
    default: str | None = None
    imports: tuple[str, ...] = ()

    def interpreter(self) -> str | None:
        """The Python that has the packages; None if none has."""
        if self.variable is not None:
            cache = Path(os.environ.get("FEWBITS_CACHE", Path.home() / ".cache" / "fewbits"))
            apart = Path(os.environ.get(self.variable) or cache / str(self.default))
            if apart.exists():
                return str(apart)
        return sys.executable if all(map(importlib.util.find_spec, self.packages)) else None


_TRANSFORMERS = "transformers", "run_transformers.py"
_GPTQMODEL = Engine(
    "GPTQModel",
    "run_gptqmodel.py",
    ("gptqmodel",),
    "`make gptqmodel`, or name its Python in FEWBITS_GPTQMODEL",
    "FEWBITS_GPTQMODEL",
    "gptqmodel/bin/python",
)
ENGINES = {
    "gguf": Engine("llama.cpp", "run_llamacpp.py", ("llama_cpp",), "pip install 'fewbits[engine]'"),
    "gptq": _GPTQMODEL,
    "gptq_v2": _GPTQMODEL,
    "awq": _GPTQMODEL,
    "compressed-tensors": Engine(
        *_TRANSFORMERS,
        ("transformers", "compressed_tensors"),
        "pip install compressed-tensors",
        "FEWBITS_COMPRESSED_TENSORS",
        "compressed-tensors/bin/python",
    ),
    "bitsandbytes": Engine(
        *_TRANSFORMERS,
        ("transformers", "bitsandbytes"),
        "pip install bitsandbytes",
        "FEWBITS_BITSANDBYTES",
        "bitsandbytes/bin/python",
    ),
    "onnx": Engine(
        "onnxruntime",
        "run_onnxruntime.py",
        ("onnxruntime",),
        "pip install 'fewbits[onnx]'",
        "FEWBITS_ONNX",
        "onnx/bin/python",
    ),
    "native": Engine(*_TRANSFORMERS, ("transformers",), "pip install transformers", imports=("fewbits",)),
    "mlx": Engine(
        "mlx-lm",
        "run_mlx.py",
        ("mlx_lm",),
        "pip install mlx-lm 'mlx[cpu]'",
        "FEWBITS_MLX",
        "mlx/bin/python",
    ),
    "huggingface": Engine(*_TRANSFORMERS, ("transformers",), "pip install transformers"),
}
"""file type -> the engine its files are for"""


@dataclass(frozen=True)
class Outcome:
    """What an engine made of an output. verdict: "same", "differs", "failed" or "not checked"; reason: of the
    last three. largest: difference of two logits, kl: mean of the positions, nats. greedy: how many of the
    `NEW` tokens agree before the first that does not."""

    engine: str
    verdict: str
    version: str | None = None
    largest: float | None = None
    kl: float | None = None
    greedy: int | None = None
    seconds: float | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """One line for people."""
        if self.verdict == "not checked":
            return f"not checked: {self.reason}"
        if self.verdict == "failed":
            return f"{self.engine} failed: {self.reason}"
        if self.kl is None:
            return f"{self.verdict} in {self.engine} {self.version}: {self.reason}"
        return (
            f"{self.verdict} in {self.engine} {self.version}: KL divergence {self.kl:.2g}, largest logit "
            f"difference {self.largest:.3g}, {self.greedy} of {NEW} greedy tokens, {self.seconds:.0f} s"
        )


def file_type_of(checkpoint: Checkpoint) -> str:
    """gguf, native, huggingface, or the layout of a quantized directory."""
    if checkpoint.kind != "huggingface":
        return checkpoint.kind
    return str(checkpoint.metadata.get("layout", "huggingface"))


def verify(path: str | Path, seconds: float = 600, memory: int | None = None) -> Outcome:
    """Load an output in its engine, in a process of its own, and compare.

    memory: bytes the process may take (default: four times the model in f32, and 4 GiB). An engine that
    fails is an Outcome, not an error.
    """
    checkpoint = open_checkpoint(Path(path))
    kind = file_type_of(checkpoint)
    engine = ENGINES.get(kind)
    if engine is None:
        return Outcome("none", "not checked", reason=f"no engine is known for {kind} files")
    python = engine.interpreter()
    if python is None:
        missing = " and ".join(engine.packages)
        return Outcome(engine.name, "not checked", reason=f"{missing} is not installed ({engine.install})")
    try:
        tokens = prompt(checkpoint)
        ours, new = decoded(checkpoint, tokens)
    except ModelError as error:
        return Outcome(engine.name, "not checked", reason=f"there is nothing to compare with: {error}")
    weights = sum(int(np.prod(tensor.shape)) for tensor in checkpoint.tensors.values())
    start = time.monotonic()
    try:
        found = _run(engine, python, Path(path), tokens, seconds, memory or 16 * weights + 4 * 2**30)
    except KernelError as error:
        return Outcome(engine.name, "failed", reason=str(error), seconds=time.monotonic() - start)
    return compared(engine.name, found, ours, new, time.monotonic() - start)


def prompt(checkpoint: Checkpoint) -> list[int]:
    """TEXT in the model's tokens; without a tokenizer, ids spread over its vocabulary."""
    vocabulary = int(checkpoint.config.get("text_config", checkpoint.config)["vocab_size"])
    try:
        ids = load_tokenizer(checkpoint)(TEXT)["input_ids"][:TOKENS]
    except FewbitsError:
        ids = []
    if len(ids) >= TOKENS // 2 and max(ids) < vocabulary:
        return list(ids)
    return [7919 * (i + 1) % vocabulary for i in range(TOKENS)]


@torch.no_grad()
def decoded(checkpoint: Checkpoint, tokens: list[int]) -> tuple[torch.Tensor, list[int]]:
    """What the bytes mean: logits `(t, vocabulary)` f32 and NEW greedy tokens, by transformers in f32."""
    model, ids = load_model(checkpoint), list(tokens)
    logits = last = model(torch.tensor([ids])).logits[0].float()
    for _ in range(NEW):
        ids.append(int(last[-1].argmax()))
        last = model(torch.tensor([ids])).logits[0]
    return logits, ids[len(tokens) :]


def compared(
    engine: str, found: dict[str, Any], ours: torch.Tensor, new: list[int], seconds: float
) -> Outcome:
    """The engine's logits and tokens beside ours -> Outcome."""
    theirs = torch.from_numpy(found["logits"]).float()
    if theirs.shape[0] != ours.shape[0] or theirs.shape[1] < ours.shape[1]:
        reason = f"it gave logits {tuple(theirs.shape)}, the file means {tuple(ours.shape)}"
        return Outcome(engine, "differs", found["version"], seconds=seconds, reason=reason)
    theirs = theirs[:, : ours.shape[1]]
    p, q = ours.log_softmax(-1).double(), theirs.log_softmax(-1).double()
    kl = max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))  # rounding may leave -1e-12
    same = next((i for i, (a, b) in enumerate(zip(new, found["new"], strict=True)) if a != b), len(new))
    verdict = "same" if kl < SAME else "differs"
    return Outcome(engine, verdict, found["version"], float((ours - theirs).abs().max()), kl, same, seconds)


def _run(
    engine: Engine, python: str, path: Path, tokens: list[int], seconds: float, memory: int
) -> dict[str, Any]:
    """The engine's script on the file -> logits, new, version; KernelError if it fails or takes too much."""
    with tempfile.TemporaryDirectory() as name:
        task, result, said = (Path(name) / part for part in ("task.json", "result.npz", "said.txt"))
        about = {"tokens": tokens, "new": NEW, "threads": torch.get_num_threads(), "imports": engine.imports}
        task.write_text(json.dumps(about))
        command = [python, str(SCRIPTS / engine.script), str(path.resolve()), str(task), str(result)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
        elif engine.imports:  # ours: found there as it was found here
            here = [str(Path(__file__).parents[1]), *environment.get("PYTHONPATH", "").split(os.pathsep)]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, here))
        with said.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=name)
            _watch(process, seconds, memory)
        lines = said.read_text(errors="replace").strip().splitlines()
        if process.returncode != 0 or not result.exists():
            why = " | ".join(lines[-3:]) or "it said nothing"
            raise KernelError(f"exit code {process.returncode}: {why}")
        with np.load(result) as arrays:
            return {**{key: arrays[key] for key in arrays}, "version": json.loads(lines[-1])["version"]}


def _watch(process: subprocess.Popen[bytes], seconds: float, memory: int) -> None:
    """Wait for the process; kill it, with KernelError, beyond its time or resident bytes."""
    start, status = time.monotonic(), Path(f"/proc/{process.pid}/status")
    try:
        while process.poll() is None:
            if time.monotonic() - start > seconds:
                raise KernelError(f"it took more than {seconds:.0f} s")
            lines = status.read_text().splitlines() if status.exists() else []
            held = next((int(li.split()[1]) * 1024 for li in lines if li.startswith("VmRSS")), 0)
            if held > memory:
                raise KernelError(f"it took more than {memory / 2**30:.1f} GiB of memory")
            time.sleep(0.05)
    except (FileNotFoundError, ProcessLookupError):
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
