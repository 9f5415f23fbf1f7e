"""The entropy coders: core and references agree, lengths are those of theory, damage is told."""

import heapq
from itertools import product

import numpy as np
import pytest
import torch

from fewbits import core
from fewbits.packing import huffman, rans, spread
from fewbits.packing.coders import CODERS

needs_core = pytest.mark.skipif(not core.available(), reason="the C++ core is not built")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symbols_of(kind: str, count: int) -> torch.Tensor:
    normal = torch.randn(count, generator=generator())
    return {
        "normal": (normal * 3 + 8).round().clamp(0, 15),
        "wide": (normal * 40 + 128).round().clamp(0, 255),
        "one": torch.full((count,), 7.0),
        "rare": torch.where(torch.rand(count, generator=generator(1)) < 1e-4, 200.0, 3.0),
        "uniform": torch.randint(0, 256, (count,), generator=generator()).float(),
    }[kind].to(torch.uint8)


KINDS, COUNTS = ("normal", "wide", "one", "rare", "uniform"), (0, 1, 7, 31, 32, 33, 63, 4099)


def test_every_symbol_keeps_a_frequency() -> None:
    """One symbol takes nearly all, and two hundred others must have theirs."""
    counts = torch.ones(256, dtype=torch.int64)
    counts[200:], counts[7] = 0, 10**6
    table = rans.frequencies(counts)
    assert int(table.sum()) == 4096 and torch.equal(table > 0, counts > 0)


def compare_streams() -> None:
    """The core writes and reads the streams of the references, with one table or several."""
    for kind, count in product(KINDS, COUNTS):
        symbols = symbols_of(kind, count)
        counts = torch.bincount(symbols.int(), minlength=256)
        classes = torch.randint(0, 3, (count,), generator=generator(2)).to(torch.uint8)
        for table, of in (
            (rans.frequencies(counts), None),
            (torch.stack([rans.frequencies(counts * (i + 1) + (i > 1)) for i in range(3)]), classes),
        ):
            assert bool((table.reshape(-1, 256).sum(1) == 4096).all())
            stream = rans.encode_reference(symbols, table, of)
            assert torch.equal(core.rans_encode(symbols, table, of), stream)
            for decode in (rans.decode, rans.decode_reference):
                found = decode(stream, table, count, of)
                assert found is not None and torch.equal(found, symbols), (kind, count)
        lengths = huffman.lengths(counts)
        piece = huffman.encode(symbols, lengths)
        for decode in (huffman.decode, huffman.decode_reference):
            found = decode(piece, lengths, count)
            assert found is not None and torch.equal(found, symbols), (kind, count)


@needs_core
def test_the_core_writes_and_reads_the_streams_of_the_reference() -> None:
    """With the best instruction set of this machine; tests/test_core.py runs the same with every one."""
    compare_streams()


@pytest.mark.parametrize("kind", ["normal", "wide", "rare", "one"])
def test_a_stream_is_half_a_percent_above_the_entropy_at_most(kind: str) -> None:
    """The entropy by numpy, from the counts."""
    symbols = symbols_of(kind, 2**16)
    p = np.bincount(symbols.numpy(), minlength=256) / len(symbols)
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum() * len(symbols) / 8
    table = rans.frequencies(torch.bincount(symbols.int(), minlength=256))
    nbytes = rans.encode(symbols, table).numel()
    assert entropy - 1 <= nbytes <= 1.005 * entropy + rans.STREAM + (8 if kind == "rare" else 0)


@pytest.mark.parametrize("name", [*CODERS])
@pytest.mark.parametrize("plain", [False, True])
def test_damaged_streams_are_told_and_nothing_beyond_them_is_read(name: str, plain: bool) -> None:
    coder = CODERS[name]
    decode = {"rans": rans, "huffman": huffman}[name].decode_reference if plain else coder.decode
    symbols = symbols_of("normal", 3000)
    table = coder.table(torch.bincount(symbols.int(), minlength=256))
    stream = coder.encode(symbols, table, None)
    for size in (0, 1, 31, 32, 33, 127, 128, len(stream) // 2, len(stream) - 2, len(stream) - 1):
        assert decode(stream[:size].clone(), table, 3000, None) is None
    assert decode(torch.cat([stream, stream[:2]]), table, 3000, None) is None
    assert decode(stream, table, 2999, None) is None and decode(stream, table, 3001, None) is None
    wrong = table.clone()
    wrong[8] += 1 if name == "rans" else 9
    assert decode(stream, wrong, 3000, None) is None
    for seed in range(20):
        changed = stream.clone()
        changed[int(torch.randint(0, len(stream), (1,), generator=generator(seed)))] ^= 64
        other = decode(changed, table, 3000, None)
        assert other is None or not torch.equal(other, symbols)


def least_lengths(counts: list[int]) -> int:
    """Bits of the best prefix code, by Huffman's own algorithm."""
    heap, total = sorted(count for count in counts if count), 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


@pytest.mark.parametrize("kind", ["normal", "wide", "uniform"])
def test_huffman_codes_are_the_shortest_and_complete(kind: str) -> None:
    counts = torch.bincount(symbols_of(kind, 4099).int(), minlength=256)
    lengths = huffman.lengths(counts)
    assert huffman.coded_bits(counts, lengths) == least_lengths(counts.tolist())
    assert sum(2.0 ** -int(n) for n in lengths if n) == 1.0  # Kraft
    words = [f"{code:b}".zfill(int(n)) for code, n in zip(huffman.codes(lengths), lengths, strict=True) if n]
    assert not any(a != b and b.startswith(a) for a, b in product(words, words))


def test_huffman_codes_of_a_limit_are_the_best_of_it() -> None:
    """Every choice of lengths of five symbols, limit 3; then Fibonacci counts, which want 19 bits."""
    counts = torch.zeros(256, dtype=torch.int64)
    counts[:5] = torch.tensor([1, 1, 2, 4, 8])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huffman, "BITS", 3)
        found = huffman.coded_bits(counts, huffman.lengths(counts))
    allowed = [n for n in product((1, 2, 3), repeat=5) if sum(2.0**-each for each in n) <= 1]
    assert found == min(sum(a * b for a, b in zip(counts[:5].tolist(), n, strict=True)) for n in allowed)
    a, b = 1, 1
    for i in range(20):
        counts[i], a, b = a, b, a + b
    lengths = huffman.lengths(counts)
    assert int(lengths.max()) == 12 and sum(2.0 ** -int(n) for n in lengths if n) == 1.0


def test_classes_follow_the_spread_of_rows_and_columns() -> None:
    """A quarter of an octave each; codes of one spread need no more than their entropy."""
    rows = torch.tensor([1.0, 4.0]).repeat_interleave(400)
    columns = torch.tensor([4.0, 8.0]).repeat_interleave(300)
    normal = torch.randn(800, 600, generator=generator())
    codes = (normal * rows[:, None] * columns + 128).round().clamp(0, 255).to(torch.uint8)
    found = spread.classes(*spread.fitted(codes)).float()
    assert abs(float(found[500:, 400:].mean() - found[:300, :200].mean()) - 4 * 3) < 0.5
    assert abs(float(found[:300, :200].mean()) - spread.ZERO - 4 * 2) < 0.5
