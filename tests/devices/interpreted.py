"""Triton kernels in a process of their own: how Triton runs is decided when it is imported.

TRITON_INTERPRET=1 python -m tests.devices.interpreted columns        on the CPU, by the interpreter
python -m tests.devices.interpreted columns cuda                      on a device
TRITON_INTERPRET=1 python -m tests.devices.interpreted lockstep       GPTQ of weights in lockstep
python -m tests.devices.interpreted compile 90                        for a compute capability
"""

import sys
from dataclasses import fields
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewbits import kernels
from fewbits.algorithms import blocked
from fewbits.algorithms.columns import MOST_LEVELS, in_lockstep, quantize_columns_reference
from fewbits.algorithms.gptq import Settings, gptq, gptq_batch
from fewbits.algorithms.hessian import loss
from fewbits.algorithms.lockstep import subtract_product
from fewbits.core import Rounding
from fewbits.formats import FORMATS
from fewbits.formats.rounding import rounding_of
from fewbits.kernels import columns
from tests.test_columns import compare_columns, problem

from .batches import weights_and_stats

BATCH = 3


def moved(x: Any, device: str) -> Any:
    if isinstance(x, tuple):
        return tuple(moved(each, device) for each in x)
    return x.to(device) if isinstance(x, torch.Tensor) else x


def compare(device: str) -> int:
    """-> how many formats the kernel rounds for, all as plain torch does, alone and in lockstep."""

    def run(grid: Any, state: torch.Tensor, coupling: torch.Tensor, order: torch.Tensor, **how: Any) -> Any:
        known = rounding_of(grid, state.shape[1], order, MOST_LEVELS)
        parts = {each.name: moved(getattr(known, each.name), device) for each in fields(Rounding)}
        given = {"pivot": None, "old": None} | {name: moved(part, device) for name, part in how.items()}
        found = columns.quantize_columns(state.to(device), coupling.to(device), Rounding(**parts), **given)
        return [part.cpu() for part in found]

    for name in sorted(FORMATS):
        _compare_in_lockstep(run, name, 3, 33, 5)
    return compare_columns(run, MOST_LEVELS, rows=(33,), widths=(5,))


def _compare_in_lockstep(run: Any, name: str, e: int, n: int, k: int) -> None:
    """e weights of n rows, k columns each, others of each weight."""
    grid = FORMATS.get(name).fit(problem(256, e * n)["state"].T, search=False)
    if rounding_of(grid, e * n, torch.arange(256), MOST_LEVELS) is None:
        return
    each = [problem(k, e * n, seed) for seed in range(e)]
    state, old = each[0]["state"], each[0]["old"]
    order = torch.stack([problem(256, 1, seed)["order"][:k] for seed in range(e)])
    coupling, pivot = (torch.stack([one[what] for one in each]) for what in ("coupling", "pivot"))
    for what in ("pivot", "old"):
        how = {"pivot": pivot} if what == "pivot" else {"old": old}
        found = run(grid, state, coupling, order, **how)
        for i in range(e):
            alone = {"pivot": pivot[i]} if what == "pivot" else {"old": old}
            wanted = quantize_columns_reference(grid, state, coupling[i], order[i], **alone)
            rows = slice(i * n, (i + 1) * n)
            for ours, theirs in zip(found, wanted, strict=True):
                assert torch.equal(ours[:, rows].to(theirs.dtype), theirs[:, rows]), (name, what, i)


def as_a_part(i: int, state: torch.Tensor, coupling: torch.Tensor, moves: torch.Tensor) -> None:
    """subtract_product of one weight with the sums that it has as part i of a batch: MKL's sums may depend on
    where a matrix begins."""
    many, n = state.repeat(1, BATCH), state.shape[1]
    subtract_product(many, coupling.repeat(BATCH, 1, 1), moves.repeat(1, BATCH))
    state.copy_(many[:, i * n : (i + 1) * n])


def lockstep(device: str) -> int:
    """GPTQ of three weights in lockstep, and one by one on the CPU -> how many launches in lockstep."""
    launched, run = [], columns.quantize_columns

    def counted(state: torch.Tensor, coupling: torch.Tensor, *rest: Any) -> Any:
        launched.append(coupling.ndim)
        return run(state, coupling, *rest)

    for name, n, k in (("int4_g32_asym", 7, 96), ("q4_0", 33, 64), ("nf4", 9, 192), ("q4_k", 7, 256)):
        fmt, (ws, stats) = FORMATS.get(name), weights_and_stats(BATCH, n, k)
        there = [w.to(device) for w in ws], [each.to(device) for each in stats]
        with patch.object(kernels, "takes", lambda *_: True), patch.object(columns, run.__name__, counted):
            assert in_lockstep(fmt, k, there[0][0])
            found = gptq_batch(there[0], fmt, there[1], Settings(descent=1))
        for i, (w, each, q) in enumerate(zip(ws, stats, found, strict=True)):
            assert q is not None and each.hessian is not None
            with patch.object(blocked, "subtract_product", partial(as_a_part, i)):
                ours, alone = q.to("cpu"), gptq(w, fmt, each, descent=1)
            (_, codes), (_, wanted) = fmt.unpack(ours), fmt.unpack(alone)
            lost, least = (float(loss(one.decode(), w, each.hessian).sum()) for one in (ours, alone))
            assert lost <= 1.001 * least, (name, lost, least)
            if device == "cpu":  # where the products' sums are the same ones
                assert all(torch.equal(ours.planes[at], alone.planes[at]) for at in alone.planes), name
            assert float((codes != wanted).double().mean()) < (1e-3 if device == "cpu" else 0.05), name
    assert set(launched) == {3}
    return len(launched)


def compiled(capability: int) -> None:
    """Print each variant of the kernel, its bytes of machine code, and how many fused products it has."""
    kernel = columns._quantize_columns
    types = {"group": "*i64", "codes": "*u8", "zero": "fp32", "top": "fp32"}
    types |= dict.fromkeys(("k", "n", "across", "count"), "i32")
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
    if what in ("columns", "lockstep"):
        run = {"columns": compare, "lockstep": lockstep}[what]
        print(run(given[0] if given else "cpu"))
    else:
        compiled(int(given[0]))
