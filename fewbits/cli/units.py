"""Option values with a unit."""

from __future__ import annotations

import argparse


def gib(text: str) -> int:
    """The value of an option in GiB -> bytes."""
    try:
        nbytes = int(float(text) * 2**30)
    except (ValueError, OverflowError):  # no number; NaN or infinite
        nbytes = -1
    if nbytes < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory; give GiB, such as 4 or 0.5")
    return nbytes
