"""Receipt: the record of a quantized file, with everything needed to reproduce it.

    tensors    one row each: requested and actual format, why they differ, the error
    plan       the rules as TOML, and their digest
    inputs,    file -> size and SHA-256
    outputs
    totals     bytes, bits per weight, seconds, peak memory: derived from the rows where possible
    versions   fewbits, torch, python, platform, instruction set

It is plain data. `to_json` and `from_json` are exact inverses, and the same input gives the same text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from math import prod
from typing import Any

from ..errors import FileError, raise_all
from ..table import Cell, size, table

VERSION = 1


@dataclass(frozen=True)
class TensorRow:
    """The record of one tensor.

    asked, format: names of the requested and the actual format; they differ only with a `reason`.
    relative_error: |w' - w| / |w| (Frobenius). sqnr_db: 20 log10 of its inverse, None if the error is 0.
    max_abs_error: largest change of one weight. All three are None for a copied tensor. tokens: how many
    reached this weight in calibration (of stacked experts: the fewest). output_error: |(w' - w) x| / |w x|
    over them, or None. coded_bits: of a weight whose codes were chosen for `fewbits pack`, when it has coded
    them. digest: SHA-256 of the written bytes; of several planes, that of their hexadecimal digests in order.
    rule: the pattern of the user's rule that applied. sparsity: of a pruned tensor, the share of dropped
    weights, of these that are not 0 in the file, and of all zeros."""

    name: str
    shape: tuple[int, ...]
    source_dtype: str
    asked: str
    format: str
    nbytes: int
    digest: str
    algorithm: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    gguf_name: str | None = None
    relative_error: float | None = None
    sqnr_db: float | None = None
    max_abs_error: float | None = None
    tokens: int | None = None
    output_error: float | None = None
    coded_bits: float | None = None
    rule: str | None = None
    sparsity: Mapping[str, float] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def done_as_asked(self) -> bool:
        return self.asked == self.format


@dataclass(frozen=True)
class FileDigest:
    """One file of the input or output."""

    file: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """The record of one run of `quantize`. Seconds are wall time; memory is peak resident bytes.

    method: the differences from plain rounding. calibration: source, tokens, their SHA-256. notes: other
    facts for the user: ignored fields, types that need an imatrix, experts without tokens. verified: result
    of the output's engine: engine, version, verdict, differences. evaluation: against the reference, if
    measured. about: the reference's license and name. coverage: how many weights of the model's blocks got
    the requested format, and what the others are. sparsity: what was asked for and reached. training: the
    evaluations of a training run: step, loss since the last, loss held out. merged: which adapter
    into the model, how, at what loss."""

    source: str
    target: str
    tensors: tuple[TensorRow, ...]
    plan: str
    plan_digest: str
    inputs: tuple[FileDigest, ...]
    outputs: tuple[FileDigest, ...]
    seconds: float
    peak_memory_bytes: int
    versions: Mapping[str, str]
    recipe: str | None = None
    method: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    verified: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    coverage: Mapping[str, Any] = field(default_factory=dict)
    sparsity: Mapping[str, Any] = field(default_factory=dict)
    training: tuple[Mapping[str, Any], ...] = ()
    merged: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.tensors)

    @property
    def numel(self) -> int:
        return sum(row.numel for row in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    def changed(self) -> tuple[TensorRow, ...]:
        """The tensors that did not get the requested format."""
        return tuple(row for row in self.tensors if not row.done_as_asked)

    def to_json(self) -> str:
        totals = {
            "tensors": len(self.tensors),
            "weights": self.numel,
            "nbytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "changed": len(self.changed()),
        }
        body = {"receipt": VERSION, "totals": totals} | asdict(self)
        return json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str = "receipt") -> Receipt:
        """Read a receipt; raises FileError naming `where` and every missing or unknown key."""
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise FileError(f"{where}: not JSON: {error}") from None
        if not isinstance(body, dict) or body.get("receipt") != VERSION:
            raise FileError(
                f"{where}: not a fewbits receipt of version {VERSION}; write it again with quantize"
            )
        body = {key: value for key, value in body.items() if key not in ("receipt", "totals")}
        _check_keys(Receipt, body, where)
        rows = {"tensors": TensorRow, "inputs": FileDigest, "outputs": FileDigest}
        for key, kind in rows.items():
            for i, row in enumerate(body[key]):
                _check_keys(kind, row, f"{where}: {key}[{i}]")
        tensors = tuple(TensorRow(**(row | {"shape": tuple(row["shape"])})) for row in body["tensors"])
        files = {key: tuple(FileDigest(**row) for row in body[key]) for key in ("inputs", "outputs")}
        notes = {"notes": tuple(body.get("notes", ())), "training": tuple(body.get("training", ()))}
        return Receipt(**(body | files | notes | {"tensors": tensors}))

    def table(self, worst: int = 5) -> str:
        """The receipt as text: a line for each format, the `worst` tensors, and tensors without the requested
        format."""
        parts = [_covered(self.coverage)] if self.coverage else []
        parts += [_pruned(self.sparsity)] if self.sparsity else []
        parts += [_by_format(self.tensors), _totals(self)]
        if measured := [row for row in self.tensors if row.relative_error is not None]:
            parts.append(_worst(measured, worst))
        if changed := self.changed():
            parts.append(_reasons(changed))
        parts += [f"note: {note}" for note in self.notes]
        return "\n\n".join(parts)


def _check_keys(kind: type, row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise FileError(f"{where}: is a {type(row).__name__}, not an object")
    known = {item.name for item in fields(kind)}
    required = {name for name in known if name not in _optional(kind)}
    faults = [f"key {key!r} is missing" for key in sorted(required - set(row))]
    faults += [f"key {key!r} is unknown" for key in sorted(set(row) - known)]
    raise_all(FileError, where, faults)


def _optional(kind: type) -> set[str]:
    return {f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING}


def _covered(coverage: Mapping[str, Any]) -> str:
    left = ", ".join(
        f"{found['weights'] / coverage['weights']:.1%} {reason}" for reason, found in coverage["left"].items()
    )
    share = f"{coverage['share']:.1%} of the weights in blocks got {coverage['asked']}"
    return f"{share}; not: {left}" if left else share


def _pruned(sparsity: Mapping[str, Any]) -> str:
    text = (
        f"{sparsity['covered']:.1%} of the weights in blocks were pruned by {sparsity['prune']} "
        f"({sparsity['pattern']}): {sparsity['dropped']:.2%} of them dropped, {sparsity['asked']:.2%} asked "
        f"for; {sparsity['zeros']:.1%} are 0 in the file"
    )
    left = sparsity["not_zero"]
    return f"{text}; {left:.2%} of those dropped are not 0 there" if left else text


def _by_format(rows: tuple[TensorRow, ...]) -> str:
    lines: list[list[Cell]] = []
    for name in dict.fromkeys(row.format for row in rows):
        group = [row for row in rows if row.format == name]
        nbytes, numel = sum(row.nbytes for row in group), sum(row.numel for row in group)
        errors = [row.relative_error for row in group if row.relative_error is not None]
        error = sum(errors) / len(errors) if errors else None
        lines.append([name, len(group), numel, size(nbytes), 8 * nbytes / numel if numel else None, error])
    lines.sort(key=lambda line: -int(line[2] or 0))
    return table(["format", "tensors", "weights", "size", "bits/weight", "mean error"], lines)


def _totals(receipt: Receipt) -> str:
    return (
        f"{size(receipt.nbytes)}, {receipt.bits_per_weight:.3f} bits per weight, "
        f"{receipt.seconds:.1f} s, peak memory {size(receipt.peak_memory_bytes)}"
    )


def _worst(rows: list[TensorRow], count: int) -> str:
    rows = sorted(rows, key=lambda row: -(row.relative_error or 0.0))[:count]
    head = ["largest error", "format", "relative", "SQNR dB", "max change"]
    return table(head, [[r.name, r.format, r.relative_error, r.sqnr_db, r.max_abs_error] for r in rows])


def _reasons(rows: tuple[TensorRow, ...]) -> str:
    """Tensors without the requested format, counted by format and reason."""
    groups: dict[tuple[str, str, str], int] = {}
    for row in rows:
        key = (row.asked, row.format, row.reason or "no reason given")
        groups[key] = groups.get(key, 0) + 1
    return table(["tensors", "requested", "got", "reason"], [[count, *key] for key, count in groups.items()])
