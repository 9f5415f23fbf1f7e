"""The engines that read a file type, and what runs inside an engine's own process.

    python run_<engine>.py MODEL TASK.json RESULT.npz

    TASK      {"tokens": [ids], "new": 8, "threads": 2, "imports": [modules]}
    RESULT    logits f32 (t, vocabulary) of the tokens, and the `new` greedy ids after them
    stdout    last line: {"engine": name, "version": ...}

A script imports nothing of fewbits and is run by its path, so an engine whose packages cannot share our
environment has its own. A new engine is a script here and a row of ENGINES; file types name it in `engines`.
A `parse_<engine>.py` only reads the config: its last line has {"read": ...} or {"refused": ...}.

Tolerances are mean KL divergences in nats, about twice the largest that was measured between the engine and
the decoded weights in f32: on the demo model in every format of docs/format_support.json, and on tiny models
(tests/engines). SUMS is for engines that compute in f32 too: their sums in another order made 1e-7 at most,
but the error grows with a model's width and depth.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from ...files.checkpoint import Checkpoint
from ...storage.cache import cache_folder

SCRIPTS = Path(__file__).parent
SUMS = 1e-5


@dataclass(frozen=True)
class Engine:
    """packages: the distributions that must be installed. by_method: more of them, by the quant_method of
    config.json. install: how to get them. apart: names an environment of its own, by the variable
    FEWBITS_<APART> or the folder of the cache where `make` puts it. imports: modules for its process.

    tolerance: of the KL divergence, above. wider: the same by the start of a format's or file type's name.
    """

    name: str
    script: str
    packages: tuple[str, ...]
    install: str
    apart: str | None = None
    imports: tuple[str, ...] = ()
    tolerance: float = SUMS
    wider: Mapping[str, float] = field(default_factory=dict)
    by_method: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def parses(self) -> bool:
        """Does it read the config alone?"""
        return self.script.startswith("parse_")

    def needs(self, method: str | None = None) -> tuple[str, ...]:
        """The distributions, for files of a quant_method."""
        return self.packages + self.by_method.get(method or "", ())

    def interpreter(self, method: str | None = None) -> str | None:
        """The Python that has the packages; None if none has."""
        if self.apart is not None:
            named = os.environ.get(f"FEWBITS_{self.apart.upper().replace('-', '_')}")
            apart = Path(named or cache_folder() / self.apart / "bin" / "python")
            if apart.exists():
                return str(apart)
        return sys.executable if all(map(installed, self.needs(method))) else None

    def tolerance_for(self, names: Iterable[str]) -> float:
        """The widest that a file type and formats, by name, allow."""
        found = [nats for start, nats in self.wider.items() if any(name.startswith(start) for name in names)]
        return max([self.tolerance, *found])

    def tolerance_of(self, checkpoint: Checkpoint) -> float:
        formats = {tensor.dtype for tensor in checkpoint.tensors.values() if tensor.quantized}
        return self.tolerance_for(formats | {checkpoint.file_type.name})


def installed(package: str) -> str | None:
    """The version of a distribution in this environment."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _transformers(with_package: str = "", *packages: str, **given: object) -> Engine:
    """transformers, with the package that its quantizer needs."""
    name = f"transformers+{with_package}" if with_package else "transformers"
    given.setdefault("install", f"pip install {' '.join(packages) or 'transformers'}")
    return Engine(name, "run_transformers.py", ("transformers", *packages), **given)  # type: ignore[arg-type]


_ALL = (
    # It rounds activations to 8 bits: 0.015 of 4 bits and more. Beyond that, which formats of 1 to 3 bits
    # reach, its rounding is put into our forward pass (blocks/rounding.py).
    Engine(
        "llama.cpp", "run_llamacpp.py", ("llama-cpp-python",), "pip install 'fewbits[engine]'", tolerance=0.02
    ),
    # GPTQ in f32, 1e-7; its AWQ kernel takes f16 only, 6.7e-5.
    Engine(
        "GPTQModel", "run_gptqmodel.py", ("gptqmodel",), "`make gptqmodel`", "gptqmodel",
        wider={"awq": 1.5e-4},
    ),
    # Some kernels compute in bf16 or f16: 4.8e-6 of GPTQ, 2.9e-5 of AWQ.
    _transformers(
        "gptqmodel", "gptqmodel", "accelerate", install="`make gptqmodel`", apart="gptqmodel",
        wider={"awq": 6e-5}, by_method={"gptq": ("optimum",)},
    ),
    # MX and NVFP types are decoded to bf16: 0.0042.
    _transformers(
        "compressed-tensors", "compressed-tensors", apart="compressed-tensors", wider={"mx": 0.01, "nv": 0.01}
    ),
    # Its script computes in f32; left alone, 4 bits in bf16 made 0.004, LLM.int8()'s rounding of inputs 0.05.
    _transformers("bitsandbytes", "bitsandbytes", "accelerate", apart="bitsandbytes"),
    _transformers("accelerate", "accelerate", apart="fp8"),
    _transformers("fewbits", imports=("fewbits.transformers",)),
    _transformers(),
    Engine(
        "onnxruntime", "run_onnxruntime.py", ("onnxruntime",), "pip install 'fewbits[onnx]'", "onnx"
    ),
    # It computes in f16: 6.3e-5.
    Engine("mlx-lm", "run_mlx.py", ("mlx-lm",), "pip install mlx-lm 'mlx[cpu]'", "mlx", tolerance=1.5e-4),
    Engine("vLLM", "parse_vllm.py", ("vllm",), "`make vllm`", "vllm"),
)  # fmt: skip
ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in _ALL}
