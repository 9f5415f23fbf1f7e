"""Triton kernels in a process of their own: how Triton runs is decided when it is imported.

TRITON_INTERPRET=1 python -m tests.devices.interpreted columns        on the CPU, by the interpreter
python -m tests.devices.interpreted columns cuda                      on a device
python -m tests.devices.interpreted compile 90                        for a compute capability
"""

import sys
from dataclasses import fields
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewbits.algorithms.columns import MOST_LEVELS
from fewbits.core import Rounding
from fewbits.formats.rounding import rounding_of
from fewbits.kernels import columns
from tests.test_columns import compare_columns


def moved(x: Any, device: str) -> Any:
    if isinstance(x, tuple):
        return tuple(moved(each, device) for each in x)
    return x.to(device) if isinstance(x, torch.Tensor) else x


def compare(device: str) -> int:
    """-> how many formats the kernel rounds for, all as plain torch does."""

    def run(grid: Any, state: torch.Tensor, coupling: torch.Tensor, order: torch.Tensor, **how: Any) -> Any:
        known = rounding_of(grid, state.shape[1], order, MOST_LEVELS)
        parts = {each.name: moved(getattr(known, each.name), device) for each in fields(Rounding)}
        given = {"pivot": None, "old": None} | {name: moved(part, device) for name, part in how.items()}
        found = columns.quantize_columns(state.to(device), coupling.to(device), Rounding(**parts), **given)
        return [part.cpu() for part in found]

    return compare_columns(run, MOST_LEVELS, rows=(33,), widths=(5,))


def compiled(capability: int) -> None:
    """Print each variant of the kernel, its bytes of machine code, and how many fused products it has."""
    kernel = columns._quantize_columns
    types = {"group": "*i64", "codes": "*u8", "zero": "fp32", "top": "fp32"}
    types |= dict.fromkeys(("k", "n", "count"), "i32")
    for table, pivot in product((False, True), repeat=2):
        constants = {"TABLE": table, "OFFSET": True, "ZEROS": True, "PIVOT": pivot}
        constants |= {"HALVINGS": 4, "COLUMNS": 128, "ROWS": columns.ROWS}
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names
        }
        made = triton.compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", capability, 32),
            options=columns.EXACT,
        )
        print(f"columns-{table}-{pivot}", len(made.asm["cubin"]), made.asm["ptx"].count("fma.rn"))


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "columns":
        print(compare(given[0] if given else "cpu"))
    else:
        compiled(int(given[0]))
