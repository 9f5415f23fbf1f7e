"""The optional C++ core.

`fewbits._core` has the same arithmetic as the reference in plain torch, compiled for each instruction set and
selected at run time (csrc/dispatch.cc). Without it everything works, but tens of times slower, with a warning
at the first use. FEWBITS_CORE=0 disables it, FEWBITS_CORE=FILE loads another build,
FEWBITS_ISA=portable|avx2|avx512 limits the instruction set.

Every address that C++ gets comes from `_address`: a contiguous tensor of the expected type and size in
this process's memory, or a KernelError that describes the argument.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from ..errors import KernelError
from ..lazy import torch

ISAS = ("portable", "avx2", "avx512")

# Types whose codes are points of a lattice: levels `(L,)` f32, points `(P, dim)` as indices of levels, and
# where the search for a scale starts, `(s,)` f32. formats/iq.py adds them; `load` gives them to the core.
LATTICES: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}


@cache
def dtypes() -> dict[torch.dtype, int]:
    """The types of weights that the core reads, and their numbers there."""
    return {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@cache
def load() -> ModuleType | None:
    build = os.environ.get("FEWBITS_CORE", "")
    if build == "0":
        return None
    cap = os.environ.get("FEWBITS_ISA", "")
    if cap not in ("", *ISAS):
        raise KernelError(f"FEWBITS_ISA={cap} is no instruction set; it may be {', '.join(ISAS)}")
    try:
        core = import_file(build) if build else importlib.import_module("fewbits._core")
    except ImportError as error:
        warnings.warn(
            f"fewbits works without its C++ core, tens of times slower: {error}. It was not built when "
            "fewbits was installed; install again with GCC or Clang (C++17) and see the output of pip -v",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    for name, table in LATTICES.items():
        register_table(core, name, *table())
    return core


def import_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fewbits._core", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"FEWBITS_CORE={path} is no compiled module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def register_table(
    module: ModuleType, name: str, levels: torch.Tensor, points: torch.Tensor, starts: torch.Tensor
) -> None:
    digits = points.to(torch.uint8).contiguous()
    module.register_table(
        name,
        (_address("levels", levels, torch.float32), len(levels)),
        (_address("points", digits, torch.uint8), *digits.shape),
        (_address("starts", starts, torch.float32), len(starts)),
    )


def available() -> bool:
    return load() is not None


def takes(*tensors: torch.Tensor | None) -> bool:
    """Whether the core is available and supports these tensors: not on another device or meta."""
    return all(part is None or part.device.type == "cpu" for part in tensors) and available()


def isa() -> str:
    """The instruction set in use: avx512, avx2, portable, or torch without the core."""
    module = load()
    return "torch" if module is None else module.isa()


_threads: ContextVar[int | None] = ContextVar("threads", default=None)


def threads() -> int:
    """The number of threads of the core: torch's number, also while torch is limited to one."""
    return _threads.get() or torch.get_num_threads()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Within, torch uses one thread: waking others costs more than small operations."""
    outside, given = torch.get_num_threads(), _threads.set(threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(outside)
        _threads.reset(given)


def encode(
    name: str, w: torch.Tensor, importance: torch.Tensor | None, search: bool, blocks: torch.Tensor
) -> int:
    """`(n, k)` f32/f16/bf16 -> the blocks of GGML type `name`, written to `blocks`.

    importance: `(k,)` or `(n, k)` f32. -> 0, or the number of parts with a weight that is NaN,
    infinite or beyond 2^56; then `blocks` is undefined. All contiguous and on the CPU, else KernelError.
    """
    return _module().encode(
        name,
        _address("weights", w, *dtypes()),
        dtypes()[w.dtype],
        w.numel(),
        _address("importances", importance, torch.float32),
        0 if importance is None else importance.numel(),
        search,
        _address("blocks", blocks, torch.uint8),
        blocks.nbytes,
        threads(),
    )


def measure(name: str, w: torch.Tensor, blocks: torch.Tensor) -> tuple[float, float, float]:
    """`(n, k)` and its blocks -> sum of squared errors, sum of squares, largest error."""
    return _module().measure(
        name,
        _address("weights", w, *dtypes()),
        dtypes()[w.dtype],
        w.numel(),
        _address("blocks", blocks, torch.uint8),
        blocks.nbytes,
        threads(),
    )


def decode(name: str, blocks: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The blocks of GGML type `name` -> `(n, k)` f32."""
    source = _address("blocks", blocks, torch.uint8)
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    _module().decode(name, source, blocks.nbytes, out.data_ptr(), out.numel(), threads())
    return out


def _module() -> ModuleType:
    module = load()
    if module is None:
        raise KernelError("the C++ core is not available; use the reference in plain torch")
    return module


def _address(
    what: str,
    part: torch.Tensor | None,
    *wanted: torch.dtype,
    shape: tuple[int, ...] | None = None,
) -> int:
    """The address of the entries of a contiguous CPU tensor, 0 for none. The only source of the core's
    addresses.

    KernelError for another device, dtype, layout or (where `shape` is given) shape.
    """
    if part is None:
        return 0
    # Other subclasses of Tensor may have memory elsewhere, or none.
    fits = type(part) in (torch.Tensor, torch.nn.Parameter) and part.device.type == "cpu"
    fits = fits and part.layout == torch.strided and part.is_contiguous()
    fits = fits and part.dtype in wanted and shape in (None, part.shape)
    if not fits:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
        strides = part.stride() if part.layout == torch.strided else part.layout
        raise KernelError(
            f"the core takes {what} as a contiguous {names} tensor{'' if shape is None else f' {shape}'} on "
            f"the CPU, not {type(part).__name__} {part.dtype} {tuple(part.shape)} with strides {strides} on "
            f"{part.device}"
        )
    there = part.untyped_storage().nbytes() // part.itemsize - part.storage_offset()
    if there < part.numel():
        raise KernelError(f"{what}: {part.numel()} entries in a storage of {there}: its memory was freed")
    return part.data_ptr()


