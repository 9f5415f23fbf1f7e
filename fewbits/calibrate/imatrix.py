"""llama.cpp's importance matrices: mean x^2 of the input of each weight, in its two file types.

GGUF, since July 2025: sums and counts, so that two files can be added

    general.type = "imatrix"   imatrix.datasets [text]   imatrix.chunk_count   imatrix.chunk_size (tokens)
    blk.3.attn_q.weight.in_sum2       (k,)     f32  sum x^2        .counts  (1,)     f32  tokens
    blk.3.ffn_up_exps.weight.in_sum2  (e, k)   f32  for each expert .counts  (e, 1)   f32  0: no token

.dat, before: little endian, no magic number

    i32 entries | entries x ( i32 length, name | i32 chunks | i32 values | f32 mean x^2 * chunks ... )
    | i32 chunks | i32 length, name of the text          both may be missing

An expert without tokens is stored in a .dat file as ones. Neither file has max |x| or Hessians. Permuted rows
(rotary order) and norms stored minus 1 do not affect columns, so nothing is permuted.
Facts: llama.cpp, tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGUFType, Keys

from ..errors import CalibrationError, FileError, raise_all
from ..files.checkpoint import Checkpoint
from ..files.gguf.file import GGUFTensor, GGUFValue, GGUFValueType, gguf_header, map_gguf_tensor, read_gguf
from ..model.archs import architecture, gguf_entries, own_entries, require_architecture
from ..model.sites import sites
from ..storage.atomic import write_atomic
from ..storage.cache import file_digest
from ..storage.json import regular_size
from ..storage.mapped import first_bytes
from .statistics import Statistics, gather, identify
from .stats import Stats
from .store import load_statistics

CHUNK = 512  # tokens: the default context of llama-imatrix; a .dat file does not record its own
_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 1024  # bytes; ggml's own limit for a tensor is 64


@dataclass
class _Matrix:
    """A file's content: means, one row an expert (one row for a dense weight), and the tokens of each row."""

    means: dict[str, torch.Tensor] = field(default_factory=dict)  # GGUF name -> (rows * k,)
    counts: dict[str, torch.Tensor] = field(default_factory=dict)  # (rows,), or (1,) for all
    datasets: list[str] = field(default_factory=list)
    tokens: int = 0
    faults: list[str] = field(default_factory=list)


def open_statistics(path: Path, checkpoint: Checkpoint) -> Statistics:
    """Statistics of this checkpoint in any supported file: our own, GGUF imatrix, or .dat; recognized by
    content."""
    path = Path(path)
    ours = first_bytes(path, 9)[8:] == b"{"  # a .dat file has the first letter of a tensor's name there
    statistics = load_statistics(path, checkpoint) if ours else read_imatrix(path, checkpoint)
    return replace(statistics, digest=file_digest(path))


def read_imatrix(path: Path, checkpoint: Checkpoint, chunk: int = CHUNK) -> Statistics:
    """An importance matrix, GGUF or .dat -> Statistics of the checkpoint's sites with mean_square only.

    chunk: tokens of a chunk, for a .dat file, which counts chunks. Sites of blocks that the file does not
    have, and experts without tokens, are `unseen`. FileError and CalibrationError list every fault:
    truncated, names or columns of another model, values that are not finite or negative, wrong counts.
    """
    path = Path(path)
    is_gguf = first_bytes(path, 4) == b"GGUF"
    try:
        matrix = _read_gguf(path) if is_gguf else _read_dat(path, chunk)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    raise_all(FileError, str(path), matrix.faults)
    names = _gguf_names(checkpoint)
    model = identify(checkpoint)
    faults = [f"{name!r} is not a weight of {model}" for name in matrix.means if name not in names]
    columns = {site.name: site.shape[1] for site in sites(checkpoint)}
    statistics: dict[str, Stats] = {}
    for name, means in matrix.means.items():
        if name in names:
            statistics |= _rows(name, names[name], columns, means, matrix.counts[name], faults)
    raise_all(CalibrationError, f"{path}: importance matrix of another model, or damaged", faults)
    missing = {s.name for s in sites(checkpoint) if s.block is not None} - set(statistics)
    notes = [f"importance matrix {path.name}: no max |x|, no Hessians"]
    if missing:
        notes.append(f"{path.name} has no entry for {len(missing)} weights: {', '.join(sorted(missing)[:4])}"
                     + (" ..." if len(missing) > 4 else ""))  # fmt: skip
    if not is_gguf:
        notes.append(
            f"{path.name} counts chunks, taken as {chunk} tokens each; an expert's count is an upper bound"
        )
    source = ", ".join(matrix.datasets) or path.name
    shared = _share({site.name: site.group for site in sites(checkpoint)}, statistics)
    return gather(model, source, matrix.tokens, shared, missing, notes)


