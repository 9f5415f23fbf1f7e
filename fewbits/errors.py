"""The exception classes of fewbits. Every deliberate error is one of these.

    FewbitsError
    |- FormatError        a number format is unknown, or cannot hold this tensor
    |- FileError          a file is truncated, hostile, missing, unwritable or in the way
    |- PlanError          a rule or recipe asks for something that cannot be done
    |- CalibrationError   calibration data are missing, too few or not finite
    |- KernelError        no kernel can run this operation here
    `- ModelError         a checkpoint's structure is not understood

A message says what is wrong, where, the expected and the actual value, and how to fix it. Validation
collects all faults before it raises (`raise_all`).
"""

from collections.abc import Sequence


class FewbitsError(Exception):
    """The root: `except FewbitsError` catches every deliberate error of this package."""


class FormatError(FewbitsError):
    """A number format is unknown, or cannot hold this tensor."""


class FileError(FewbitsError):
    """A file is truncated, hostile, missing, unwritable or in the way."""


class PlanError(FewbitsError):
    """A rule or recipe asks for something that cannot be done."""


class CalibrationError(FewbitsError):
    """Calibration data are missing, too few or not finite."""


class KernelError(FewbitsError):
    """No kernel can run this operation here."""


class ModelError(FewbitsError):
    """A checkpoint's structure is not understood."""


def raise_all(error: type[FewbitsError], where: str, faults: Sequence[str], limit: int = 20) -> None:
    """Raise one `error` that lists every fault found at `where`; do nothing when there is none."""
    if not faults:
        return
    shown = list(faults[:limit])
    if len(faults) > limit:
        shown.append(f"... and {len(faults) - limit} more")
    raise error(f"{where}: {shown[0]}" if len(shown) == 1 else f"{where}:\n  " + "\n  ".join(shown))
