"""torch's pickled state dicts (`pytorch_model.bin`), read without executing anything.

    zip    archive/data.pkl      a pickle: {name: rebuild(storage "0", offset, sizes, strides)}
           archive/byteorder     "little" (absent in older files)
           archive/data/0 ...    the bytes of each storage, not compressed

A pickle is a program for a stack machine that may call any function. Here an interpreter supports only the
few instructions that a state dict needs. The only allowed names are

    collections.OrderedDict   torch._utils._rebuild_tensor_v2   torch.{Float, Half, BFloat16 ...}Storage

none of which is ever called: they are replaced by the tables below. The result is entries as in safetensors,
mapped when they are loaded. Spec: pickletools of Python's library for the instructions;
torch/serialization.py (2.13) for the archive, which torch writes since 1.6.

Comparison with torch.load(weights_only=True, mmap=True) of torch 2.13: it executes nothing either, and is as
lazy (a file of 2 GiB: opened in 5 ms, here in 2; peak with one tensor read: 610 MB, as here). But it accepts
22 of 118 forgeries in tests/attacks/test_hostile_torch.py, all refused here. From four it silently reads
wrong numbers: compressed members, overlapping members, another byte order, storages of another width. A zip
of 0.8 MB that unpacks to a pickle of 800 MB costs it 1.8 GB; a pickle that requests a bytearray of 3 GB gets
it.
"""

from __future__ import annotations

import io
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import FileError, raise_all
from ..storage.json import regular_size
from ..storage.mapped import absurd, first_bytes
from ..storage.safetensors import DTYPES, MAX_DIMS, Entry

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
PICKLE_LIMIT = 16 * 2**20  # bytes: about 130,000 tensors
MEMBER_LIMIT = 1_000_000
_LOCAL = struct.Struct("<4s5H3I2H")  # the header before each member's bytes


@dataclass(frozen=True)
class Member:
    """A file in the archive: its bytes are `offset : offset + nbytes` of the whole."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class Stored:
    """A tensor as the pickle describes it; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Name:
    """An allowed attribute of a module that the pickle names."""

    module: str
    attribute: str

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


ORDERED = Name("collections", "OrderedDict")
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
ALLOWED = {ORDERED, REBUILD, *(Name("torch", storage) for storage in STORAGES)}
_MARK = object()


class _Stack:
    """The pickle machine: values, marks and the memo. Only plain values, `Name`s and `Stored`s arise.

    Faults are ValueErrors, which `read_torch` tells with the file's name.
    """

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if not self.values or self.values[-1] is _MARK:
            raise ValueError("takes more from its stack than is there")
        return self.values.pop()

    def top(self, kind: type) -> Any:
        value = self.pop()
        self.values.append(value)
        if type(value) is not kind:
            raise ValueError(f"adds items to a {type(value).__name__}")
        return value

    def since_mark(self) -> list[Any]:
        for i in range(len(self.values) - 1, -1, -1):
            if self.values[i] is _MARK:
                values = self.values[i + 1 :]
                del self.values[i:]
                return values
        raise ValueError("has no mark to return to")

    def push_tuple(self, count: int) -> None:
        self.values.append(tuple(reversed([self.pop() for _ in range(count)])))

    def put(self, index: int) -> None:
        value = self.pop()
        self.values.append(value)
        self.memo[index] = value

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"recalls value {index}, which it never stored")
        self.values.append(self.memo[index])

    def set_items(self, items: list[Any]) -> None:
        table = self.top(dict)
        if len(items) % 2 or not all(type(key) is str for key in items[::2]):
            raise ValueError("has a table whose keys are not all strings")
        table.update(zip(items[::2], items[1::2], strict=True))

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def find(self, module: Any, attribute: Any) -> None:
        if type(module) is not str or type(attribute) is not str:
            raise ValueError("names something by a value that is no string")
        name = Name(module[:60], attribute[:60])
        if name not in ALLOWED:
            raise ValueError(
                f"names {str(name)!r}, which no state dict of plain tensors needs and which is not run here"
            )
        self.values.append(name)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if function == ORDERED and arguments == ():
            self.values.append({})
        elif function == REBUILD and type(arguments) is tuple:
            self.values.append(_rebuilt(arguments))
        else:
            what = str(function) if isinstance(function, Name) else f"a {type(function).__name__}"
            raise ValueError(f"calls {what} in a way that no state dict does")

    def build(self) -> None:
        """OrderedDict's attributes: `_metadata`, the versions of modules; ignored."""
        state = self.pop()
        self.top(dict)
        if type(state) is not dict or set(state) - {"_metadata"}:
            raise ValueError("sets attributes, which no state dict of plain tensors needs")

    def persistent(self) -> None:
        entry = self.pop()
        if type(entry) is not tuple or len(entry) != 5 or entry[0] != "storage" or type(entry[2]) is not str:
            raise ValueError("refers to external data that is no storage")
        _, kind, key, _, count = entry
        if not isinstance(kind, Name) or kind.attribute not in STORAGES or not _is_size(count):
            raise ValueError(f"has a storage {key[:20]!r} of no known type and size")
        self.values.append(Storage(key, STORAGES[kind.attribute], count))