def _gguf_names(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """GGUF name -> its sites in the checkpoint, in order of their expert."""
    arch = architecture(checkpoint.config)
    if arch is None and checkpoint.gguf_keys:  # an unknown architecture keeps its GGUF names
        return {e.name: e.sources for e in own_entries(site.name for site in sites(checkpoint))}
    arch = arch or require_architecture(checkpoint.config)
    known = {site.name for site in sites(checkpoint)}
    entries = gguf_entries(arch, checkpoint.config, checkpoint.tensors)
    return {e.name: e.sources for e in entries if e.sources and known.issuperset(e.sources)}


def _rows(
    name: str,
    names: tuple[str, ...],
    columns: Mapping[str, int],
    means: torch.Tensor,
    counts: torch.Tensor,
    faults: list[str],
) -> dict[str, Stats]:
    """One entry -> site name -> Stats; mismatches are appended to `faults`."""
    k = columns[names[0]]
    if means.numel() != len(names) * k:
        shape = f"{len(names)} x {k}" if len(names) > 1 else str(k)
        faults.append(f"{name!r} has {means.numel()} values, the weight needs {shape}")
        return {}
    if counts.numel() not in (1, len(names)):
        faults.append(f"{name!r} has {counts.numel()} counts, the weight has {len(names)} experts")
        return {}
    rows = means.view(len(names), k)
    if counts.numel() < len(names):  # one for all, as in .dat files
        counts = counts * (rows != 1).any(1)
    return {site: Stats(int(counts[e]), None, rows[e]) for e, site in enumerate(names)}


def _share(groups: Mapping[str, str], statistics: Mapping[str, Stats]) -> dict[str, Stats]:
    """The same, but sites of a group whose values agree have one object."""
    first: dict[str, Stats] = {}
    shared = {}
    for site, stats in statistics.items():
        other = first.setdefault(groups[site], stats)
        same = other.count == stats.count and torch.equal(other.mean_square, stats.mean_square)
        shared[site] = other if same else stats
    return shared


# ---- reading -------------------------------------------------------------------------------------


def _read_gguf(path: Path) -> _Matrix:
    file = read_gguf(path)
    keys, matrix = file.metadata, _Matrix()
    if keys.get(Keys.General.TYPE) != GGUFType.IMATRIX:
        kind = str(keys.get(Keys.General.TYPE))[:40]
        raise FileError(
            f"{path}: {Keys.General.TYPE} is {kind!r}, an importance matrix has {GGUFType.IMATRIX!r}; "
            "is this a model?"
        )
    for key in (Keys.IMatrix.CHUNK_COUNT, Keys.IMatrix.CHUNK_SIZE):
        if type(keys.get(key)) is not int or keys[key] < 0:
            matrix.faults.append(f"{key} is {str(keys.get(key))[:40]}, not a count")
    datasets = keys.get(Keys.IMatrix.DATASETS, [])
    if not isinstance(datasets, list) or not all(isinstance(text, str) for text in datasets):
        matrix.faults.append(f"{Keys.IMatrix.DATASETS} is {str(datasets)[:40]}, not a list of names")
    else:
        matrix.datasets = datasets
    names = dict.fromkeys(name.removesuffix(_SUMS).removesuffix(_COUNTS) for name in file.tensors)
    if not names:
        matrix.faults.append("it has no entries")
    for name in names:
        sums, counts = file.tensors.get(name + _SUMS), file.tensors.get(name + _COUNTS)
        if sums is None or counts is None:
            lost = _SUMS if sums is None else _COUNTS
            matrix.faults.append(f"{name!r} has no tensor {name + lost!r}")
        else:
            _add_sums(matrix, name, sums, counts)
    if not matrix.faults:
        matrix.tokens = keys[Keys.IMatrix.CHUNK_COUNT] * keys[Keys.IMatrix.CHUNK_SIZE]
    return matrix


def _add_sums(matrix: _Matrix, name: str, sums: GGUFTensor, counts: GGUFTensor) -> None:
    """Sums and counts of one entry -> means; with faults."""
    if (sums.type_name, counts.type_name) != ("f32", "f32"):
        matrix.faults.append(
            f"{name!r} has {sums.type_name} sums and {counts.type_name} counts, both are f32"
        )
        return
    total, seen = map_gguf_tensor(sums).reshape(-1), map_gguf_tensor(counts).reshape(-1)
    if not seen.numel() or not total.numel() or total.numel() % seen.numel():
        matrix.faults.append(
            f"{name!r} has {total.numel()} sums for {seen.numel()} counts: not as many for each"
        )
        return
    if not bool((seen.isfinite() & (seen >= 0) & (seen == seen.round())).all()):
        matrix.faults.append(f"{name!r} has counts that are not counts: {seen.tolist()[:8]}")
        return
    _add(matrix, name, total.view(seen.numel(), -1) / seen.clamp(min=1)[:, None], seen)


def _add(matrix: _Matrix, name: str, means: torch.Tensor, counts: torch.Tensor) -> None:
    """Means `(rows, k)` and counts `(rows,)`, checked."""
    wrong, negative = int((~means.isfinite()).sum()), int((means < 0).sum())
    if wrong or negative:
        matrix.faults.append(
            f"{name!r} has {wrong} values that are not finite and {negative} that are negative"
        )
    unseen = means[counts == 0]
    if bool((unseen != 0).any()):
        matrix.faults.append(f"{name!r} has sums where its count is 0")
    matrix.means[name], matrix.counts[name] = means.reshape(-1), counts


class _Dat:
    """A position in a .dat file that never exceeds its end."""

    def __init__(self, path: Path, data: mmap.mmap | bytes):
        self.path, self.data, self.position = path, data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, nbytes: int, what: str) -> bytes:
        if not 0 <= nbytes <= self.left:
            raise FileError(
                f"{self.path}: {what} at byte {self.position} claims {nbytes} bytes, {self.left} are left; "
                "the file is truncated, or not an importance matrix"
            )
        self.position += nbytes
        return self.data[self.position - nbytes : self.position]

    def number(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])

    def text(self, what: str, longest: int) -> str:
        length = self.number(f"the length of {what}")
        if length > longest:
            raise FileError(
                f"{self.path}: {what} claims {length} bytes, {longest} is the most; not an importance matrix?"
            )
        return self.take(length, what).decode(errors="replace")


