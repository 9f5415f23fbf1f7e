"""The model card: README.md with the hub's YAML, from the receipt and the reference's own card.

    ---
    base_model: org/name            base_model_relation: quantized      license: the reference's
    library_name, tags              filters of the hub
    ---
    the model, its size, its error, how to run it, the receipt's digest

Source of the fields: the Hugging Face Hub's documentation of model cards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..files.filetype import FileType
from ..table import Cell, size, table
from .outcome import KL
from .receipt import Receipt

INHERITED = ("license", "license_name", "license_link", "language")
TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "Model": "feature-extraction",
}
"""end of a class's name -> the hub's name of the task"""
ROWS = 20  # of the table of a training run, about
QUANTIZED_BY = "fewbits"  # marks a card that fewbits wrote


def model_card(
    receipt: Receipt,
    file_type: FileType,
    name: str,
    reference: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
) -> str:
    """name: of the output. reference: fields of its own card, and its `reference` if known. config: of the
    output."""
    from huggingface_hub import ModelCardData

    base = reference.get("reference")
    coded = [row for row in receipt.tensors if row.relative_error is not None]
    task, auto = task_of(config)
    tags = ["fewbits", file_type.name, *(row.format for row in sorted(coded, key=lambda row: -row.numel)[:1])]
    fields = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        **{key: reference[key] for key in INHERITED if key in reference},
        library_name=file_type.library,
        pipeline_tag=task,
        quantized_by=QUANTIZED_BY,
        tags=tags,
    )
    lines = ["---", fields.to_yaml(), "---", ""]
    version = receipt.versions.get("fewbits", "")
    lines += [f"# {name}", "", f"{base or 'A model'}, quantized by fewbits {version}.", ""]
    lines += [f"- {size(receipt.nbytes)}, {receipt.bits_per_weight:.3f} bits per weight", _method(receipt)]
    lines += [_verified(receipt.verified), *_reference(receipt.verified), *_measured(receipt.evaluation)]
    lines += [f"- receipt: SHA-256 {hashlib.sha256(receipt.to_json().encode()).hexdigest()}", ""]
    lines += ["## What each format holds", "", "```", _formats(receipt), "```", ""]
    run = file_type.run.format(name=name).replace("AutoModelForCausalLM", auto)
    lines += ["## Run it", "", "```", run, "```", ""]
    if receipt.training:
        lines += ["## Training", "", *_training(receipt.training), ""]
    if receipt.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in receipt.notes), ""]
    return "\n".join(lines)


def _training(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table in Markdown of at most ROWS evaluations, the best among them."""
    best = min(history, key=lambda row: float(row["held_out"]))
    each = -(-len(history) // ROWS)
    shown = [row for i, row in enumerate(history) if i % each == 0 or row is best or row is history[-1]]
    lines = ["| step | loss, training text | the same, held out |", "|---|---|---|"]
    for row in shown:
        learned = "" if row["learned"] is None else f"{row['learned']:.4f}"
        mark = " (written)" if row is best else ""
        lines.append(f"| {row['step']} | {learned} | {row['held_out']:.4f}{mark} |")
    return lines


def task_of(config: Mapping[str, Any] | None) -> tuple[str, str]:
    """The hub's name of what a model does, and transformers' class that loads it."""
    named = [str(name) for name in (config or {}).get("architectures") or ()]
    for ending, task in TASKS.items():
        if any(name.endswith(ending) for name in named):
            return task, "AutoModel" if ending == "Model" else f"AutoModel{ending}"
    return "text-generation", "AutoModelForCausalLM"


def _method(receipt: Receipt) -> str:
    how = ", ".join(f"{key} {value}" for key, value in receipt.method.items()) or "rounding to nearest"
    text = receipt.calibration
    return f"- method: {how}" + (f"; {text.get('tokens')} tokens of {text.get('source')}" if text else "")


def _verified(check: Mapping[str, Any]) -> str:
    if check.get("kl") is None:
        reason = f" ({check['reason']})" if check.get("reason") else ""
        return f"- in its engine: {check.get('verdict', 'not checked')}{reason}"
    return (
        f"- in {check['engine']} {check['version']}: {check['verdict']}, {check.get('measure', KL)} "
        f"{check['kl']:.2g} from the decoded weights, largest difference {check['largest']:.3g}"
    )


def _reference(check: Mapping[str, Any]) -> list[str]:
    """The reference in its own engine, if it was tried."""
    found = check.get("reference")
    if not found:
        return []
    if found["kl"] is None:
        return [f"- the reference in its engine: {found['verdict']} ({found['reason']})"]
    return [
        f"- the reference in {found['engine']} {found['version']}: {found['verdict']}, "
        f"{found.get('measure', KL)} {found['kl']:.2g} from fewbits' reading of it"
    ]


def _measured(scores: Mapping[str, Any]) -> list[str]:
    """KL divergence and perplexity, if the receipt has them."""
    if not scores:
        how = "fewbits evaluate REFERENCE THIS --text FILE --record"
        return [f"- quality against the reference: not measured (`{how}`)"]
    if "figures" in scores:  # of a model without a language model's head
        figures = ", ".join(f"{name} {value:.5g}" for name, value in scores["figures"].items())
        return [f"- against the reference: {figures} ({scores['text']}, {scores['texts']} texts)"]
    # Receipts of 0.1.0 have the second name.
    reference = scores.get("reference_perplexity", scores.get("parent_perplexity"))
    ran = f" {scores['ran']}" if scores.get("ran", "").startswith("in ") else ""  # an engine
    return [
        f"- KL divergence to the reference{ran} {scores['kl']:.4f} +- {scores['kl_error']:.4f}, top-1 "
        f"agreement {100 * scores['agreement']:.1f} %",
        f"- perplexity {scores['perplexity']:.3f}, the reference's {reference:.3f} "
        f"({scores['text']}, {scores['tokens']} tokens scored)",
    ]


def _formats(receipt: Receipt) -> str:
    kinds = dict.fromkeys(row.format for row in receipt.tensors)
    lines: list[list[Cell]] = []
    for kind in kinds:
        rows = [row for row in receipt.tensors if row.format == kind]
        lines.append([kind, len(rows), sum(row.numel for row in rows), size(sum(row.nbytes for row in rows))])
    return table(["format", "tensors", "weights", "size"], lines)
