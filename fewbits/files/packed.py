"""Packs and unpacks model files and directories; packing/ has the coding.

A packed directory is the same directory with NAME.packed.safetensors in the place of each weight file NAME,
and is opened like it. Everything else in it is copied.
"""

from __future__ import annotations

import shutil
import tempfile
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
    _check_source(source)
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
    _check_source(source)
    work = partial(_unpack_file, overwrite=overwrite, progress=progress)
    if not source.is_dir():
        return work(source, out)
    out = out or source.with_name(f"{source.resolve().name.removesuffix('-packed')}-unpacked")
    _check_directory(source, out, overwrite)
    return _directory(source, out, is_packed, lambda name: name.removesuffix(SUFFIX), work)


def _check_source(source: Path) -> None:
    if not source.exists():
        raise FileError(f"{source}: no such file or directory")


def _check_directory(source: Path, out: Path, overwrite: bool) -> None:
    if out.resolve().is_relative_to(source.resolve()):
        raise FileError(f"{out}: is in the input itself; choose another output")
    if out.exists() and not out.is_dir():
        raise FileError(f"{out}: is a file; a directory is packed into a directory, and unpacked into one")
    if not overwrite and out.exists() and any(out.iterdir()):
        raise FileError(f"{out}: exists; choose another output or pass --overwrite")


def _directory(
    source: Path,
    out: Path,
    chooses: Callable[[Path], bool],
    named: Callable[[str], str],
    work: Callable[[Path, Path], Path],
) -> Path:
    """Each weight file of a directory, and of folders in it, that is chosen, worked on; all others copied.
    Made beside `out` and moved there at the end; weight files that were in `out` go."""
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    places: dict[Path, tuple[Path, bool]] = {}
    for path in files:
        chosen = path.suffix in WEIGHTS and chooses(path)
        place = path.relative_to(source)
        place = place.with_name(named(path.name)) if chosen else place
        if place in places:
            raise FileError(
                f"{source}: {path.name} and {places[place][0].name} hold the same file; move one away"
            )
        places[place] = path, chosen
    if not any(chosen for _, chosen in places.values()):
        raise FileError(f"{source}: has no weight file in it that can be packed, or unpacked")
    make_directory(out.resolve().parent)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.resolve().parent))
    try:
        for place, (path, chosen) in places.items():
            make_directory((made / place).parent)
            if chosen:
                work(path, made / place)
            else:
                shutil.copyfile(path, made / place)
        for place in places:
            make_directory((out / place).parent)
            (made / place).replace(out / place)
        for old in [*out.rglob("*")]:
            if old.is_file() and old.suffix in WEIGHTS and old.relative_to(out) not in places:
                old.unlink()
    finally:
        shutil.rmtree(made, ignore_errors=True)
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
    if source.suffix != ".safetensors":
        raise FileError(f"{source}: is not packed; `fewbits pack` writes files whose names end in {SUFFIX}")

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
