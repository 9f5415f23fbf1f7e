"""GGUF read and written, against the gguf package in both directions."""

import struct
import time

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType as T
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import FileError
from fewbits.files.gguf.file import (
    BLOCK_SIZES,
    GGUFValue,
    gguf_header,
    gguf_nbytes,
    map_gguf_tensor,
    read_gguf,
)
from fewbits.files.open import file_type_at

RANGES = {
    T.UINT8: (0, 2**8 - 1),
    T.INT8: (-(2**7), 2**7 - 1),
    T.UINT16: (0, 2**16 - 1),
    T.INT16: (-(2**15), 2**15 - 1),
    T.UINT32: (0, 2**32 - 1),
    T.INT32: (-(2**31), 2**31 - 1),
    T.UINT64: (0, 2**64 - 1),
    T.INT64: (-(2**63), 2**63 - 1),
}
SCALARS = {kind: st.integers(*bounds) for kind, bounds in RANGES.items()}
SCALARS |= {
    T.FLOAT32: st.floats(width=32, allow_nan=False),
    T.FLOAT64: st.floats(allow_nan=False),
    T.BOOL: st.booleans(),
    T.STRING: st.text(max_size=20),
}
VALUES = st.one_of(
    *[values.map(lambda x, kind=kind: GGUFValue(kind, x)) for kind, values in SCALARS.items()],
    *[
        st.lists(values, min_size=1, max_size=5).map(lambda x, kind=kind: GGUFValue(T.ARRAY, x, kind))
        for kind, values in SCALARS.items()
    ],
)
METADATA = st.dictionaries(st.text("abc.", min_size=1, max_size=9), VALUES, max_size=8)
TENSORS = [
    ("norm", (6,), "f32"),
    ("w", (3, 64), "q4_0"),
    ("experts", (2, 3, 256), "q6_k"),
    ("e", (5, 7), "bf16"),
]


def written(path, metadata, tensors, version=3):
    """A file of `tensors` with random bytes -> their bytes."""
    header, offsets = gguf_header(metadata, tensors)
    parts, bodies = [header], {}
    for (name, shape, type_name), offset in zip(tensors, offsets, strict=True):
        parts.append(bytes(offset - sum(map(len, parts))))
        bodies[name] = np.random.default_rng(len(name)).bytes(gguf_nbytes(type_name, shape))
        parts.append(bodies[name])
    raw = b"".join(parts)
    raw += bytes(-len(raw) % 32)
    path.write_bytes(raw[:4] + struct.pack("<I", version) + raw[8:])
    return bodies


@settings(max_examples=60, deadline=None)
@given(METADATA)
def test_metadata_comes_back_with_its_types(tmp_path_factory, metadata):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    header, _ = gguf_header(metadata, [])
    path.write_bytes(header)
    assert read_gguf(path).values == metadata


