"""Which engines read which file type, and what runs inside an engine's own process.

    python run_<engine>.py MODEL TASK.json RESULT.npz

    TASK      {"tokens": [ids], "new": 8, "threads": 2, "expected": [ids that shall follow]}
    RESULT    logits f32 (t, vocabulary) of the tokens, and `new` greedy ids after them
    stdout    last line: {"engine": name, "version": ...}

Each knows nothing of fewbits and is run by its path, so that an engine whose packages cannot share our
environment has one of its own. Where a forward pass is slow, prompt and continuation go through it at once:
behind each token that is expected, what it would choose next; up to the first that differs this is its own
greedy continuation. A new engine is a script here and a row of ENGINES; a `parse_<engine>.py` only reads the
config, and says on its last line what it makes of it, {"read": ...} or {"refused": ...}.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ...storage.cache import cache_folder

SCRIPTS = Path(__file__).parent


@dataclass(frozen=True)
class Engine:
    """packages: what must be importable. install: how to get it. apart: what names an environment of its own:
    the variable FEWBITS_<APART>, or the folder of the cache where `make` puts it. imports: for its process.
    """

    name: str
    script: str
    packages: tuple[str, ...]
    install: str
    apart: str | None = None
    imports: tuple[str, ...] = ()

    @property
    def parses(self) -> bool:
        """Does it read the config alone?"""
        return self.script.startswith("parse_")

    def interpreter(self) -> str | None:
        """The Python that has the packages; None if none has."""
        if self.apart is not None:
            cache = cache_folder()
            named = os.environ.get(f"FEWBITS_{self.apart.upper().replace('-', '_')}")
            apart = Path(named or cache / self.apart / "bin" / "python")
            if apart.exists():
                return str(apart)
        return sys.executable if all(map(importlib.util.find_spec, self.packages)) else None


_TRANSFORMERS = "transformers", "run_transformers.py"
_GPTQMODEL = Engine("GPTQModel", "run_gptqmodel.py", ("gptqmodel",), "`make gptqmodel`", "gptqmodel")
_GPTQ_IN_TRANSFORMERS = Engine(
    *_TRANSFORMERS, ("transformers", "optimum", "gptqmodel"), "`make gptqmodel`", "gptqmodel"
)
_VLLM = Engine("vLLM", "parse_vllm.py", ("vllm",), "`make vllm`", "vllm")
_GPTQ = _GPTQMODEL, _GPTQ_IN_TRANSFORMERS, _VLLM
_COMPRESSED = Engine(
    *_TRANSFORMERS,
    ("transformers", "compressed_tensors"),
    "pip install compressed-tensors",
    "compressed-tensors",
)
_BITSANDBYTES = Engine(
    *_TRANSFORMERS, ("transformers", "bitsandbytes"), "pip install bitsandbytes", "bitsandbytes"
)
_FLOATS = Engine(*_TRANSFORMERS, ("transformers",), "pip install transformers")
ENGINES: dict[str, tuple[Engine, ...]] = {
    "gguf": (Engine("llama.cpp", "run_llamacpp.py", ("llama_cpp",), "pip install 'fewbits[engine]'"),),
    "gptq": _GPTQ,
    "gptq_v2": _GPTQ,
    "awq": _GPTQ,
    "compressed-tensors": (_COMPRESSED, _VLLM),
    "bitsandbytes": (_BITSANDBYTES,),
    "fp8": (Engine(*_TRANSFORMERS, ("transformers", "accelerate"), "pip install accelerate", "fp8"), _VLLM),
    "onnx": (
        Engine("onnxruntime", "run_onnxruntime.py", ("onnxruntime",), "pip install 'fewbits[onnx]'", "onnx"),
    ),
    "native": (Engine(*_TRANSFORMERS, ("transformers",), "pip install transformers", imports=("fewbits",)),),
    "mlx": (Engine("mlx-lm", "run_mlx.py", ("mlx_lm",), "pip install mlx-lm 'mlx[cpu]'", "mlx"),),
    "huggingface": (_FLOATS,),
}
"""file type -> the engines its files are for; the first is the one that every output is tried in"""
