"""Packs and unpacks model files and directories; packing/ has the coding.

A packed directory is the same directory with NAME.packed.safetensors in the place of each weight file NAME,
and is opened like it. Everything else in it is copied.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..errors import FileError
from ..packing import CODERS, Place, layout_of, pack, unpack
from ..storage.atomic import make_directory
from ..storage.packed import SUFFIX, is_packed
from ..storage.safetensors import Entry, read_header
from .gguf.parse import read_part

WEIGHTS = (".gguf", ".safetensors")
Progress = Callable[[str, int, int], None]


def pack_model(
    source: Path, out: Path | None = None, overwrite: bool = False, coder: str = "rans",
    progress: Progress | None = None,
) -> Path:  # fmt: skip
    """A .gguf or .safetensors file, or a directory of them -> packed, at `out` (default: beside it).

    FileError for another kind of file, one that is damaged, or an output that exists.
    """
    work = partial(_pack_file, coder=coder, overwrite=overwrite, progress=progress)
    if not source.is_dir():
        return work(source, out or source.with_name(source.name + SUFFIX))
    out = out or source.with_name(f"{source.resolve().name}-packed")
    _check_directory(source, out, overwrite)
    return _directory(source, out, lambda path: not is_packed(path), lambda name: name + SUFFIX, work)


def unpack_model(
    source: Path, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Path:
    """A packed file or directory -> what it was (default: under its name, beside it), checked by digests.

    FileError for a file that is not packed, or is cut or altered: then nothing is left of it.
    """
    work = partial(_unpack_file, overwrite=overwrite, progress=progress)
    if not source.is_dir():
        return work(source, out)
    out = out or source.with_name(f"{source.resolve().name.removesuffix('-packed')}-unpacked")
    _check_directory(source, out, overwrite)
    return _directory(source, out, is_packed, lambda name: name.removesuffix(SUFFIX), work)


def _check_directory(source: Path, out: Path, overwrite: bool) -> None:
    if out.resolve().is_relative_to(source.resolve()):
        raise FileError(f"{out}: is in the input itself; choose another output")
    if not overwrite and out.exists() and any(out.iterdir()):
        raise FileError(f"{out}: exists; choose another output or pass --overwrite")


def _directory(
    source: Path,
    out: Path,
    chooses: Callable[[Path], bool],
    named: Callable[[str], str],
    work: Callable[[Path, Path], Path],
) -> Path:
    """Each weight file of a directory, and of folders in it, that is chosen, worked on; all others copied."""
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    chosen = {path for path in files if path.suffix in WEIGHTS and chooses(path)}
    if not chosen:
        raise FileError(f"{source}: has no weight file in it that can be packed, or unpacked")
    for path in files:
        place = out / path.relative_to(source)
        make_directory(place.parent)
        if path in chosen:
            work(path, place.with_name(named(path.name)))
        else:
            shutil.copyfile(path, place)
    return out


def _pack_file(source: Path, out: Path, overwrite: bool, coder: str, progress: Progress | None) -> Path:
    if is_packed(source):
        raise FileError(f"{source}: is packed already")
    if not is_packed(out):
        raise FileError(f"{out}: the name of a packed file ends in {SUFFIX}, by which it is opened")
    _check_place(out, source, overwrite)
    pack(source, places_of(source), out, CODERS[coder], progress)
    return out


def _unpack_file(source: Path, out: Path | None, overwrite: bool, progress: Progress | None) -> Path:
    def place(name: str) -> Path:
        found = out or source.with_name(name)
        _check_place(found, source, overwrite)
        return found

    return unpack(source, place, progress)


def _check_place(out: Path, source: Path, overwrite: bool) -> None:
    if out.exists() and out.samefile(source):
        raise FileError(f"{out}: is the input itself; choose another output")
    if out.exists() and not overwrite:
        raise FileError(f"{out}: exists; choose another output or pass --overwrite")


def places_of(source: Path) -> list[Place]:
    """The tensors of a file, by offset."""
    if source.suffix == ".gguf":
        tensors = read_part(source).tensors.values()
        found = [Place(t.name, layout_of(t.type_name), t.offset, t.nbytes) for t in tensors]
    elif source.suffix == ".safetensors":
        found = [_place(entry) for entry in read_header(source).values()]
    else:
        raise FileError(f"{source}: only .gguf and .safetensors files are packed")
    return sorted(found, key=lambda place: place.offset)


def _place(entry: Entry) -> Place:
    columns = entry.shape[1] if entry.dtype in ("U8", "I8") and len(entry.shape) == 2 else 0
    layout, signed = layout_of(entry.dtype.lower()), entry.dtype == "I8"
    return Place(entry.name, layout, entry.offset, entry.nbytes, columns, signed)