def _read_dat(path: Path, chunk: int) -> _Matrix:
    if regular_size(path) == 0:
        raise FileError(f"{path}: is empty, not an importance matrix")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse_dat(_Dat(path, data), chunk)


def _parse_dat(dat: _Dat, chunk: int) -> _Matrix:
    matrix = _Matrix()
    entries = dat.number("the number of entries")
    smallest = 3 * 4 + 4  # bytes of an entry: its three numbers and a value
    if not 0 < entries <= dat.left // smallest:
        raise FileError(
            f"{dat.path}: claims {entries} entries of at least {smallest} bytes, {dat.left} bytes are left; "
            "truncated, or not an importance matrix"
        )
    most = 0
    for index in range(entries):
        name = dat.text(f"the name of entry {index}", _LONGEST_NAME)
        chunks, values = dat.number(f"the chunks of {name!r}"), dat.number(f"the values of {name!r}")
        raw = dat.take(4 * values, f"the values of {name!r}")
        if chunks < 1 or values < 1 or name in matrix.means:
            fault = "appears twice" if name in matrix.means else f"has {values} values of {chunks} chunks"
            matrix.faults.append(f"{name!r} {fault}")
            continue
        means = torch.frombuffer(bytearray(raw), dtype=torch.float32) / chunks
        _add(matrix, name, means[None], torch.tensor([chunks * chunk]))
        most = max(most, chunks)
    if dat.left:
        most = dat.number("the number of chunks")
    if dat.left and (text := dat.text("the name of the text", dat.left)):
        matrix.datasets.append(text)
    if dat.left or most < 0:
        matrix.faults.append(f"{dat.left} bytes follow the last field, chunks are {most}")
    matrix.tokens = most * chunk
    return matrix


