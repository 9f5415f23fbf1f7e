"""preflight(): all estimates of one request, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ..adapters import transformers as hf
from ..adapters.as_loaded import as_loaded
from ..errors import ModelError
from ..files.checkpoint import Checkpoint
from ..files.directory import Directory
from ..files.filetype import FileType
from ..files.native import NATIVE
from ..files.output import Output
from ..formats.ggml_types import GGML_TYPES
from ..model.archs import architecture
from ..model.fused import Mixed, mixed_groups
from ..model.sites import sites
from ..plan.recipes import Hyper, choose_types
from ..transforms.rotate import rotate
from ..workflow.converted import check_model, float_nbytes, needs_converter
from ..workflow.request import Request, check_method
from ..workflow.resolve import file_type_for, resolve
from .cache import KINDS, KVCache, fields_of, kv_cache
from .engines import Seen, Verdict, verdicts
from .machines import machines, read_per_token, tokens_per_second
from .sizes import Part, file_nbytes, parts_of, sizes_of_parameters
from .work import Work, work_of

RUNTIME = 300 * 2**20  # bytes of the engine's own code and buffers
CHUNK = 512  # tokens of a prompt that engines process at once
MIXTURE = "q4_k_m"


@dataclass(frozen=True)
class Preflight:
    """kv: None if the config does not tell. kind: of the cache that `run_memory` counts. overhead: bytes of
    RUNTIME, and the activations and logits of CHUNK tokens in f32. read: bytes of weights that a token reads.
    fused: groups that engines with fused modules refuse."""

    file: str
    parts: tuple[Part, ...]
    output: int
    kv: KVCache | None
    kind: str
    context: int
    batch: int
    overhead: int
    read: int
    work: Work
    engines: tuple[Verdict, ...]
    fused: tuple[Mixed, ...]
    notes: tuple[str, ...]

    @property
    def weights(self) -> int:
        return sum(part.weights for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """Of the tensors, without the file's overhead, as in the receipt."""
        return 8 * sum(part.nbytes for part in self.parts if part.weights) / max(1, self.weights)

    @property
    def cache(self) -> int:
        return 0 if self.kv is None else self.kv.nbytes(self.kind, self.context, self.batch)

    @property
    def run_memory(self) -> int:
        return self.output + self.cache + self.overhead

    def speeds(self) -> list[tuple[str, float, float | None, bool | None]]:
        """(machine, GB/s, maximum tokens/s or None, whether it fits in its memory)."""
        rows = []
        for machine in machines():
            fits = None if machine.gib is None else self.run_memory <= machine.gib * 2**30
            bound = tokens_per_second(machine, self.read, self.cache, self.batch)
            rows.append((machine.name, machine.gb_per_s, None if fits is False else bound, fits))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Plain data; bytes, seconds, bits."""
        kv = self.kv and {
            kind: {
                "bits": self.kv.bits(kind),
                "per_token": self.kv.per_token(kind),
                "nbytes": self.kv.nbytes(kind, self.context, self.batch),
            }
            for kind in KINDS
        }
        work = asdict(self.work) | {"disk": self.work.disk, "total_seconds": self.work.total_seconds}
        return {
            "file": self.file,
            "nbytes": self.output,
            "weights": self.weights,
            "bits_per_weight": self.bits_per_weight,
            "parts": [asdict(part) | {"bits_per_weight": part.bits_per_weight} for part in self.parts],
            "kv_cache": kv,
            "quantize": work,
            "run": {
                "memory": self.run_memory,
                "cache": self.kind,
                "cache_nbytes": self.cache,
                "overhead": self.overhead,
                "read_per_token": self.read,
                "context": self.context,
                "batch": self.batch,
            },
            "machines": [
                dict(zip(("name", "gb_per_s", "tokens_per_s", "fits"), row, strict=True))
                for row in self.speeds()
            ],
            "engines": [asdict(verdict) for verdict in self.engines],
            "fused": [{"group": m.group, "formats": dict(m.formats)} for m in self.fused],
            "notes": list(self.notes),
        }


def preflight(
    checkpoint: Checkpoint,
    request: Request,
    run: tuple[int, int, str] = (4096, 1, "f16"),
    stated: Mapping[str, str | None] | None = None,
    writes_text: bool = False,
) -> Preflight:
    """The size and requirements of `quantize(checkpoint, out, request)`. Reads headers and measures for about
    a second.

    run: context, batch and cache kind for running the result. stated: engine -> version to check.
    writes_text: whether the model generates its calibration text. Raises the same errors as `quantize` at its
    start."""
    check_method(request)
    checkpoint, notes = as_loaded(checkpoint), request.notes
    if "rotate" in request.method.transforms:
        checkpoint, turned = rotate(checkpoint, request.streaming.seed)
        notes += turned
    place = Path("output")  # not used: nothing is read or written there
    asked = file_type_for(request.file, place)
    converts = needs_converter(checkpoint, asked)
    if converts:
        check_model(checkpoint)
    # the names in a converter's file are not known yet: sizes are those of a native directory
    resolved = resolve(checkpoint, request, NATIVE if converts else asked)
    output, decisions = resolved.lay_out(checkpoint, place), resolved.by_output(checkpoint)
    work = work_of(checkpoint, output, decisions, request, writes_text)
    if converts:
        codes = file_nbytes(output) if request.calibrated else 0
        work = replace(work, scratch=work.scratch + float_nbytes(checkpoint) + codes)
    file_type = asked if converts else resolved.file_type
    context, batch, kind = run
    config = fields_of(checkpoint)
    seen = _output(checkpoint, output, file_type)
    kv, more = _cache(checkpoint, config, file_type)
    parts = tuple(parts_of(output))
    return Preflight(
        file_type.name,
        parts,
        file_nbytes(output),
        kv,
        kind,
        context,
        batch,
        _overhead(checkpoint, config, min(context, CHUNK)),
        read_per_token(parts, config),
        work,
        tuple(verdicts(seen, stated or {})),
        tuple(seen.mixed),
        output.notes + resolved.notes + notes + more,
    )


def _output(checkpoint: Checkpoint, output: Output, file_type: FileType) -> Seen:
    arch = architecture(checkpoint.config)
    kinds = {name: job.kind for job in output.jobs for name in job.sources}
    known = [site for site in sites(checkpoint) if site.name in kinds]
    method = file_type.method if isinstance(file_type, Directory) else None
    mixed = mixed_groups(known, {name: kind.name for name, kind in kinds.items()}) if method else []
    return Seen(
        file=file_type.name,
        engines=file_type.engines,
        method=method,
        config=checkpoint.config,
        gguf=arch.gguf if arch else checkpoint.config.get("model_type"),
        kinds=frozenset(kinds.values()),
        mixed=mixed,
    )


def _cache(
    checkpoint: Checkpoint, config: Mapping[str, Any], file_type: FileType
) -> tuple[KVCache | None, tuple[str, ...]]:
    """The cache in the engine of that file type: llama.cpp ignores some windows."""
    arch = architecture(checkpoint.config)
    ignored = arch is not None and {"sliding_window", "use_sliding_window"} & arch.ignored.keys()
    try:
        full = hf.known_config(checkpoint.config) if checkpoint.config else None
        kv = kv_cache(full or config, windows=not ("llama.cpp" in file_type.engines and ignored))
    except ModelError as error:
        return None, (str(error),)
    return kv, kv.notes


def _overhead(checkpoint: Checkpoint, config: Mapping[str, Any], tokens: int) -> int:
    """Logits, and the widest activations of a block: hidden states four times, the MLP's twice."""
    outside = [s.shape[0] for s in sites(checkpoint) if s.role in ("embed", "output")]
    inside = [max(s.shape) for s in sites(checkpoint) if s.block is not None]
    hidden = min((min(s.shape) for s in sites(checkpoint) if s.role in ("embed", "output")), default=0)
    width = max(outside, default=0) + 4 * hidden + 2 * max(inside, default=0)
    return RUNTIME + 4 * tokens * width


def parameters(count: float) -> list[tuple[str, float, float]]:
    """(format, bits per weight, bytes) of a model of `count` parameters."""
    return sizes_of_parameters(count, {f"{MIXTURE} (as laid out for LLaMA-65B)": _mixture_bits(MIXTURE)})


def _mixture_bits(recipe: str) -> float:
    """Bits per weight of a mixture on LLaMA-65B: 80 blocks of 8192 and 22016 (arXiv 2302.13971, table 2)."""
    layers, hidden, inner, vocabulary = 80, 8192, 22016, 32000
    block = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (hidden, hidden))
    block |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
    ends = {"token_embd.weight": (vocabulary, hidden), "output.weight": (vocabulary, hidden)}
    shapes = ends | {f"blk.{i}.{n}.weight": s for i in range(layers) for n, s in block.items()}
    rows = [(name, shape, "f16") for name, shape in shapes.items()]
    nbits = 0.0
    for name, choice in choose_types(recipe, rows, Hyper("llama", layers, 64, 64)).items():
        _, size, nbytes = GGML_TYPES[choice.type]
        nbits += 8 * prod(shapes[name]) * nbytes / size
    return nbits / sum(map(prod, shapes.values()))
