"""Whether an engine can load the output, from names: the file type, the architecture, the tensor types,
installed packages. Nothing is loaded; the answer is `None` if names are not enough.

    llama.cpp      GGUF; architectures of model/archs.toml; builds are known as far as SINCE lists them
    transformers   model types and quantization methods of the installed version
    vLLM           gptq, awq, compressed-tensors, fp8; the formats that its config reader accepts; fused
                   groups in one format; architectures are not checked
    others         the file types that list them
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..adapters import transformers as hf
from ..engines import ENGINES, installed
from ..errors import PlanError
from ..formats.affine import Affine
from ..formats.base import Format, Kind
from ..model.fused import Mixed

# An architecture or type -> the last build of llama.cpp that is known to lack it, and the first that is known
# to have it; the same for llama-cpp-python. Between them it is unknown. From reports of loading:
# llama.cpp issues 13157 and 15099, pull request 15091; LLamaSharp 1173; node-llama-cpp 440; jan 6068;
# llama-cpp-python 2008, 2048, 2130. Other types are assumed to be older than any build in use.
SINCE: Mapping[str, tuple[str, str]] = {
    "gemma3": ("0 4880", "0.3.2 0.3.16"),
    "qwen3": ("5026 5220", "0.3.8 0.3.15"),
    "qwen3moe": ("5026 5220", "0.3.8 0.3.15"),
    "mxfp4": ("6090 6097", "0.3.14 0.3.15"),
}
VLLM = (0, 33)  # the version whose formats are known
FUSING = ("gptq", "awq", "compressed-tensors", "fp8")


@dataclass(frozen=True)
class Seen:
    """The output as engines see it.

    file: its file type. engines: those of the file type. method: quant_method of config.json, or None. gguf:
    the architecture's name in GGUF, None if unknown. kinds: of its tensors."""

    file: str
    engines: tuple[str, ...]
    method: str | None
    config: Mapping[str, Any]
    gguf: str | None
    kinds: frozenset[Kind]
    mixed: Sequence[Mixed] = ()

    @property
    def quantized(self) -> bool:
        return any(isinstance(kind, Format) for kind in self.kinds)


@dataclass(frozen=True)
class Verdict:
    """loads: None if unknown. version: the installed or given one; None: not installed."""

    engine: str
    version: str | None
    installed: bool
    loads: bool | None
    why: str


Answer = tuple[bool | None, str]


def verdicts(output: Seen, stated: Mapping[str, str | None]) -> list[Verdict]:
    """One for each engine. stated: name -> the version to check; None: the installed one. PlanError for an
    unknown engine."""
    known = {name.lower(): name for name in ANSWERS}
    unknown = [name for name in stated if name.lower() not in known]
    if unknown:
        raise PlanError(f"unknown engine {unknown[0]!r}; known: {', '.join(ANSWERS)}")
    versions = {known[name.lower()]: version for name, version in stated.items()}
    return [_verdict(name, output, versions.get(name)) for name in ANSWERS]


def _verdict(name: str, output: Seen, stated: str | None) -> Verdict:
    package = ENGINES[name].packages[0]
    version = installed(package)
    loads, why = ANSWERS[name](output, stated, stated or version)
    if stated is None and version is None and loads is not False:
        loads, why = None, f"not installed (pip install {package}); {why}"
    return Verdict(name, stated or version, version is not None, loads, why)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _llamacpp(output: Seen, stated: str | None, version: str | None) -> Answer:
    if "llama.cpp" not in output.engines:
        return False, f"reads GGUF, not {output.file}; --file gguf"
    if output.gguf is None:
        return None, "its architecture has no row in archs.toml; the file is written as it came"
    kinds = {kind.name.removesuffix("_ggml") for kind in output.kinds}
    names = [output.gguf, *sorted(kinds & SINCE.keys())]
    unsure = []
    for name in names:
        if version is None or name not in SINCE:
            continue
        lacking, having = SINCE[name]["." in version].split()
        if _numbers(version) <= _numbers(lacking):
            return False, f"{name} came after {lacking}; the first known to have it is {having}"
        if _numbers(version) < _numbers(having):
            unsure.append(f"{name} is known to be in {having}, not whether in {version}")
    return (None, "; ".join(unsure)) if unsure else (True, f"knows architecture {output.gguf} and all types")


