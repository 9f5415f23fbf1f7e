"""The bit packer against its definition: one little-endian bit stream per row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.core import pack
from fewbits.errors import FormatError

WORDS = [torch.uint8, torch.int32]


def random_codes(n: int, k: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)


def bit_stream(row: list[int], bits: int) -> int:
    """The definition: code i at bit i * bits of one large integer."""
    return sum(code << (i * bits) for i, code in enumerate(row))


@given(st.integers(1, 8), st.sampled_from(WORDS), st.integers(1, 70), st.integers(0, 2**32))
def test_packed_row_is_its_bit_stream(bits, word, k, seed):
    codes = random_codes(2, k, bits, seed)
    packed = pack.pack(codes, bits, word)
    count, words = pack.cell(bits, word)
    assert packed.dtype == word and packed.shape == (2, -(-k // count) * words)
    for row, got in zip(codes.tolist(), packed, strict=True):
        assert int.from_bytes(got.contiguous().view(torch.uint8).numpy().tobytes(), "little") == bit_stream(
            row, bits
        )
    assert torch.equal(pack.unpack(packed, bits, k), codes)


@given(st.integers(1, 8), st.sampled_from(WORDS), st.randoms(), st.integers(0, 2**32))
def test_order_permutes_each_cell(bits, word, random, seed):
    count, _ = pack.cell(bits, word)
    order = random.sample(range(count), count)
    codes = random_codes(3, 2 * count, bits, seed)
    by_hand = codes.reshape(3, 2, count)[..., order].reshape(3, 2 * count)
    packed = pack.pack(codes, bits, word, order)
    assert torch.equal(packed, pack.pack(by_hand, bits, word))
    assert torch.equal(pack.unpack(packed, bits, 2 * count, order), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("word", WORDS)
def test_cell_fills_whole_words(bits, word):
    count, words = pack.cell(bits, word)
    assert count * bits == words * 8 * word.itemsize
    assert all(c * bits % (8 * word.itemsize) for c in range(1, count))


def test_leading_axes_are_kept():
    codes = random_codes(6, 10, 3, 0)
    stacked = pack.pack(codes.reshape(2, 3, 10), 3)
    assert stacked.shape[:2] == (2, 3)
    assert torch.equal(stacked.reshape(6, -1), pack.pack(codes, 3))


def test_known_layouts():
    eight = torch.arange(8, dtype=torch.uint8)[None]
    assert pack.pack(eight, 4).tolist() == [[0x10, 0x32, 0x54, 0x76]]
    assert pack.pack(eight, 4, order=(1, 0)).tolist() == [[0x01, 0x23, 0x45, 0x67]]  # bitsandbytes
    assert pack.pack(eight, 4, torch.int32, (0, 2, 4, 6, 1, 3, 5, 7)).tolist() == [[0x75316420]]  # AWQ
    assert pack.pack(eight[:, :3], 8).tolist() == [[0, 1, 2]]
    assert pack.pack(torch.tensor([[1, 0, 1, 1]], dtype=torch.uint8), 1).tolist() == [[0b1101]]


@pytest.mark.parametrize(
    "call",
    [
        lambda c: pack.pack(c, 0),
        lambda c: pack.pack(c, 9),
        lambda c: pack.pack(c, 4, torch.int64),
        lambda c: pack.pack(c, 4, order=(0, 0)),
        lambda c: pack.pack(c, 4, order=(0, 1, 2)),
        lambda c: pack.unpack(c, 4, 3),
    ],
)
def test_impossible_layouts_raise(call):
    with pytest.raises(FormatError):
        call(torch.zeros(1, 4, dtype=torch.uint8))
