"""The engines that read a file type, and what runs inside an engine's own process.

    python run_<engine>.py MODEL TASK.json RESULT

    TASK      {"windows": [[ids], ...], "first": 0, "new": 8, "threads": 2, "imports": [modules],
               "texts": [to tokenize], "class": of transformers, where config.json does not name it,
               "stored": null, or the type that weights are to stay in, "device": of torch}
    RESULT    a folder: i.npy has window i's logits f32 (t - first, vocabulary), of the positions from `first`
              on; of a model that generates no text its rows: one of classes, or one a token. A file is whole
              when the next is there
    stdout    last line: {"engine": name, "version": ..., "new": the `new` greedy ids after each window,
              "seconds": that all windows took, "unexpected": tensors of the file that it leaves out,
              "tokens": {"texts": with a rendered chat, "ids": of each, "bos", "ends": ids, "template"}}
              The last two are said by engines that can.

A script imports nothing of fewbits and is run by its path, so an engine whose packages cannot share our
environment has its own. A new engine is a script here, whose ENGINES has a row of fields of `Engine`; file
types name it in `engines`. What only the engine needs is imported inside functions, so that we can read the
row.
A `parse_<engine>.py` only reads the config: its last line has {"read": ...} or {"refused": ...}.

Tolerances are mean KL divergences in nats, about twice the largest that was measured between the engine and
the decoded weights in f32: on the demo model in every format of docs/format_support.json, and on tiny models
(tests/engines). SUMS is for engines that compute in f32 too: their sums in another order made 1e-7 at most,
but the error grows with a model's width and depth.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path

from ..errors import PlanError
from ..files.checkpoint import Checkpoint
from ..storage.cache import cache_folder

SCRIPTS = Path(__file__).parent
SUMS = 1e-5


@dataclass(frozen=True)
class Engine:
    """packages: the distributions that must be installed. by_method: more of them, by the quant_method of
    config.json. install: how to get them. apart: names an environment of its own, by the variable
    FEWBITS_<APART> or the folder of the cache where `make` puts it. imports: modules for its process.
    mapped: it maps the file, where others hold every weight in f32; by_layer: or can hold them as they are
    stored, and compute a layer at a time in f32. lacks: formats of weights, by the start of their names, for
    which it has no kernel unless activations are quantized too. heads: it also runs models that generate no
    text. devices: it runs on a GPU too, in f32 as on the CPU.

    tolerance: of the KL divergence, above. wider: the same by the start of a format's or file type's name.
    """

    name: str
    script: str
    packages: tuple[str, ...]
    install: str
    apart: str | None = None
    imports: tuple[str, ...] = ()
    mapped: bool = False
    by_layer: bool = False
    lacks: tuple[str, ...] = ()
    heads: bool = False
    devices: bool = False
    tolerance: float = SUMS
    wider: Mapping[str, float] = field(default_factory=dict)
    by_method: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def parses(self) -> bool:
        """Does it read the config alone?"""
        return self.script.startswith("parse_")

    def needs(self, method: str | None = None) -> tuple[str, ...]:
        """The distributions, for files of a quant_method."""
        return self.packages + self.by_method.get(method or "", ())

    def interpreter(self, method: str | None = None) -> str | None:
        """The Python that has the packages; None if none has."""
        if self.apart is not None:
            named = os.environ.get(f"FEWBITS_{self.apart.upper().replace('-', '_')}")
            apart = Path(named or cache_folder() / self.apart / "bin" / "python")
            if apart.exists():
                return str(apart)
        return sys.executable if all(map(installed, self.needs(method))) else None

    def missing(self, method: str | None = None) -> str:
        """What to say where there is no interpreter."""
        return f"{' and '.join(self.needs(method))} is not installed ({self.install})"

    def refusal(self, checkpoint: Checkpoint) -> str | None:
        """Why it cannot run a checkpoint's formats, before it is started."""
        names = sorted({each.dtype for each in checkpoint.tensors.values() if each.quantized})
        lacking = [name for name in names if name.startswith(self.lacks)]
        if not self.lacks or not lacking or checkpoint.metadata.get("activations"):
            return None
        return f"{self.name} has no kernel for weights in {', '.join(lacking)} with activations in float"

    def tolerance_for(self, names: Iterable[str]) -> float:
        """The widest that a file type and formats, by name, allow."""
        found = [nats for start, nats in self.wider.items() if any(name.startswith(start) for name in names)]
        return max([self.tolerance, *found])

    def tolerance_of(self, checkpoint: Checkpoint) -> float:
        formats = {tensor.dtype for tensor in checkpoint.tensors.values() if tensor.quantized}
        return self.tolerance_for(formats | {checkpoint.file_type.name})


def installed(package: str) -> str | None:
    """The version of a distribution in this environment."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _described() -> Iterator[Engine]:
    """The engines that the scripts of this folder speak of."""
    for script in sorted([*SCRIPTS.glob("run_*.py"), *SCRIPTS.glob("parse_*.py")]):
        for about in import_module(f"{__name__}.{script.stem}").ENGINES:
            yield Engine(script=script.name, **about)


ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in _described()}


def engines_of(checkpoint: Checkpoint, name: str | None = None) -> list[Engine]:
    """The engines of a checkpoint's file type, or the one of this name: all of it, or what stands before +.
    PlanError where that engine does not read the file type."""
    file_type = checkpoint.file_type
    wanted = None if name is None else name.lower()
    chosen = [
        ENGINES[each]
        for each in file_type.engines
        if wanted in (None, each.lower(), each.lower().partition("+")[0])
    ]
    if name is not None and not chosen:
        known = ", ".join(file_type.engines) or "none is known"
        raise PlanError(
            f"{checkpoint.path}: {name!r} is no engine that {file_type.name} files are tried in: {known}"
        )
    return chosen
