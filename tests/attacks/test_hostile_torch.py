"""Pickled state dicts that lie or would run something: each is a FileError that says what; nothing runs."""

import io
import os
import pickle
import random
import struct
import zipfile
from contextlib import suppress

import pytest
import torch

from fewbits.errors import FileError
from fewbits.files.open import open_checkpoint
from fewbits.files.torch_bin import read_torch, run_pickle
from fewbits.storage.safetensors import map_tensor
from tests.attacks.forge import allocates_below, write

PROTO = b"\x80\x02"
ORDERED = b"ccollections\nOrderedDict\n)R"


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(*values):
    return b"(" + b"".join(map(number, values)) + b"t"


def stored(key="0", kind="FloatStorage", count=6, module="torch"):
    return (
        b"("
        + text("storage")
        + f"c{module}\n{kind}\n".encode()
        + text(key)
        + text("cpu")
        + number(count)
        + b"tQ"
    )


def tensor(storage=None, offset=0, shape=(2, 3), strides=(3, 1)):
    shape = numbers(*shape) if isinstance(shape, tuple) else shape
    arguments = (storage or stored()) + number(offset) + shape + numbers(*strides) + b"\x89" + ORDERED
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def state(**tensors):
    return PROTO + b"}(" + b"".join(text(name) + body for name, body in tensors.items()) + b"u."


def archive(program, compress=zipfile.ZIP_STORED, **members):
    """A zip as torch writes it; members by key, with `_` for `/`."""
    members = {
        "data/0": struct.pack("<6f", *range(6)),
        **{k.replace("_", "/"): v for k, v in members.items()},
    }
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", compress) as file:
        for name, body in ({"data.pkl": program, "version": b"3\n"} | members).items():
            file.writestr(f"archive/{name}", body)
    return raw.getvalue()


GOOD = archive(state(a=tensor(), b=tensor(offset=3, shape=(3,), strides=(1,))))


