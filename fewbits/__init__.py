"""fewbits makes large language models small: it reads a checkpoint, quantizes it, measures what that
cost, writes the file that the user's runtime loads, and runs it.

    import fewbits

    receipt = fewbits.quantize("Llama-3.2-1B", "Llama-3.2-1B-Q4_K_M.gguf", fewbits.Request(to="q4_k_m"))
    print(receipt.table())
"""

from .errors import CalibrationError, FewbitsError, FileError, FormatError, KernelError, ModelError, PlanError
from .evaluation import evaluate
from .files.checkpoint import Checkpoint
from .files.open import open_checkpoint as open
from .formats import FORMATS, Format
from .plan import Plan, Rule
from .qtensor import Plane, QTensor
from .release.receipt import Receipt
from .runtime.load import load
from .version import VERSION as __version__
from .workflow.in_place import quantize_model
from .workflow.quantize import Request, convert, quantize

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
