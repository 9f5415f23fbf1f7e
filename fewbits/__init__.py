"""fewbits makes large language models small: it reads a checkpoint, quantizes it, measures what that
cost, writes the file that the user's runtime loads, and runs it.

    import fewbits

    receipt = fewbits.quantize("Llama-3.2-1B", "Llama-3.2-1B-Q4_K_M.gguf", fewbits.Request(to="q4_k_m"))
    print(receipt.table())
"""

import fewbits.threads as _threads  # noqa: F401  before torch

from .errors import (
    CalibrationError,
    FewbitsError,
    FileError,
    FormatError,
    KernelError,
    ModelError,
    PlanError,
)
from .evaluation import evaluate
from .files.base import Checkpoint
from .files.open import open_checkpoint as open
from .formats import FORMATS, Format
from .pipeline import Request, convert, quantize
from .plan import Plan, Rule
from .qtensor import Plane, QTensor
from .report.receipt import Receipt
from .runtime import load, quantize_model
from .version import VERSION as __version__

__all__ = [
    "FORMATS",
    "CalibrationError",
    "Checkpoint",
    "FewbitsError",
    "FileError",
    "Format",
    "FormatError",
    "KernelError",
    "ModelError",
    "Plan",
    "PlanError",
    "Plane",
    "QTensor",
    "Receipt",
    "Request",
    "Rule",
    "__version__",
    "convert",
    "evaluate",
    "load",
    "open",
    "quantize",
    "quantize_model",
]
