"""The GGML types against the `gguf` package: same names, same sizes, same bits from any bytes."""

import gguf
import numpy as np
import pytest
import torch

from fewbits.formats.ggml import TYPES as SCALAR_TYPES
from fewbits.formats.ggml import Ggml, format_of
from fewbits.formats.ggml_types import GGML_TYPES
from fewbits.formats.iq import IQ_TYPES
from fewbits.qtensor import QTensor

TYPES = (*SCALAR_TYPES, *IQ_TYPES)
ROWS, BLOCKS = 64, 8


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal down to the sign of zero; any NaN is like any other."""
    number = ~(a.isnan() & b.isnan())
    return torch.equal(a[number].view(torch.int32), b[number].view(torch.int32))


@pytest.mark.parametrize("fmt", TYPES, ids=lambda fmt: fmt.name)
def test_any_bytes_decode_as_in_gguf(fmt: Ggml) -> None:
    """Random bytes: every code and scale, and float16 scales of every kind, infinite and NaN too."""
    generator = torch.Generator().manual_seed(0)
    shape = ROWS, BLOCKS * fmt.planes[0].entries
    blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    with np.errstate(all="ignore"):
        wanted = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(fmt.type_id))
    q = QTensor(fmt, (ROWS, BLOCKS * fmt.block), {"blocks": blocks})
    assert same_bits(fmt.decode_reference(q), torch.from_numpy(wanted))
    assert same_bits(fmt.decode(q), torch.from_numpy(wanted))


def test_all_types_are_those_of_gguf() -> None:
    theirs = {t.name.lower(): (int(t), *sizes) for t, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert theirs == GGML_TYPES


@pytest.mark.parametrize("fmt", TYPES, ids=lambda fmt: fmt.name)
def test_names_and_sizes_are_those_of_gguf(fmt: Ggml) -> None:
    kind = gguf.GGMLQuantizationType(fmt.type_id)
    assert kind.name.lower() == fmt.type_name and format_of(fmt.type_name) == fmt.name
    assert gguf.GGML_QUANT_SIZES[kind] == (fmt.block, fmt.nbytes(1, fmt.block))