# ---- writing -------------------------------------------------------------------------------------


def write_imatrix(statistics: Statistics, checkpoint: Checkpoint, path: Path, chunk: int = CHUNK) -> None:
    """Statistics -> the file of `llama-quantize --imatrix`: .dat for that suffix, else GGUF.

    chunk: tokens of a chunk, the unit of llama.cpp. ModelError if GGUF does not know the architecture.
    """
    path = Path(path)
    rows = dict(sorted(_gguf_rows(statistics, checkpoint).items()))
    if not rows:
        raise CalibrationError(f"{path}: nothing was seen of any weight; calibrate first")
    chunks = max(1, math.ceil(statistics.tokens / chunk))
    pack = _pack_dat if path.suffix == ".dat" else _pack_gguf
    write_atomic(path, pack(rows, statistics.source, chunks, chunk))


def gguf_importance(statistics: Statistics, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """GGUF name -> `(experts * k,)` f32, the importance of columns for llama.cpp: ones for an unseen
    expert."""
    rows = _gguf_rows(statistics, checkpoint)
    return {
        name: torch.where(counts[:, None] > 0, means, 1.0).reshape(-1)
        for name, (means, counts) in rows.items()
    }


def _gguf_rows(
    statistics: Statistics, checkpoint: Checkpoint
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """GGUF name -> means `(rows, k)` f32 and counts `(rows,)` i64; zeros for an expert without tokens."""
    rows = {}
    for name, parts in _gguf_names(checkpoint).items():
        seen = [statistics.of(site, hessian=False) for site in parts]
        k = next((stats.columns for stats in seen if stats is not None), 0)
        if k:
            means = [torch.zeros(k) if stats is None else stats.mean_square.float().cpu() for stats in seen]
            counts = torch.tensor([0 if stats is None else stats.count for stats in seen])
            rows[name] = torch.stack(means), counts
    return rows


def _pack_gguf(
    rows: Mapping[str, tuple[torch.Tensor, torch.Tensor]], source: str, chunks: int, chunk: int
) -> bytes:
    u32, text = GGUFValueType.UINT32, GGUFValueType.STRING
    keys = {
        Keys.General.TYPE: GGUFValue(text, GGUFType.IMATRIX),
        Keys.IMatrix.DATASETS: GGUFValue(GGUFValueType.ARRAY, [source], text),
        Keys.IMatrix.CHUNK_COUNT: GGUFValue(u32, chunks),
        Keys.IMatrix.CHUNK_SIZE: GGUFValue(u32, chunk),
    }
    arrays: dict[str, torch.Tensor] = {}
    for name, (means, counts) in rows.items():
        dense = len(counts) == 1  # ggml drops a last dimension of 1
        sums = (means.double() * counts[:, None]).float()
        arrays[name + _SUMS] = sums[0] if dense else sums
        arrays[name + _COUNTS] = counts.float() if dense else counts.float()[:, None]
    header, offsets = gguf_header(keys, [(name, tuple(a.shape), "f32") for name, a in arrays.items()])
    parts, end = [header], len(header)
    for array, offset in zip(arrays.values(), offsets, strict=True):
        raw = _bytes(array)
        parts += [bytes(offset - end), raw]
        end = offset + len(raw)
    return b"".join([*parts, bytes(-end % 32)])


def _pack_dat(
    rows: Mapping[str, tuple[torch.Tensor, torch.Tensor]], source: str, chunks: int, chunk: int
) -> bytes:
    parts: list[bytes] = [struct.pack("<i", len(rows))]
    for name, (means, counts) in rows.items():
        calls = math.ceil(int(counts.max()) / chunk)
        scaled = torch.where(counts[:, None] > 0, means, 1.0) * calls
        raw = name.encode()
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", calls, scaled.numel()), _bytes(scaled)]
    raw = source.encode()
    return b"".join([*parts, struct.pack("<ii", chunks, len(raw)), raw])


def _bytes(array: Any) -> bytes:
    return bytes(array.contiguous().numpy().tobytes())