def _plain(value: Any) -> Callable[[_Stack, Any], None]:
    return lambda stack, _: stack.values.append(value)


def _given(stack: _Stack, argument: Any) -> None:
    stack.values.append(argument)


_INSTRUCTIONS: dict[str, Callable[[_Stack, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda stack, argument: None),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"), _given),
    "BINFLOAT": _given,
    "NONE": _plain(None),
    "NEWTRUE": _plain(True),
    "NEWFALSE": _plain(False),
    "EMPTY_TUPLE": _plain(()),
    "EMPTY_DICT": lambda stack, _: stack.values.append({}),
    "EMPTY_LIST": lambda stack, _: stack.values.append([]),
    "MARK": lambda stack, _: stack.values.append(_MARK),
    "TUPLE": lambda stack, _: stack.values.append(tuple(stack.since_mark())),
    "TUPLE1": lambda stack, _: stack.push_tuple(1),
    "TUPLE2": lambda stack, _: stack.push_tuple(2),
    "TUPLE3": lambda stack, _: stack.push_tuple(3),
    "APPEND": lambda stack, _: stack.append([stack.pop()]),
    "APPENDS": lambda stack, _: stack.append(stack.since_mark()),
    "SETITEM": lambda stack, _: stack.set_items([stack.pop(), stack.pop()][::-1]),
    "SETITEMS": lambda stack, _: stack.set_items(stack.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda stack, index: stack.put(index)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda stack, index: stack.get(index)),
    "MEMOIZE": lambda stack, _: stack.put(len(stack.memo)),
    "GLOBAL": lambda stack, argument: stack.find(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda stack, _: stack.find(*[stack.pop(), stack.pop()][::-1]),
    "REDUCE": lambda stack, _: stack.reduce(),
    "BUILD": lambda stack, _: stack.build(),
    "BINPERSID": lambda stack, _: stack.persistent(),
}


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _sizes(value: Any) -> bool:
    return type(value) is tuple and len(value) <= MAX_DIMS and all(map(_is_size, value))


def _rebuilt(arguments: tuple[Any, ...]) -> Stored:
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], Storage):
        raise ValueError("rebuilds a tensor from a value that is no storage")
    storage, offset, shape, strides = arguments[:4]
    if not _is_size(offset) or not _sizes(shape) or not _sizes(strides) or len(shape) != len(strides):
        raise ValueError(
            f"rebuilds a tensor whose offset, sizes and strides are no numbers of storage {storage.key}"
        )
    return Stored(storage, offset, shape, strides)


def run_pickle(raw: bytes) -> Any:
    """The value that a pickle describes, of dicts, lists, tuples, plain values and `Stored`; calls nothing.

    Raises ValueError for an instruction or a name that no state dict needs, and for a broken program.
    """
    stack = _Stack()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a name with an unknown escape: refused later
        for opcode, argument, _ in pickletools.genops(io.BytesIO(raw)):
            if opcode.name == "STOP":
                return stack.pop()
            step = _INSTRUCTIONS.get(opcode.name)
            if step is None:
                raise ValueError(
                    f"has the instruction {opcode.name}, which no state dict of plain tensors needs"
                )
            if type(argument) is int and not -(2**63) <= argument < 2**63:
                raise ValueError("has a number of more than 64 bits")
            step(stack, argument)
    raise ValueError("has no end")


def read_torch(path: Path) -> dict[str, Entry]:
    """The tensors of a `.bin` file by name; every fault of its tensors in one FileError."""
    members, raw = _open(path)
    try:
        state = run_pickle(raw)
    except ValueError as error:
        raise FileError(
            f"{path}: its pickle {error}; if you trust the file, load the model with transformers and "
            "save it: save_pretrained(DIR) writes safetensors"
        ) from error
    if type(state) is not dict:
        raise FileError(f"{path}: its pickle holds a {type(state).__name__}, a state dict is needed")
    faults: list[str] = []
    entries = {
        name: entry for name, value in state.items() if (entry := _entry(name, value, members, faults))
    }
    raise_all(FileError, str(path), faults)
    return entries


