"""The C++ core against its torch references, bit for bit, for every instruction set of this machine."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits import core
from fewbits.errors import FormatError, KernelError
from fewbits.formats import FORMATS
from fewbits.formats.base import Format
from fewbits.formats.ggml import TYPES as SCALAR_TYPES
from fewbits.formats.iq import IQ_TYPES
from fewbits.qtensor import QTensor

TYPES = (*SCALAR_TYPES, *IQ_TYPES)
needs_core = pytest.mark.skipif(not core.available(), reason="the C++ core is not built")


def weights() -> list[torch.Tensor]:
    """Shapes with a ragged last tile, all dtypes, and the values that break quantizers."""
    g = torch.Generator().manual_seed(7)

    def normal(n: int, k: int) -> torch.Tensor:
        return torch.randn(n, k, generator=g)

    spread = normal(5, 512) * torch.exp(2 * normal(5, 512))
    return [
        normal(7, 768) * 0.02,
        spread.bfloat16(),
        normal(3, 256).half() * 1e-4,
        torch.zeros(2, 256),
        torch.full((2, 256), -0.3),
        normal(4, 256).abs() + 3,
        normal(4, 256) * 1e12,
        normal(4, 256) * 1e-40,
        torch.where(normal(4, 256) > 1, 5.0, 0.0).bfloat16(),
    ]


def importances(w: torch.Tensor) -> list[torch.Tensor | None]:
    g = torch.Generator().manual_seed(8)
    column = torch.rand(w.shape[1], generator=g)
    return [None, column, torch.where(column > 0.5, column, 0.0), torch.rand(w.shape, generator=g)]


def cases() -> Iterator[tuple[str, Format, torch.Tensor, torch.Tensor | None, bool]]:
    """Every type, weight and importance, with a name of its own."""
    for fmt in TYPES:
        for i, w in enumerate(weights()):
            known = importances(w)
            # The reference of a lattice compares every point: each weight meets one importance, not all.
            for j, importance in enumerate(known if fmt.vector == 1 else known[i % 4 : i % 4 + 1]):
                for search in (True, False) if fmt.vector == 1 or i < 4 else (True,):
                    yield f"{fmt.name} {i} {j} {search}", fmt, w, importance, search


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the references make of every case: blocks, and of the last of each type the values."""
    found = {}
    for name, fmt, w, importance, search in cases():
        q = fmt.encode_reference(w, importance, search)
        found[name], found[fmt.name] = q.planes["blocks"], fmt.decode_reference(q)
    path = tmp_path_factory.mktemp("references") / "references.safetensors"
    save_file(found, path)
    return path


def compare_all(path: str) -> None:
    """Encode and decode of the core must not differ from the references' in a bit."""
    expected = load_file(path)
    for name, fmt, w, importance, search in cases():
        q = fmt.encode(w, importance, search)
        assert torch.equal(q.planes["blocks"], expected[name]), name
    for fmt in TYPES:
        *_, (name, _, w, _, _) = (case for case in cases() if case[1] is fmt)
        q = QTensor(fmt, (w.shape[0], w.shape[1]), {"blocks": expected[name]})
        assert torch.equal(fmt.decode(q), expected[fmt.name]), fmt.name


