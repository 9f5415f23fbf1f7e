"""GGUF headers that lie: each is a FileError that names the file, the fault and the numbers."""

import struct

import pytest

from fewbits.errors import FileError
from fewbits.files.gguf.file import map_gguf_tensor, read_gguf
from tests.attacks.forge import (
    ARRAY,
    F32,
    Q8_0,
    STRING,
    UINT8,
    UINT32,
    allocates_below,
    gguf,
    key,
    string,
    tensor,
    u32,
    u64,
    write,
)

ARCH = key("general.architecture", STRING, string("llama"))
A = tensor("a", [32, 2], Q8_0, 0)  # 68 bytes, and 28 of padding
B = tensor("b", [4], F32, 96)  # 16 bytes
DATA = bytes(112)
HUGE = 2**64 - 1

LIES = {
    "empty file": (b"", "not a GGUF file"),
    "magic only": (b"GGUF", "not a GGUF file"),
    "other magic": (b"GGML" + bytes(40), "not a GGUF file"),
    "version 1": (gguf([ARCH], [], version=1), "version 1; 2 and 3"),
    "version 9": (gguf([ARCH], [], version=9), "version 9; 2 and 3"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
    "absurd key count": (gguf([ARCH], [], key_count=HUGE), f"claims {HUGE} keys"),
    "absurd tensor count": (gguf([ARCH], [], tensor_count=2**40), f"claims {2**40} tensors"),
    "one key too many": (gguf([ARCH], [], key_count=2), "key '' is empty"),
    "key name absurdly long": (gguf([string("k", HUGE)], []), f"claims {HUGE} bytes"),
    "string past the end": (gguf([key("k", STRING, string("v", 2**40))], []), f"claims {2**40} bytes"),
    "key not UTF-8": (gguf([key(b"\xff\xfe", UINT8, b"\1")], []), "not UTF-8"),
    "key empty": (gguf([key("", UINT8, b"\1")], []), "is empty"),
    "key twice": (gguf([ARCH, ARCH], []), "'general.architecture' appears twice"),
    "unknown value type": (gguf([key("k", 77, b"\1" * 8)], []), "unknown value type 77"),
    "unknown item type": (gguf([key("k", ARRAY, u32(77) + u64(1))], []), "unknown value type 77"),
    "array of numbers past the end": (
        gguf([key("k", ARRAY, u32(UINT32) + u64(2**62))], []),
        f"{2**64} bytes",
    ),
    "array of strings past the end": (
        gguf([key("k", ARRAY, u32(STRING) + u64(2**61))], []),
        f"{2**64} bytes",
    ),
    "array of arrays past the end": (
        gguf([key("k", ARRAY, u32(ARRAY) + u64(2**61))], []),
        f"claims {2**61} items",
    ),
    "arrays nested": (gguf([key("k", ARRAY, (u32(ARRAY) + u64(1)) * 5000)], []), "nests arrays"),
    "alignment 24": (gguf([key("general.alignment", UINT32, u32(24))], []), "24, no power of two"),
    "alignment 0": (gguf([key("general.alignment", UINT32, u32(0))], []), "0, no power of two"),
    "alignment a string": (gguf([key("general.alignment", STRING, string("32"))], []), "no power of two"),
    "alignment absurd": (
        gguf([key("general.alignment", UINT32, u32(2**31))], [A, B], DATA),
        "ends at byte",
    ),
    "five dimensions": (gguf([ARCH], [tensor("a", [1] * 5, F32, 0)], DATA), "'a' has 5 dimensions"),
    "absurd dimensions": (gguf([ARCH], [tensor("a", [1], F32, 0, dims=2**32 - 1)], DATA), "dimensions"),
    "unknown type": (gguf([ARCH], [tensor("a", [32], 99, 0)], DATA), "'a' has unknown ggml type 99"),
    "removed type": (gguf([ARCH], [tensor("a", [32], 4, 0)], DATA), "'a' has unknown ggml type 4"),
    "row not a multiple": (gguf([ARCH], [tensor("a", [33], Q8_0, 0)], DATA), "33 is not a multiple of 32"),
    "product overflows": (gguf([ARCH], [tensor("a", [2**63, 2, 2, 1], F32, 0)], DATA), "'a' (f32"),
    "empty and absurd": (
        gguf([ARCH], [tensor("a", [2**63 + 32, 0], Q8_0, 0)], DATA),
        "which no tensor can have",
    ),
    "negative size": (gguf([ARCH], [tensor("a", [HUGE], F32, 0)], DATA), "ends at byte"),
    "offset misaligned": (gguf([ARCH], [A, tensor("b", [4], F32, 97)], DATA), "97 is not a multiple"),
    "offset past the end": (gguf([ARCH], [tensor("a", [4], F32, 2**62)], DATA), "ends at byte"),
    "tensor past the end": (gguf([ARCH], [A, B], DATA[:-1]), "'b' (f32 (4,)) ends at byte"),
    "tensors overlap": (gguf([ARCH], [A, tensor("b", [4], F32, 64)], DATA), "'b' at byte"),
    "tensor inside a tensor": (
        gguf([ARCH], [tensor("a", [28], F32, 0), tensor("b", [4], F32, 32), tensor("c", [4], F32, 64)], DATA),
        "'c' at byte",
    ),
    "name twice": (gguf([ARCH], [A, tensor("a", [4], F32, 96)], DATA), "'a' appears twice"),
    "no name": (gguf([ARCH], [tensor("", [4], F32, 0)], DATA), "has no name"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_a_file_error_that_names_it(tmp_path, lie):
    data, says = LIES[lie]
    path = write(tmp_path / "model.gguf", data)
    with allocates_below(2**20), pytest.raises(FileError) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize("version", [2, 3])
def test_the_honest_twin_opens(tmp_path, version):
    """The lies differ from this by what they say they do."""
    opened = read_gguf(write(tmp_path / "model.gguf", gguf([ARCH], [A, B], DATA, version=version)))
    assert opened.metadata == {"general.architecture": "llama"}
    assert {name: (t.shape, t.type_name, t.nbytes) for name, t in opened.tensors.items()} == {
        "a": ((2, 32), "q8_0", 68),
        "b": ((4,), "f32", 16),
    }


@pytest.mark.parametrize("keep", range(0, len(gguf([ARCH], [A, B], DATA)), 7))
def test_truncated_anywhere(tmp_path, keep):
    with pytest.raises(FileError):
        read_gguf(write(tmp_path / "model.gguf", gguf([ARCH], [A, B], DATA)[:keep]))


def test_a_file_that_shrinks_after_opening(tmp_path):
    path = write(tmp_path / "model.gguf", gguf([ARCH], [A, B], DATA))
    last = read_gguf(path).tensors["b"]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(FileError, match="changed since it was opened"):
        map_gguf_tensor(last)


def split(number: int, count: int, total: int, tensors: list[bytes], data: bytes) -> bytes:
    keys = [
        key("split.no", 2, struct.pack("<H", number)),
        key("split.count", 2, struct.pack("<H", count)),
        key("split.tensors.count", 5, struct.pack("<i", total)),
    ]
    return gguf(keys, tensors, data)


def test_missing_parts_are_listed(tmp_path):
    path = write(tmp_path / "m-00002-of-00004.gguf", split(1, 4, 2, [B], DATA))
    with pytest.raises(FileError, match=r"00001-of-00004[\s\S]*00003-of-00004[\s\S]*00004-of-00004"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (split(0, 2, 2, [B], DATA), "says it is part 0 of 2"),
        (split(1, 3, 2, [B], DATA), "says it is part 1 of 3"),
        (split(1, 2, 2, [A], DATA), "'a' is in two parts"),
        (split(1, 2, 2, [], b""), "hold 1 tensors, split.tensors.count says 2"),
        (gguf([ARCH], [B], DATA), "says it is part None of None"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path, second, says):
    first = write(tmp_path / "m-00001-of-00002.gguf", split(0, 2, 2, [A], DATA))
    write(tmp_path / "m-00002-of-00002.gguf", second)
    with pytest.raises(FileError) as caught:
        read_gguf(first)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["renamed.gguf", "m-00001-of-00003.gguf"])
def test_a_part_under_another_name(tmp_path, name):
    with pytest.raises(FileError, match="NAME-00001-of-00002"):
        read_gguf(write(tmp_path / name, split(0, 2, 2, [A], DATA)))
