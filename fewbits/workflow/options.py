"""Options: the options of `quantize`, with the names of its command line, and their conversion to a
Request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ..activations.quantizers import parse
from ..algorithms.prune import PATTERNS
from ..calibrate.statistics import Statistics
from ..calibrate.tokens import Tokens
from ..errors import PlanError, raise_all
from ..files.checkpoint import Checkpoint
from ..files.filetype import FileType
from ..files.native import NATIVE
from ..files.open import FILE_TYPES, GGUF_FILE
from ..plan.method import EFFORTS, METHODS, Method
from ..plan.mixtures import RECIPES
from ..plan.rates import LEAST, MOST
from ..plan.rules import Option
from ..runtime.program import SUFFIX
from ..train.settings import DistillSettings, settings_faults
from .request import CommonOptions, Request
from .resolve import file_type_for

ENOUGH = 2**62  # windows: how many there are is known later
OF_THE_RUN = {"steps", "state", "device", "seed", "keep_zeros"}  # settings of training that it decides itself


@dataclass(frozen=True)
class Options(CommonOptions):
    """The fields of CommonOptions. `file` defaults to GGUF for a llama.cpp file type and to a native
    directory for a format. The plan's [run] table sets options that are None here.

    effort: fast, good (default) or best; method: a name of METHODS or a Method, instead. bits_per_weight: of
    the method ecsq, when its codes are entropy-coded. smooth
    (SmoothQuant: True, or its alpha), awq, rotate, equalize: transforms before quantization. distill: steps
    of distillation after it. train: steps that train codes too, in its place (quantization-aware training);
    training: other settings of it, by their names in train.settings.DistillSettings.
    sparsity: the share of the weights in blocks that become 0; prune: which (sparsegpt, wanda, magnitude);
    sparsity_pattern: unstructured, row, 2:4 or 4:8.

    calibrate: a text or JSONL file, hf:NAME, "self" (the default: the model generates text), "vocabulary"
    (random tokens: the default of models that generate none), saved statistics, or Tokens or Statistics.
    tokens, context, seed: of the text. verify: load the output in its engine at the end, within
    verify_seconds and verify_memory bytes."""

    effort: str | None = None
    method: str | Method | None = None
    bits_per_weight: float | None = None
    smooth: float | bool | None = None
    awq: bool | None = None
    rotate: bool | None = None
    equalize: bool | None = None
    distill: int | None = None
    train: int | None = None
    training: Mapping[str, Option] | None = None
    sparsity: float | None = None
    prune: str | None = None
    sparsity_pattern: str | None = None
    calibrate: str | Path | Tokens | Statistics | None = None
    tokens: int | None = None
    context: int | None = None
    seed: int | None = None
    verify: bool = True
    verify_seconds: float = 600
    verify_memory: int | None = None

    def filled(self) -> Options:
        """These options with unset ones taken from the plan's [run] table; PlanError for unknown keys."""
        known = {each.name for each in fields(self)} - {"plan", "streaming", "method"} | {"method"}
        unknown = [key for key in self.plan.run if key not in known]
        if unknown:
            raise PlanError(f"plan: [run] has no key {unknown[0]!r}; known: {', '.join(sorted(known))}")
        more = {key: value for key, value in self.plan.run.items() if getattr(self, key) is None}
        return replace(self, **more)  # type: ignore[arg-type]

    @property
    def by_default(self) -> bool:
        """Whether calibration was not requested, so a model that cannot be run may be rounded to nearest."""
        transforms = (self.smooth, self.awq, self.rotate, self.equalize)
        return not (self.effort or self.method or self.calibrate or self.sparsity or any(transforms))

    def chosen_method(self) -> Method:
        """The Method of these options. PlanError for both an effort and a method, or an unknown one."""
        if self.effort and self.method:
            raise PlanError("effort and method exclude each other; give one of them")
        base = self._base()
        if self.bits_per_weight is not None:
            if base.algorithm != "ecsq":
                raise PlanError("bits_per_weight sets the entropy-coded size: it needs the method ecsq")
            if not LEAST <= self.bits_per_weight <= MOST:
                raise PlanError(f"bits_per_weight is {self.bits_per_weight}; it is {LEAST:g} to {MOST:g}")
            base = replace(base, options={**base.options, "bits": self.bits_per_weight})
        names = [name for name in ("rotate", "awq", "equalize") if getattr(self, name)]
        names += ["smooth"] if self.smooth not in (None, False) else []
        transforms = (*base.transforms, *(name for name in names if name not in base.transforms))
        details: dict[str, Option] = (
            {} if self.smooth in (None, False, True) else {"alpha": float(self.smooth or 0)}
        )
        distill = base.distill if self.distill is None else self.distill
        details = details or dict(base.transform_options)
        method = replace(base, transforms=transforms, transform_options=details, distill=distill)
        method = self._pruned(method)
        if self.train is not None:
            training = dict(self.training or {})
            method = replace(method, distill=0, train=self.train, train_options=training)
        _check_training(method)
        return method

    def _pruned(self, method: Method) -> Method:
        """With a sparsity; half where only a pattern is given that has that."""
        pattern = self.sparsity_pattern or method.sparsity_pattern
        sparsity = method.sparsity if self.sparsity is None else self.sparsity
        if self.sparsity is None and PATTERNS.get(pattern):
            sparsity = 0.5
        if sparsity and method.algorithm == "ecsq":
            raise PlanError(
                "ecsq decides by the bits that are asked for how many weights become 0; leave sparsity out"
            )
        return replace(method, sparsity=sparsity, prune=self.prune or method.prune, sparsity_pattern=pattern)

    def _base(self) -> Method:
        if isinstance(self.method, Method):
            return self.method
        if self.method is not None:
            return _known(METHODS, "method", self.method)
        # Without search only rounding to nearest is possible.
        return _known(EFFORTS, "effort", self.effort or ("good" if self.search else "fast"))

    def request(self) -> Request:
        """The request without calibration data. PlanError if neither a type nor a rule is given, and for an
        unknown scheme of activations."""
        if self.to is None and not self.plan.rules:
            raise PlanError("no format is given; give a type (--to TYPE), a rule (--rule) or a plan (--plan)")
        if self.activations is not None:
            parse(self.activations)
        same = {each.name: getattr(self, each.name) for each in fields(CommonOptions)}
        streaming = replace(self.streaming, seed=self.seed or 0)
        return Request(**same | {"method": self.chosen_method(), "streaming": streaming})

    def place(self, path: Path, checkpoint: Checkpoint, out: Path | None) -> tuple[Path, FileType]:
        """The output path and file type for the model at `path`. PlanError for a program of torch.export."""
        if out is not None and out.suffix == SUFFIX:
            raise PlanError(
                f"{out}: write a directory; `fewbits convert DIRECTORY {out}` makes a program of it"
            )
        if out is not None:
            return out, file_type_for(self.file, out)
        file_type = FILE_TYPES.get(self.file) if self.file else self._usual()
        stem = path.resolve().name.removesuffix(GGUF_FILE.suffix)
        return file_type.default_path(stem, self.to or "plan"), file_type

    def _usual(self) -> FileType:
        return GGUF_FILE if (self.to or "").lower() in RECIPES else NATIVE


def _known(words: dict[str, Method], what: str, name: str) -> Method:
    if name not in words:
        raise PlanError(f"unknown {what} {name!r}; known: {', '.join(words)}")
    return words[name]


def _check_training(method: Method) -> None:
    """PlanError for settings that training has not, or values that they cannot have."""
    known = {each.name for each in fields(DistillSettings)} - OF_THE_RUN
    unknown = [name for name in method.train_options if name not in known]
    if unknown:
        raise PlanError(f"training has no setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
    settings = DistillSettings(steps=max(1, method.trains), **method.training())
    raise_all(PlanError, "train", settings_faults(settings, ENOUGH))
