"""Valid files, mutated: opening one works or raises FileError, in bounded time and memory.

FEWBITS_FUZZ_SECONDS=60 runs each reader for about that long on fresh random mutations; the default
is a fixed sequence of 300 that takes a second or two.
"""

import json
import os
import time
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbits.errors import FileError
from fewbits.files.gguf.file import map_gguf_tensor, read_gguf
from fewbits.files.native import open_native
from fewbits.files.open import open_checkpoint
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
    row,
    safetensors,
    string,
    tensor,
    u32,
    u64,
)

SECONDS = int(os.environ.get("FEWBITS_FUZZ_SECONDS", "0"))
EXAMPLES = 300 * max(SECONDS, 1)
MEMORY = 4 * 2**20  # bytes; the files are below 1 KiB, the largest sound header below 10 KiB in memory
FLOATS = safetensors({"__metadata__": {"by": "x"}, "n": row("BF16", [4], 0, 8)}, bytes(8))
PLANES = safetensors(
    {"__metadata__": {"by": "x"}, "w.blocks": row("U8", [2, 34], 0, 68), "n": row("BF16", [4], 68, 76)},
    bytes(76),
)
MODEL = gguf(
    [
        key("general.architecture", STRING, string("llama")),
        key("general.alignment", UINT32, u32(32)),
        key("tokens", ARRAY, u32(STRING) + u64(3) + string("a") + string("bc") + string("")),
        key("numbers", ARRAY, u32(UINT8) + u64(4) + b"\1\2\3\4"),
        key("nested", ARRAY, u32(ARRAY) + u64(1) + u32(UINT32) + u64(2) + u32(5) + u32(6)),
    ],
    [tensor("a", [32, 2], Q8_0, 0), tensor("b", [4], F32, 96)],
    bytes(112),
)
INDEX = json.dumps({"weight_map": {"n": "one.safetensors"}}).encode()
NATIVE = json.dumps({"version": 1, "tensors": {"w": {"format": "q8_0", "shape": [2, 32]}}}).encode()


def open_planes(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    return [tensor.load() for tensor in open_checkpoint(folder).tensors.values()]


def open_model(folder, data):
    (folder / "model.gguf").write_bytes(data)
    opened = read_gguf(folder / "model.gguf")
    return [opened.metadata, *map(map_gguf_tensor, opened.tensors.values())]


def open_index(folder, data):
    (folder / "one.safetensors").write_bytes(FLOATS)
    (folder / "model.safetensors.index.json").write_bytes(data)
    return [tensor.load() for tensor in open_checkpoint(folder).tensors.values()]


def open_native_index(folder, data):
    (folder / "model.safetensors").write_bytes(PLANES)
    (folder / "fewbits.json").write_bytes(data)
    return [tensor.load() for tensor in open_native(folder).tensors.values()]


READERS = {
    "safetensors": (FLOATS, open_planes),
    "gguf": (MODEL, open_model),
    "shard index": (INDEX, open_index),
    "native index": (NATIVE, open_native_index),
}
EDGES = [0, 1, 2, 31, 33, 2**7, 2**8 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
WHERE = st.integers(0, 2**16)
MUTATION = st.one_of(
    st.tuples(st.just("flip"), WHERE, st.integers(0, 7)),
    st.tuples(st.just("cut"), WHERE, st.integers(1, 64)),
    st.tuples(st.just("truncate"), WHERE, st.just(0)),
    st.tuples(st.just("insert"), WHERE, st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("u32"), WHERE, st.sampled_from(EDGES)),
    st.tuples(st.just("u64"), WHERE, st.sampled_from(EDGES)),
    st.tuples(
        st.just("text"), WHERE, st.sampled_from([b"[", b"{", b'"', b"-1", b"1e999", b"null", b"99999999999"])
    ),
)


def mutate(data, mutations):
    for kind, where, value in mutations:
        at = where % (len(data) + 1)
        if kind == "flip":
            data = data[:at] + bytes([data[at] ^ 1 << value]) + data[at + 1 :] if at < len(data) else data
        elif kind == "cut":
            data = data[:at] + data[at + value :]
        elif kind == "truncate":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "text":
            data = data[:at] + value + data[at + len(value) :]
        else:
            size = 4 if kind == "u32" else 8
            data = data[:at] + (value % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]
    return data


@pytest.mark.parametrize("reader", READERS)
def test_the_seed_opens(tmp_path, reader):
    seed, opens = READERS[reader]
    (tmp_path / "config.json").write_bytes(b"{}")
    assert opens(tmp_path, seed)


@pytest.mark.parametrize("reader", READERS)
def test_mutations(tmp_path, reader):
    seed, opens = READERS[reader]
    (tmp_path / "config.json").write_bytes(b"{}")
    stop = time.monotonic() + SECONDS if SECONDS else float("inf")

    @settings(
        max_examples=EXAMPLES,
        derandomize=not SECONDS,
        database=None,
        deadline=timedelta(seconds=1),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(MUTATION, min_size=1, max_size=4))
    def run(mutations):
        if time.monotonic() > stop:
            return
        data = mutate(seed, mutations)
        with allocates_below(MEMORY):
            try:
                opens(tmp_path, data)
            except FileError as error:
                assert str(tmp_path) in str(error)

    run()