def _entry(name: str, value: Any, members: dict[str, Member], faults: list[str]) -> Entry | None:
    """One tensor -> its bytes in the file; or None, and the fault in `faults`."""
    if not isinstance(value, Stored):
        faults.append(
            f"{name!r} is a {type(value).__name__}, no tensor; remove it, or save the model's state_dict"
        )
        return None
    storage, itemsize = value.storage, DTYPES[value.storage.dtype].itemsize
    member = members.get(f"data/{storage.key}")
    if member is None:
        faults.append(f"tensor {name!r}: storage {storage.key[:20]!r} is missing")
    elif member.nbytes != storage.count * itemsize:
        faults.append(
            f"tensor {name!r}: storage {storage.key[:20]!r} is {member.nbytes} bytes, {storage.count} "
            f"numbers of {storage.dtype} are {storage.count * itemsize}"
        )
    elif value.offset + prod(value.shape) > storage.count:
        faults.append(
            f"tensor {name!r}: {str(value.shape)[:60]} from number {value.offset} on reaches past its "
            f"storage of {storage.count}"
        )
    elif not prod(value.shape) and absurd(value.shape):
        faults.append(f"tensor {name!r} is empty, and {str(value.shape)[:60]}, which no tensor can have")
    elif prod(value.shape) and value.strides != contiguous(value.shape, value.strides):
        faults.append(
            f"tensor {name!r}: strides {str(value.strides)[:60]} of {str(value.shape)[:60]} are not those of "
            "numbers in a row; save it with .contiguous()"
        )
    else:
        offset = member.offset + value.offset * itemsize
        return Entry(name, storage.dtype, value.shape, offset, prod(value.shape) * itemsize)
    return None


def contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor; if a size is 1, its stride is unused and unchanged."""
    in_order, stride_here = [], 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        in_order.append(stride if size == 1 else stride_here)
        stride_here *= size
    return tuple(reversed(in_order))


def _open(path: Path) -> tuple[dict[str, Member], bytes]:
    """The members of the archive, by name without its folder, and the pickle; FileError for each fault."""
    size = regular_size(path)
    magic = first_bytes(path, 4)
    if magic != b"PK\3\4":
        raise FileError(
            f"{path}: begins {magic!r}, no zip: torch before 1.6 wrote so, or it is no file of torch's; load "
            "it with torch if you trust it, and save it again, best as safetensors"
        )
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            rows = archive.infolist()
            if len(rows) > MEMBER_LIMIT:
                raise FileError(f"{path}: {len(rows)} members, the limit is {MEMBER_LIMIT}; wrong file?")
            members, faults = _members(rows, file, min(archive.start_dir, size))
            raise_all(FileError, str(path), faults)
            order = members.get("byteorder")
            if order is not None and _read(file, order, 16) != b"little":
                raise FileError(f"{path}: its byte order is not little; save it on a common machine")
            if "data.pkl" not in members:
                raise FileError(f"{path}: has no data.pkl; it is not a state dict of torch")
            if members["data.pkl"].nbytes > PICKLE_LIMIT:
                raise FileError(
                    f"{path}: a pickle of {members['data.pkl'].nbytes} bytes, the limit is {PICKLE_LIMIT}; "
                    "wrong file?"
                )
            return members, _read(file, members["data.pkl"], PICKLE_LIMIT)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error) as error:
        raise FileError(f"{path}: not a whole zip ({str(error)[:80]}); fetch it again") from error


def _members(
    rows: list[zipfile.ZipInfo], file: io.BufferedReader, end: int
) -> tuple[dict[str, Member], list[str]]:
    """The place of each member, before `end` and without overlap; and the faults."""
    members: dict[str, Member] = {}
    faults, before, last = [], 0, ""
    for row in sorted(rows, key=lambda row: row.header_offset):
        name = row.filename
        file.seek(min(row.header_offset, end))
        raw = file.read(_LOCAL.size)
        if len(raw) < _LOCAL.size or not raw.startswith(b"PK\3\4"):
            faults.append(f"member {name[:60]!r}: its header is not where the directory says")
            continue
        head = _LOCAL.unpack(raw)
        begin = row.header_offset + _LOCAL.size + head[-2] + head[-1]
        key = name.partition("/")[2]
        if row.compress_type != zipfile.ZIP_STORED or head[3] != zipfile.ZIP_STORED or row.flag_bits & 1:
            faults.append(
                f"member {name[:60]!r}: is compressed or encrypted, torch writes neither; save it again"
            )
        elif row.file_size != row.compress_size or begin + row.file_size > end:
            faults.append(
                f"member {name[:60]!r}: {row.file_size} bytes from byte {begin} end past byte {end}; "
                "fetch it again"
            )
        elif row.header_offset < before:
            faults.append(f"member {name[:60]!r}: overlaps {last[:60]!r}")
        elif key in members:
            faults.append(f"member {name[:60]!r}: appears twice")
        else:
            members[key] = Member(begin, row.file_size)
        before, last = max(before, begin + row.file_size), name
    return members, faults


def _read(file: io.BufferedReader, member: Member, limit: int) -> bytes:
    file.seek(member.offset)
    return file.read(min(member.nbytes, limit))