@needs_core
@pytest.mark.parametrize("isa", core.ISAS)
def test_core_equals_reference_bit_for_bit(isa: str, references: Path) -> None:
    script = (
        "import sys; from fewbits import core; from tests.test_core import compare_all; "
        "from tests.test_columns import compare_columns; from tests.test_coders import compare_streams; "
        "compare_all(sys.argv[1]); compare_columns(); compare_streams(); "
        "print(core.isa())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(references)],
        env={**os.environ, "FEWBITS_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    ran = run.stdout.strip()
    if ran != isa:
        pytest.skip(f"this machine has no {isa}; {ran} ran instead")


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_ISA", "avx1024")
    with pytest.raises(KernelError, match="avx1024 is no instruction set; it may be portable, avx2, avx512"):
        core.load.__wrapped__()


@needs_core
def test_any_number_of_threads_gives_the_same() -> None:
    w = torch.randn(300, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    fmt, before = FORMATS.get("q4_k"), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            q = fmt.encode(w)
            found.append((q.planes["blocks"], fmt.distortion(w, q)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@needs_core
@pytest.mark.parametrize("fmt", TYPES, ids=lambda fmt: fmt.name)
def test_distortion_is_that_of_the_decoded_weight(fmt) -> None:
    w = (torch.randn(9, 768, generator=torch.Generator().manual_seed(3)) * 0.1).bfloat16()
    q = fmt.encode(w)
    found = fmt.distortion(w, q)
    error = (q.decode() - w.float()).double()
    # f32 sums of 16 lanes over one tile of at most 256 rows each: relative error below 256 * 2^-24.
    assert found.squared == pytest.approx(float(error.square().sum()), rel=256 * 2**-24)
    assert found.energy == pytest.approx(float(w.double().square().sum()), rel=256 * 2**-24)
    assert found.largest == float(error.abs().max())


@needs_core
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e18])
def test_weights_that_cannot_be_encoded_are_refused(bad: float) -> None:
    w = torch.ones(40, 256)
    w[33, 77] = bad
    with pytest.raises(FormatError, match=r"1 of 10240 weights|largest magnitude"):
        FORMATS.get("q6_k").encode(w)


@needs_core
def test_wrong_buffers_are_refused() -> None:
    w = torch.ones(4, 256)
    with pytest.raises(ValueError, match="do not fit"):
        core.encode("q4_k", w, None, True, torch.empty(10, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no type"):
        core.encode("q9_k", w, None, True, torch.empty(10, dtype=torch.uint8))
    with pytest.raises(KernelError, match="contiguous"):
        core.encode("q4_k", w.T, None, True, torch.empty(4 * 144, dtype=torch.uint8))


def test_without_the_core_the_reference_works_and_a_missing_core_says_so() -> None:
    script = """
import sys, warnings
warnings.simplefilter("error")
sys.modules["fewbits._core"] = None  # as if it had not been built
import torch
from fewbits.formats import FORMATS
from fewbits.formats.base import Format
try:
    FORMATS.get("q4_k").encode(torch.ones(2, 256))
except RuntimeWarning as warning:
    assert "tens of times slower: import of fewbits._core halted" in str(warning), warning
else:
    raise SystemExit("no warning")
"""
    plain = {name: value for name, value in os.environ.items() if name != "FEWBITS_CORE"}
    subprocess.run([sys.executable, "-c", script], env=plain, check=True)
    twice = (
        "import sys; sys.modules['fewbits._core'] = None; import torch; from fewbits.formats import FORMATS; "
        "[FORMATS.get(name).encode(torch.ones(2, 256)) for name in ('q4_k', 'q8_0', 'q4_k')]"
    )
    run = subprocess.run([sys.executable, "-c", twice], env=plain, capture_output=True, text=True, check=True)
    assert run.stderr.count("without its C++ core") == 1
    quiet = (
        "import torch; from fewbits.formats import FORMATS; from fewbits import core; "
        "q = FORMATS.get('q4_k').encode(torch.ones(2, 256)); assert core.isa() == 'torch'; "
        "print(q.decode()[0, 0].item())"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", quiet],
        env={**os.environ, "FEWBITS_CORE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(run.stdout) == pytest.approx(1.0, abs=1e-3)  # d is a half: 11 bits


def test_windows_is_refused_in_one_line() -> None:
    script = "import sys; sys.platform = 'win32'; import fewbits"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stderr.splitlines()[-1] == (
        "ImportError: fewbits runs on Linux and macOS; on Windows, install it inside WSL"
    )


def test_blocks_of_the_reference_are_what_a_qtensor_needs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fmt in TYPES:
            q = fmt.encode_reference(torch.ones(2, 256))
            assert isinstance(q, QTensor)
            assert q.nbytes == fmt.nbytes(2, 256)
