"""Steps after writing an output: verification, audit of side files, card, upload.

    output -> verify (verify.py) -> audit (audit.py) -> receipt, written again -> card (release/card.py)

A directory gets its card as README.md; a file gets `<file>.README.md` beside it, on the hub README.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.hub import upload
from ..errors import FileError
from ..files.checkpoint import Checkpoint
from ..files.open import open_checkpoint
from ..files.side_files import card_fields, find_side_files
from ..storage.atomic import write_atomic
from .audit import audit
from .card import INHERITED, QUANTIZED_BY, model_card
from .plot import NAME, plot
from .receipt import Receipt
from .verify import Outcome

_HUB_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def receipt_path(out: Path) -> Path:
    return out / "receipt.json" if out.is_dir() else out.with_name(out.name + ".receipt.json")


def card_path(out: Path) -> Path:
    return out / "README.md" if out.is_dir() else out.with_name(out.name + ".README.md")


def finished(receipt: Receipt, reference: Checkpoint, out: Path, outcome: Outcome | None) -> Receipt:
    """The receipt with the results of verification and audit, and the card; both are written beside the
    output."""
    quantized = open_checkpoint(out)
    notes = tuple(f"beside the weights: {difference}" for difference in audit(reference, quantized))
    about = {**receipt.about, **_about(reference)}
    receipt = replace(receipt, notes=receipt.notes + notes, about=about)
    if outcome is not None:
        receipt = replace(receipt, verified=outcome.to_dict())
    write_records(receipt, quantized, out)
    return receipt


def measured(out: Path, evaluation: Mapping[str, Any]) -> Receipt:
    """Add the results of an evaluation to the output's receipt and card."""
    receipt = replace(read_receipt(out), evaluation=dict(evaluation))
    write_records(receipt, open_checkpoint(out), out)
    return receipt


def write_records(receipt: Receipt, quantized: Checkpoint, out: Path) -> None:
    write_atomic(receipt_path(out), receipt.to_json().encode())
    if receipt.training:
        plot(receipt.training, plot_path(out))
    card = model_card(receipt, quantized.file_type, out.name, receipt.about, quantized.config)
    write_atomic(card_path(out), card.encode())


def check_records(receipt: Path, card: Path) -> None:
    """FileError if a file that fewbits did not write has the name of the output's receipt or card."""
    try:
        ours = not receipt.exists() or bool(Receipt.from_json(receipt.read_text(encoding="utf-8")))
    except (FileError, OSError, ValueError):
        ours = False
    known = not card.exists() or card_fields(card).get("quantized_by") == QUANTIZED_BY
    for path, what, fine in ((receipt, "receipt", ours), (card, "model card", known)):
        if not fine:
            raise FileError(
                f"{path}: is in the way: the output's {what} has this name, and fewbits did not write this "
                "one; move it, choose another output, or pass overwrite"
            )


def plot_path(out: Path) -> Path:
    return out / NAME if out.is_dir() else out.with_name(f"{out.name}.{NAME}")


def read_receipt(out: Path) -> Receipt:
    """The receipt of an output; FileError if there is none."""
    path = receipt_path(out)
    try:
        return Receipt.from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise FileError(
            f"{path}: cannot be read: {error.strerror}; only outputs of fewbits have a receipt"
        ) from error


def push(out: Path, repo: str, private: bool = False) -> str:
    """Upload an output with its card and receipt -> the address; FileError if the hub refuses it.

    FileError unless receipt and card exist and verification, if it was done, found no difference.
    """
    receipt = read_receipt(out)
    if receipt.verified.get("verdict") in ("differs", "failed"):
        raise FileError(
            f"{out}: verification in {receipt.verified.get('engine')} failed "
            f"({receipt.verified.get('reason') or receipt.verified.get('kl')}); it is not uploaded"
        )
    if out.is_dir():
        files = {path.name: path for path in sorted(out.iterdir()) if path.is_file() and path.name[0] != "."}
        files |= find_side_files(out)  # those of sentence-transformers lie in folders
    else:
        files = {out.name: out, "README.md": card_path(out), receipt_path(out).name: receipt_path(out)}
    missing = [str(path) for path in files.values() if not path.exists()]
    if missing:
        raise FileError(f"{missing[0]}: is missing; write the output again, or `fewbits verify` it")
    return upload(repo, files, private)


def _about(reference: Checkpoint) -> dict[str, Any]:
    """Fields of the reference's card, and its name on the hub if the path shows it."""
    fields = card_fields(reference.side_files.get("README.md"))
    kept: dict[str, Any] = {key: fields[key] for key in INHERITED if key in fields}
    hub = _HUB_FOLDER.search(str(reference.path))
    named = str(reference.config.get("_name_or_path") or "")
    if hub is not None:
        kept["reference"] = f"{hub[1]}/{hub[2]}"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", named) and not Path(named).exists():
        kept["reference"] = named
    elif "base_model" in fields:
        base = fields["base_model"]
        kept["reference"] = base if isinstance(base, str) else base[0]
    return kept
