"""Integer weights by formula: the same on every machine, so that bytes can be kept beside them."""

import torch

from fewbits.files.integers import from_integers, group_of
from fewbits.formats import FORMATS
from fewbits.qtensor import QTensor


def formula(name: str, n: int = 32, k: int = 64) -> QTensor:
    """A weight of format `name` with every code, and with every zero point where it has integer ones."""
    format = FORMATS.get(name)
    rows, columns = torch.arange(n)[:, None], torch.arange(k)[None]
    groups = torch.arange(-(-k // group_of(format, k)))[None]
    codes = ((rows * 5 + columns * 3 + rows * columns // 7) & format.top).to(torch.uint8)
    scale = (((rows * 3 + groups * 5) % 29 + 1) / 64).to(format.dtype)
    half = torch.full(scale.shape, 1 << (format.bits - 1))
    zero = (rows + 3 * groups & format.top) if format.zero == "int" else half
    return from_integers(format, (n, k), codes, scale, zero.to(torch.uint8))
