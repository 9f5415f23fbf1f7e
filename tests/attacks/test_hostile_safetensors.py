"""safetensors headers that lie: each is a FileError that names the file, the fault and the numbers."""

import json

import pytest

from fewbits.errors import FileError
from fewbits.storage.safetensors import HEADER_LIMIT, map_tensor, read_header
from tests.attacks.forge import allocates_below, row, safetensors, write

FOUR = b"\0" * 4
GOOD = {"a": row("F32", [2], 0, 8), "b": row("U8", [4], 8, 12)}

LIES = {
    "empty file": (b"", "0 bytes are too few"),
    "seven bytes": (b"\1" * 7, "7 bytes are too few"),
    "header past the end": (safetensors({}, length=1000), "claims 1000 bytes, the file has 2"),
    "header over the limit": (safetensors({}, length=2**63), str(HEADER_LIMIT)),
    "not JSON": (safetensors(b"{oops}"), "not valid JSON"),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), "not valid JSON"),
    "a list": (safetensors([1]), "expected a JSON object"),
    "deep JSON": (safetensors(b'{"a":' + b"[" * 200_000), "nested too deeply"),
    "long number": (safetensors(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "key twice": (safetensors(b'{"a":1,"a":2}'), "'a' appears twice"),
    "row is a number": (safetensors({"a": 3}), "'a': expected a table"),
    "metadata not strings": (safetensors({"__metadata__": {"a": 1}}), "__metadata__"),
    "unknown dtype": (safetensors({"a": row("F99", [1], 0, 4)}, FOUR), "'a': unknown dtype 'F99'"),
    "dtype a list": (safetensors({"a": row([], [1], 0, 4)}, FOUR), "'a': unknown dtype"),  # type: ignore[arg-type]
    "negative size": (safetensors({"a": row("F32", [-1], 0, 4)}, FOUR), "'a': shape [-1]"),
    "size true": (safetensors({"a": row("F32", [True], 0, 4)}, FOUR), "'a': shape [True]"),
    "empty and absurd": (
        safetensors({"a": row("F32", [0, 2**62, 2**40], 0, 0)}, b""),
        "which no tensor can have",
    ),
    "65 dimensions": (safetensors({"a": row("F32", [1] * 65, 0, 4)}, FOUR), "'a': shape"),
    "offsets reversed": (safetensors({"a": row("F32", [1], 4, 0)}, FOUR), "'a': data_offsets [4, 0]"),
    "offset a string": (safetensors({"a": row("F32", [1], "0", 4)}, FOUR), "'a': data_offsets"),
    "span too short": (safetensors({"a": row("F32", [2], 0, 4)}, FOUR), "needs 8 bytes, data_offsets span 4"),
    "product overflows": (safetensors({"a": row("F32", [2**62, 4], 0, 0)}), f"needs {2**66} bytes"),
    "gap": (safetensors({"a": row("U8", [1], 3, 4)}, FOUR), "'a' leaves a gap"),
    "overlap": (
        safetensors({"a": row("U8", [3], 0, 3), "b": row("U8", [2], 2, 4)}, FOUR),
        "'b' overlaps",
    ),
    "truncated data": (safetensors(GOOD, FOUR), "it is truncated"),
    "trailing bytes": (safetensors(GOOD, FOUR * 4), "4 bytes are unclaimed"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_a_file_error_that_names_it(tmp_path, lie):
    data, says = LIES[lie]
    path = write(tmp_path / "model.safetensors", data)
    with pytest.raises(FileError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_the_honest_twin_opens(tmp_path):
    """The lies differ from this by what they say they do."""
    entries = read_header(write(tmp_path / "model.safetensors", safetensors(GOOD, FOUR * 3)))
    assert [(entry.name, entry.shape, entry.nbytes) for entry in entries.values()] == [
        ("a", (2,), 8),
        ("b", (4,), 4),
    ]


def test_every_fault_is_told_at_once(tmp_path):
    bad = {f"t{i}": row("F99", [1], 0, 4) for i in range(3)}
    with pytest.raises(FileError, match=r"t0[\s\S]*t1[\s\S]*t2"):
        read_header(write(tmp_path / "model.safetensors", safetensors(bad, FOUR)))


@pytest.mark.parametrize("keep", range(0, len(safetensors(GOOD, FOUR * 3)), 5))
def test_truncated_anywhere(tmp_path, keep):
    path = write(tmp_path / "model.safetensors", safetensors(GOOD, FOUR * 3)[:keep])
    with pytest.raises(FileError):
        read_header(path)


def test_a_claimed_size_is_never_allocated(tmp_path):
    claims = {"a": row("F32", [2**40], 0, 2**42)}
    path = write(tmp_path / "model.safetensors", safetensors(claims, FOUR))
    with allocates_below(2**20), pytest.raises(FileError, match="truncated"):
        read_header(path)


def test_a_file_that_shrinks_after_opening(tmp_path):
    path = write(tmp_path / "model.safetensors", safetensors(GOOD, FOUR * 3))
    entry = read_header(path)["b"]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(FileError, match="changed since it was opened"):
        map_tensor(path, entry)


def test_hostile_names_stay_printable(tmp_path):
    data = safetensors(json.dumps({"\ud800\x1b[31m": row("F99", [1], 0, 4)}).encode(), FOUR)
    with pytest.raises(FileError) as caught:
        read_header(write(tmp_path / "model.safetensors", data))
    assert "\x1b" not in str(caught.value)
    str(caught.value).encode("utf-8")