def test_the_honest_twin_opens(tmp_path):
    """The lies differ from this by what they say they do."""
    path = write(tmp_path / "m.bin", GOOD)
    found = {name: map_tensor(path, entry) for name, entry in read_torch(path).items()}
    by_torch = torch.load(path, weights_only=True, mmap=True)
    assert found.keys() == by_torch.keys() and all(torch.equal(found[n], by_torch[n]) for n in found)
    assert torch.equal(found["a"], torch.arange(6.0).reshape(2, 3))


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PROGRAMS = {
    "a name": (PROTO + b"cposix\nsystem\n.", "'posix.system'"),
    "a name from the stack": (PROTO + text("builtins") + text("eval") + b"\x93.", "'builtins.eval'"),
    "a name of torch": (PROTO + b"ctorch\nload\n.", "'torch.load'"),
    "a dotted name": (PROTO + b"ctorch\nFloatStorage.__class__\n.", "'torch.FloatStorage.__class__'"),
    "a name that is no string": (PROTO + b"]]\x93.", "no string"),
    "a class in place": (PROTO + b"(iposix\nsystem\n.", "INST"),
    "bytes to allocate": (
        PROTO + b"cbuiltins\nbytearray\n" + number(3 * 2**30) + b"\x85R.",
        "'builtins.bytearray'",
    ),
    "an object": (PROTO + b"(cposix\nsystem\no.", "'posix.system'"),
    "a new object": (PROTO + b"ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
    "an extension": (PROTO + b"\x82\x01.", "EXT1"),
    "a persistent text": (PROTO + b"Pmodule\n.", "PERSID"),
    "bytes": (PROTO + b"U\x01a.", "SHORT_BINSTRING"),
    "a storage called": (PROTO + b"ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
    "an ordered table of": (PROTO + b"ccollections\nOrderedDict\n]\x85R.", "calls collections.OrderedDict"),
    "a list called": (PROTO + b"])R.", "calls a list"),
    "attributes": (PROTO + b"}}" + text("__class__") + b"Nsb.", "sets attributes"),
    "attributes of a list": (PROTO + b"]}b.", "adds items to a list"),
    "another reference": (PROTO + text("x") + b"Q.", "no storage"),
    "a storage of another type": (
        state(a=tensor(stored(kind="OrderedDict", module="collections"))),
        "known type",
    ),
    "a storage of no size": (state(a=tensor(stored(count=-1))), "known type and size"),
    "an empty stack": (PROTO + b".", "more from its stack"),
    "under the mark": (PROTO + b"N(R.", "more from its stack"),
    "no mark": (PROTO + b"t.", "no mark"),
    "nothing to recall": (PROTO + b"h\x05.", "recalls value 5"),
    "half an item": (PROTO + b"}(" + text("a") + b"u.", "keys"),
    "a key that is a number": (PROTO + b"}K\x01Ns.", "keys"),
    "a long number": (PROTO + b"\x8a\xff" + b"\x7f" * 255 + b".", "64 bits"),
    "no end": (PROTO + b"}", "STOP"),
    "an unknown byte": (PROTO + b"\xff.", "unknown"),
    "cut text": (PROTO + b"X\xff\xff\xff\x7fab.", "expected"),
    "no table": (PROTO + b"].", "holds a list"),
    "a table that holds itself": (PROTO + b"}q\x00(" + text("a") + b"h\x00u.", "'a' is a dict"),
    "a list that holds itself": (state(a=b"]q\x00h\x00a"), "'a' is a list"),
    "sizes that hold themselves": (state(a=tensor(shape=b"]q\x00h\x00a\x85")), "no numbers"),
    "a word": (state(a=text("x")), "'a' is a str"),
    "sizes below nothing": (state(a=tensor(shape=(-2, -3))), "no numbers"),
    "a size that is true": (state(a=tensor(shape=b"\x88\x88\x86")), "no numbers"),
    "65 sizes": (state(a=tensor(shape=(1,) * 65, strides=(1,) * 65)), "no numbers"),
    "more strides than sizes": (state(a=tensor(strides=(3, 1, 1))), "no numbers"),
    "huge sizes": (
        state(a=tensor(shape=(2**40, 2**20), strides=(2**20, 1))),
        "reaches past its storage of 6",
    ),
    "sizes that overflow": (state(a=tensor(shape=(2**62, 2**62), strides=(2**62, 1))), "reaches past"),
    "a stride of nothing": (state(a=tensor(strides=(0, 0))), "strides (0, 0)"),
    "columns first": (state(a=tensor(strides=(1, 2))), ".contiguous()"),
    "past the end": (state(a=tensor(offset=1)), "from number 1 on"),
    "a missing storage": (state(a=tensor(stored("7"))), "storage '7' is missing"),
    "a storage elsewhere": (state(a=tensor(stored("../data.pkl"))), "is missing"),
    "a storage too short": (state(a=tensor(stored(count=7))), "is 24 bytes, 7 numbers of F32 are 28"),
    "a storage too long": (
        state(a=tensor(stored(count=5), shape=(5,), strides=(1,))),
        "is 24 bytes, 5 numbers",
    ),
    "another width": (state(a=tensor(stored(kind="DoubleStorage"))), "is 24 bytes, 6 numbers of F64 are 48"),
}


@pytest.mark.parametrize("lie", PROGRAMS)
def test_a_program_that_no_state_dict_is(tmp_path, lie):
    program, says = PROGRAMS[lie]
    path = write(tmp_path / "pytorch_model.bin", archive(program))
    with pytest.raises(FileError) as caught:
        read_torch(path)
    assert str(path) in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.system, os.mkdir, exec, getattr, torch.load])
def test_nothing_is_run(tmp_path, protocol, function):
    made = tmp_path / "made"
    said = {os.system: f"mkdir {made}", exec: f"import os; os.mkdir({str(made)!r})"}.get(function, str(made))
    program = pickle.dumps({"a": Runs(function, said)}, protocol)
    write(tmp_path / "config.json", b"{}")
    write(tmp_path / "pytorch_model.bin", archive(program))
    with pytest.raises(FileError, match=r"its pickle (names|has the instruction)"):
        open_checkpoint(tmp_path)
    assert not made.exists()


def test_all_faults_are_told_at_once(tmp_path):
    path = write(tmp_path / "m.bin", archive(state(x=tensor(offset=9), y=text("y"), z=tensor(stored("3")))))
    with pytest.raises(FileError, match=r"'x'[\s\S]*'y'[\s\S]*'z'"):
        read_torch(path)


def test_what_is_claimed_is_never_allocated(tmp_path):
    claims = state(a=tensor(stored(count=2**60), shape=(2**60,), strides=(1,)))
    path = write(tmp_path / "m.bin", archive(claims))
    with allocates_below(2**20), pytest.raises(FileError, match="is 24 bytes"):
        read_torch(path)


