"""Triton kernels: bit for bit what plain torch computes, by Triton's interpreter where there is no GPU; and
they compile for GPUs, of which none needs to be there."""

import os
import subprocess
import sys

import pytest

from .pretend import NAME

pytest.importorskip("triton")
DEVICE = os.environ.get("FEWBITS_TEST_DEVICE", NAME)
FORMATS = 58  # those whose grids are scales and offsets, or tables


def run(*given: str, **environment: str) -> str:
    command = [sys.executable, "-m", "tests.devices.interpreted", *given]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_columns_are_those_of_the_reference() -> None:
    found = run("columns", TRITON_INTERPRET="1") if DEVICE == NAME else run("columns", DEVICE)
    assert int(found) >= FORMATS


def test_gptq_in_lockstep_is_gptq_of_each() -> None:
    found = run("lockstep", TRITON_INTERPRET="1") if DEVICE == NAME else run("lockstep", DEVICE)
    assert int(found) > 0


@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_without_fused_products(capability: str) -> None:
    for line in run("compile", capability).splitlines():
        name, nbytes, fused = line.split()
        assert int(nbytes) > 1000 and fused == "0", name