@dataclass(frozen=True)
class Rounding:
    """The rounding of a grid as data for the core: `(groups, n)` each, and `group (k,)` int64, the
    row of them that a column has; for a GPU's kernel `(e, k)`, if each e-th of the n rows has other columns.
    A table (levels, boundaries between them, codes; all f32) or, without one, integers in [0, top] about
    zero."""

    group: torch.Tensor
    scale: torch.Tensor
    inverse: torch.Tensor
    offset: torch.Tensor | None = None
    zero: torch.Tensor | int = 0
    top: int = 0
    table: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def addresses(self, k: int, n: int) -> tuple[tuple[Any, ...], tuple[int, ...], int]:
        """-> scale, inverse, offset, zeros, zero, top; the table; and the groups of k columns of n rows."""
        shape = self.scale.shape[0], n
        zeros = self.zero if isinstance(self.zero, torch.Tensor) else None
        parts = {"scales": self.scale, "inverse scales": self.inverse, "offsets": self.offset, "zeros": zeros}
        affine = [_address(name, part, torch.float32, shape=shape) for name, part in parts.items()]
        group = _address("groups", self.group, torch.int64, shape=(k,))
        if k and not 0 <= int(self.group.min()) <= int(self.group.max()) < shape[0]:
            raise KernelError(f"a column is of a group that is not one of {shape[0]}")
        levels, boundaries, codes = self.table or (None, None, None)
        count = 0 if levels is None else len(levels)
        table = (
            _address("boundaries", boundaries, torch.float32, shape=(count - 1,)),
            _address("levels", levels, torch.float32, shape=(count,)),
            _address("codes of levels", codes, torch.float32, shape=(count,)),
        )
        zero = 0.0 if isinstance(self.zero, torch.Tensor) else float(self.zero)
        return (*affine, zero, self.top), (count, *table), group


def quantize_columns(
    state: torch.Tensor,
    coupling: torch.Tensor,
    rounding: Rounding,
    pivot: torch.Tensor | None,
    old: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """state `(k, n)`, coupling `(k, k)` -> codes u8, values and moves `(k, n)`: see csrc/columns.h.

    pivot `(k,)`: moves are (state - value) / pivot; else from old `(k, n)`, value - old.
    """
    if state.ndim != 2 or (pivot is None) == (old is None):
        raise KernelError("the core takes a state (k, n), and either pivots or old values")
    k, n = state.shape
    affine, table, group = rounding.addresses(k, n)
    given = (
        _address("the state", state, torch.float32),
        _address("the coupling", coupling, torch.float32, shape=(k, k)),
        _address("pivots", pivot, torch.float32, shape=(k,)),
        _address("old values", old, torch.float32, shape=(k, n)),
        group,
    )
    codes = torch.empty(k, n, dtype=torch.uint8, device="cpu")
    values, moves = torch.empty(2, k, n, dtype=torch.float32, device="cpu")
    written = codes.data_ptr(), values.data_ptr(), moves.data_ptr()
    _module().quantize_columns((k, n), given, affine, table, written, threads())
    return codes, values, moves


def rans_encode(
    symbols: torch.Tensor, frequency: torch.Tensor, classes: torch.Tensor | None = None
) -> torch.Tensor:
    """Bytes `(n,)` u8 -> their rANS stream, u8: see csrc/rans.h.

    frequency: i16, `(256,)` of sum 2^12, or `(t, 256)` where classes `(n,)` u8 has the table of each byte.
    KernelError for a symbol that has no frequency."""
    out = torch.empty(2 * symbols.numel() + 256, dtype=torch.uint8, device="cpu")
    given = _address("symbols", symbols, torch.uint8)
    tables = _tables(frequency, torch.int16, classes, symbols.numel())
    count = _module().rans_encode(given, symbols.numel(), tables, out.data_ptr(), out.numel())
    if count < 0:
        raise KernelError("rANS: a symbol has no frequency, or they do not sum to 4096")
    return out[:count].clone()


def rans_decode(
    stream: torch.Tensor, frequency: torch.Tensor, out: torch.Tensor, classes: torch.Tensor | None = None
) -> bool:
    """A rANS stream u8 -> does it hold exactly as many bytes as `out` `(n,)` u8? They are written there."""
    given, found = _address("a stream", stream, torch.uint8), _address("bytes", out, torch.uint8)
    tables = _tables(frequency, torch.int16, classes, out.numel())
    return bool(_module().rans_decode(given, stream.numel(), tables, found, out.numel()))


def huffman_decode(
    piece: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor, classes: torch.Tensor | None = None
) -> bool:
    """The same of a piece of Huffman codes (csrc/huffman.h), whose tables are lengths, u8."""
    given, found = _address("a piece", piece, torch.uint8), _address("bytes", out, torch.uint8)
    tables = _tables(lengths, torch.uint8, classes, out.numel())
    return bool(_module().huffman_decode(given, piece.numel(), tables, found, out.numel()))


def _tables(
    table: torch.Tensor, dtype: torch.dtype, classes: torch.Tensor | None, count: int
) -> tuple[int, int, int]:
    tables = table.numel() // 256
    shape = (256,) if classes is None else (tables, 256)
    address = _address("a coder's table", table, dtype, shape=shape)
    return address, tables, _address("classes", classes, torch.uint8, shape=(count,))