def central(raw, name, **changes):
    """Change fields of a member's row in the zip's directory."""
    fields = {
        "flags": (8, "<H"),
        "method": (10, "<H"),
        "packed": (20, "<I"),
        "size": (24, "<I"),
        "at": (42, "<I"),
    }
    row = raw.rindex(name.encode()) - 46
    assert raw[row : row + 4] == b"PK\1\2"
    data = bytearray(raw)
    for field, value in changes.items():
        struct.pack_into(fields[field][1], data, row + fields[field][0], value)
    return bytes(data)


DATA, PICKLE = "archive/data/0", "archive/data.pkl"
ZIPS = {
    "nothing": (b"", "no zip"),
    "before torch 1.6": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
    "a script": (b"#!/bin/sh\ntouch x", "no zip"),
    "compressed": (archive(state(a=tensor()), zipfile.ZIP_DEFLATED), "is compressed"),
    "compressed, says the directory": (central(GOOD, DATA, method=8), "is compressed"),
    "encrypted": (central(GOOD, DATA, flags=1), "encrypted"),
    "longer than it is": (central(GOOD, DATA, size=25), "25 bytes"),
    "past the end": (central(GOOD, DATA, size=2**31, packed=2**31), "2147483648 bytes"),
    "over another": (central(GOOD, PICKLE, size=400, packed=400), "overlaps"),
    "the same bytes": (central(GOOD, DATA, at=0), "overlaps"),
    "elsewhere": (central(GOOD, DATA, at=7), "is not where the directory says"),
    "far elsewhere": (central(GOOD, DATA, at=2**32 - 2), "is not where the directory says"),
    "no pickle": (archive(b"").replace(b"data.pkl", b"date.pkl"), "no data.pkl"),
    "other byte order": (archive(state(a=tensor()), byteorder=b"big"), "byte order"),
    "no directory": (GOOD[:-22], "not a whole zip"),
}


@pytest.mark.parametrize("lie", ZIPS)
def test_an_archive_that_torch_never_wrote(tmp_path, lie):
    data, says = ZIPS[lie]
    path = write(tmp_path / "m.bin", data)
    with pytest.raises(FileError) as caught:
        read_torch(path)
    assert str(path) in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("lie", ["compressed", "the same bytes", "other byte order", "another width"])
def test_torch_s_own_reader_takes_wrong_bytes_for_weights(tmp_path, lie):
    """Why it is not used: no error, other numbers. Where this fails, torch has mended it: look again."""
    data = ZIPS[lie][0] if lie in ZIPS else archive(PROGRAMS[lie][0])
    path = write(tmp_path / "m.bin", data)
    found = torch.load(path, weights_only=True, mmap=True)["a"]
    assert found.shape == (2, 3) and not torch.equal(found.float(), torch.arange(6.0).reshape(2, 3))
    with pytest.raises(FileError):
        read_torch(path)


def test_a_pickle_that_unpacks_to_much_is_not_unpacked(tmp_path):
    path = write(tmp_path / "m.bin", archive(PROTO + bytes(2**28), zipfile.ZIP_DEFLATED))
    with allocates_below(2**20), pytest.raises(FileError, match="is compressed"):
        read_torch(path)


def test_a_member_that_stands_there_twice(tmp_path):
    raw = archive(state(a=tensor()), data_1=bytes(24)).replace(b"archive/data/1", b"archive/data/0")
    with pytest.raises(FileError, match="appears twice"):
        read_torch(write(tmp_path / "m.bin", raw))


@pytest.mark.parametrize("keep", range(0, len(GOOD), 23))
def test_truncated_anywhere(tmp_path, keep):
    with pytest.raises(FileError):
        read_torch(write(tmp_path / "m.bin", GOOD[:keep]))


def test_bytes_changed_at_random_open_within_the_file_or_are_refused(tmp_path):
    """No other error, and no byte outside."""
    chance, opened = random.Random(0), 0
    for _ in range(500):
        data = bytearray(GOOD)
        for _ in range(chance.choice((1, 1, 2, 8))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path = write(tmp_path / "m.bin", bytes(data))
        try:
            entries = read_torch(path)
        except FileError:
            continue
        opened += 1
        assert all(
            entry.offset > 0 and entry.offset + entry.nbytes <= len(data) for entry in entries.values()
        )
    assert opened > 20


def test_programs_changed_at_random_are_values_or_value_errors():
    program, chance = state(a=tensor(), b=tensor()), random.Random(1)
    for _ in range(3000):
        data = bytearray(program)
        for _ in range(chance.choice((1, 2, 5))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with suppress(ValueError):
            run_pickle(bytes(data))
