"""fewbits quantizes large language models: it reads a checkpoint, quantizes it, measures the loss, writes the
file that the user's runtime loads, and runs it.

    import fewbits

    receipt = fewbits.quantize("Llama-3.2-1B", "Llama-3.2-1B-Q4_K_M.gguf", to="q4_k_m")
    print(receipt.table())

A name is imported when it is first used: `import fewbits` alone loads neither torch nor anything else.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import VERSION as __version__

if sys.platform == "win32":  # writers exclude each other by fcntl.flock
    raise ImportError("fewbits runs on Linux and macOS; on Windows, install it inside WSL")

if TYPE_CHECKING:
    from .calibrate.tokens import Tokens, read_tokens
    from .errors import (
        CalibrationError,
        FewbitsError,
        FileError,
        FormatError,
        KernelError,
        ModelError,
        PlanError,
    )
    from .evaluation import evaluate, evaluate_head
    from .files.checkpoint import Checkpoint
    from .files.open import open_checkpoint as open
    from .formats import FORMATS, Format
    from .plan import Plan, Rule
    from .plan.method import EFFORTS, METHODS, Method
    from .qtensor import Plane, QTensor
    from .release.receipt import Receipt
    from .release.verify import verify
    from .runtime.load import load
    from .runtime.register import register
    from .workflow.in_place import quantize_model
    from .workflow.options import Options
    from .workflow.quantize import quantize
    from .workflow.run import convert
    from .workflow.training import export, integer_only, prepare_qat

_HOMES = {
    "errors": "CalibrationError FewbitsError FileError FormatError KernelError ModelError PlanError",
    "evaluation": "evaluate evaluate_head",
    "calibrate.tokens": "Tokens read_tokens",
    "files.checkpoint": "Checkpoint",
    "files.open": "open_checkpoint",
    "formats": "FORMATS Format",
    "plan": "Plan Rule",
    "plan.method": "EFFORTS METHODS Method",
    "qtensor": "Plane QTensor",
    "release.receipt": "Receipt",
    "release.verify": "verify",
    "runtime.load": "load",
    "runtime.register": "register",
    "workflow.in_place": "quantize_model",
    "workflow.options": "Options",
    "workflow.quantize": "quantize",
    "workflow.run": "convert",
    "workflow.training": "export integer_only prepare_qat",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "EFFORTS",
    "FORMATS",
    "METHODS",
    "CalibrationError",
    "Checkpoint",
    "FewbitsError",
    "FileError",
    "Format",
    "FormatError",
    "KernelError",
    "Method",
    "ModelError",
    "Options",
    "Plan",
    "PlanError",
    "Plane",
    "QTensor",
    "Receipt",
    "Rule",
    "Tokens",
    "__version__",
    "convert",
    "evaluate",
    "evaluate_head",
    "export",
    "integer_only",
    "load",
    "open",
    "prepare_qat",
    "quantize",
    "quantize_model",
    "read_tokens",
    "register",
    "verify",
]


def __getattr__(name: str) -> Any:
    wanted = "open_checkpoint" if name == "open" else name
    if name not in __all__ or wanted not in _HOME:
        raise AttributeError(f"module 'fewbits' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[wanted]}", __name__), wanted)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
