"""These tests on a device: `pretend`, or with FEWBITS_TEST_DEVICE=cuda (mps, xpu) one that is there."""

import os
from collections.abc import Iterator

import pytest
import torch

from .pretend import NAME, pretend, register

# Before the first backward pass of the process: autograd counts devices there.
register()


@pytest.fixture
def device() -> Iterator[torch.device]:
    name = os.environ.get("FEWBITS_TEST_DEVICE", NAME)
    if name != NAME:
        yield torch.device(name)
        return
    with pretend() as found:
        yield found