def _transformers(output: Seen, stated: str | None, version: str | None) -> Answer:
    if stated is not None and stated != installed("transformers"):
        return None, "only the installed version can be queried for its models"
    if version is None:
        return None, "its models cannot be queried"
    kind = output.config.get("model_type")
    if kind not in hf.known_models():
        return False, f"has no model of type {kind!r}"
    if "llama.cpp" in output.engines:
        known = output.gguf in hf.gguf_architectures()
        return known, f"{'decodes' if known else 'does not read'} GGUF of {output.gguf}" + (
            " to float: no memory is saved" if known else ""
        )
    if not output.quantized:
        return True, f"{kind}, in float"
    if output.method is None:
        return False, f"does not read the {output.file} directory; --file gptq, or evaluate with fewbits"
    if not any(name.startswith(output.method) for name in hf.quantization_methods()):
        return False, f"has no quantization method {output.method!r}"
    needed = [
        package
        for name in output.engines
        if name.startswith("transformers")
        for package in ENGINES[name].needs(output.method)
    ]
    missing = [package for package in needed if installed(package) is None]
    if missing:
        return False, f"needs {' and '.join(missing)} (pip install {' '.join(missing)})"
    return True, f"{kind}, {output.method}"


def _vllm(output: Seen, stated: str | None, version: str | None) -> Answer:
    if "llama.cpp" in output.engines:
        return None, "reads GGUF only through its plug-in"
    if output.quantized and output.method not in FUSING:
        return False, f"does not read {output.file}; it reads {', '.join(FUSING)}"
    if output.mixed:
        groups = "group" if len(output.mixed) == 1 else "groups"
        return False, f"{len(output.mixed)} fused {groups} of two formats, such as {output.mixed[0].group}"
    lacking = sorted(kind.name for kind in output.kinds if _vllm_lacks(output.method, kind))
    if lacking and version is not None and _numbers(version) < VLLM:
        return (
            None,
            f"0.33 has no {', '.join(lacking)} in {output.method} files; of {version} it is not known",
        )
    if lacking:
        return (
            False,
            f"has no {', '.join(lacking)} in {output.method} files; another format, or another --file",
        )
    eight = any(kind.name.startswith(ENGINES["vLLM+cpu"].lacks) for kind in output.kinds)
    cpu = "; on a CPU it has no kernel for 8-bit weights without 8-bit activations" if eight else ""
    return None, f"file type, formats and fused groups fit; architectures are not checked{cpu}"


def _vllm_lacks(method: str | None, form: Kind) -> bool:
    """Whether vLLM 0.33 refuses a format, as its own config reader does (tests/engines/test_vllm.py)."""
    if not isinstance(form, Format) or method not in FUSING:
        return False
    if method == "gptq":
        return not isinstance(form, Affine) or form.zero != "none" or form.bits not in (4, 8)
    whole = isinstance(form, Affine) and form.cells.rows is None
    return method == "compressed-tensors" and (whole or form.name == "mxfp6_e2m3")


def _own(name: str) -> Callable[[Seen, str | None, str | None], Answer]:
    def answer(output: Seen, stated: str | None, version: str | None) -> Answer:
        if name not in output.engines:
            return False, f"does not read {output.file}"
        return None, "reads the file type; architectures are not checked"

    return answer


_SPECIAL: dict[str, Callable[[Seen, str | None, str | None], Answer]] = {
    "llama.cpp": _llamacpp,
    "transformers": _transformers,
    "vLLM": _vllm,
}
# transformers is one engine here, with the packages of its quantizers.
ANSWERS = _SPECIAL | {name: _own(name) for name in ENGINES if name.partition("+")[0] not in _SPECIAL}