@settings(max_examples=60, deadline=None)
@given(METADATA)
def test_the_header_is_the_packages_byte_for_byte(tmp_path_factory, metadata):
    metadata = {"general.architecture": GGUFValue(T.STRING, "llama")} | metadata
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in list(metadata.items())[1:]:
        writer.add_key_value(key, value.value, value.type, value.item)
    for name, shape, type_name in TENSORS:
        kind = gguf.GGMLQuantizationType[type_name.upper()]
        size = gguf_nbytes(type_name, shape)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    ours, offsets = gguf_header(metadata, TENSORS)
    theirs = path.read_bytes()
    assert ours[: len(theirs)] == theirs
    assert set(ours[len(theirs) :]) <= {0}
    assert offsets[0] == len(ours) == -(-len(theirs) // 32) * 32


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_come_back_whole_and_by_rows(tmp_path, version):
    path = tmp_path / "m.gguf"
    bodies = written(path, {"general.architecture": GGUFValue(T.STRING, "llama")}, TENSORS, version)
    assert file_type_at(path).name == "gguf"
    opened = read_gguf(path)
    assert opened.version == version
    assert [(t.name, t.shape, t.type_name) for t in opened.tensors.values()] == TENSORS
    for name, tensor in opened.tensors.items():
        whole = map_gguf_tensor(tensor)
        assert whole.reshape(-1).view(torch.uint8).numpy().tobytes() == bodies[name]
    experts = opened.tensors["experts"]
    assert map_gguf_tensor(experts).shape == (6, 210)
    assert torch.equal(map_gguf_tensor(experts, slice(3, 5)), map_gguf_tensor(experts)[3:5])
    assert map_gguf_tensor(experts, slice(4, 4)).shape == (0, 210)
    floats = opened.tensors["e"]
    assert map_gguf_tensor(floats).shape == (5, 7)
    last = map_gguf_tensor(floats, slice(-1, None))
    assert torch.equal(last.view(torch.int16), map_gguf_tensor(floats)[-1:].view(torch.int16))


def test_the_package_reads_what_we_write(tmp_path):
    path = tmp_path / "m.gguf"
    metadata = {
        "general.architecture": GGUFValue(T.STRING, "llama"),
        "general.alignment": GGUFValue(T.UINT32, 64),
        "tokens": GGUFValue(T.ARRAY, ["a", "ü", ""], T.STRING),
    }
    header, offsets = gguf_header(metadata, [("a", (2, 3), "f32"), ("b", (1, 32), "q8_0")])
    a = np.arange(6, dtype=np.float32)
    path.write_bytes(header + a.tobytes() + bytes(64 - 24) + bytes(range(34)) + bytes(30))
    assert [offset % 64 for offset in offsets] == [0, 0]
    reader = gguf.GGUFReader(path)
    assert reader.get_field("tokens").contents() == ["a", "ü", ""]
    first, second = reader.tensors
    assert np.array_equal(first.data, a.reshape(2, 3))
    assert bytes(second.data.reshape(-1)) == bytes(range(34))
    assert second.data_offset == offsets[1]


def test_every_type_of_the_package_has_its_size(tmp_path):
    rows = [(name, (2, 256), name) for name in BLOCK_SIZES]
    path = tmp_path / "m.gguf"
    bodies = written(path, {}, rows)
    opened = read_gguf(path)
    assert {name: tensor.nbytes for name, tensor in opened.tensors.items()} == {
        name: len(body) for name, body in bodies.items()
    }


def test_any_part_opens_the_whole_split_model(tmp_path):
    rows = TENSORS[:3]
    for number, row in enumerate(rows):
        metadata = {
            "split.no": GGUFValue(T.UINT16, number),
            "split.count": GGUFValue(T.UINT16, 3),
            "split.tensors.count": GGUFValue(T.INT32, 3),
        }
        if number == 0:
            metadata["general.architecture"] = GGUFValue(T.STRING, "llama")
        written(tmp_path / f"m-{number + 1:05d}-of-00003.gguf", metadata, [row])
    opened = [read_gguf(path) for path in sorted(tmp_path.glob("*.gguf"))]
    assert opened[0] == opened[1] == opened[2]
    assert list(opened[1].tensors) == ["norm", "w", "experts"]
    assert opened[1].metadata["general.architecture"] == "llama"
    assert [tensor.file.name[2:7] for tensor in opened[1].tensors.values()] == ["00001", "00002", "00003"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("x" * 64, (1,), "f32")], "64 bytes long, 1 to 63"),
        ([("", (1,), "f32")], "0 bytes long"),
        ([("a", (1,), "f32"), ("a", (1,), "f32")], "two tensors are called 'a'"),
        ([("a", (1, 33), "q8_0")], "33 is not a multiple of 32"),
        ([("a", (1,), "q99")], "unknown ggml type 'q99'"),
        ([("a", (1,) * 5, "f32")], "1 to 4 dimensions"),
    ],
)
def test_what_cannot_be_written(rows, says):
    with pytest.raises(FileError) as caught:
        gguf_header({}, rows)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        GGUFValue(T.UINT8, 256),
        GGUFValue(T.UINT32, -1),
        GGUFValue(T.UINT32, 1.5),
        GGUFValue(T.STRING, 3),
        GGUFValue(T.ARRAY, [1, 2]),
        GGUFValue(T.ARRAY, [1, "x"], T.INT32),
        GGUFValue(T.FLOAT32, 1e300),
    ],
)
def test_a_value_that_does_not_fit_its_type_names_its_key(value):
    with pytest.raises(FileError, match=r"'some\.key'"):
        gguf_header({"some.key": value}, [])


def test_a_large_vocabulary_parses_quickly(tmp_path):
    """262,144 tokens, scores and types: a second is the aim; three allow for a busy core."""
    count = 2**18
    metadata = {
        "tokenizer.ggml.tokens": GGUFValue(T.ARRAY, [f"token{i}" for i in range(count)], T.STRING),
        "tokenizer.ggml.scores": GGUFValue(T.ARRAY, [0.5] * count, T.FLOAT32),
        "tokenizer.ggml.token_type": GGUFValue(T.ARRAY, [1] * count, T.INT32),
    }
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_header(metadata, [])[0])
    start = time.perf_counter()
    opened = read_gguf(path)
    assert time.perf_counter() - start < 3
    assert opened.values == metadata
