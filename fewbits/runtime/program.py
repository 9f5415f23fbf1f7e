"""A model that generates no text as a program of torch.export: one .pt2 file, run by torch alone.

    input_ids, attention_mask[, token_type_ids] -> {"logits": ...} or {"last_hidden_state": ...}

    program = torch.export.load("model.pt2").module()

Quantized weights stay packed: their planes are the program's state, and its operations decode a weight at
each use. The file is written by torch.export.save, loaded again, and compared with the model on tokens of
another number and length before it gets its name. Source: pytorch.org/docs, torch.export.
"""

from __future__ import annotations

import os
from math import isnan
from pathlib import Path
from typing import Any

import torch

from ..adapters.exported import exported_program, inputs_of
from ..adapters.forward import GENERATES
from ..adapters.transformers import head_of
from ..errors import FileError, ModelError
from ..files.checkpoint import Checkpoint
from ..storage.atomic import make_directory
from .load import load_packed

SUFFIX = ".pt2"
TOLERANCE = 1e-5  # of the largest number of an output


def save_program(checkpoint: Checkpoint, out: Path, overwrite: bool = False) -> float:
    """Write a model as a program -> the largest difference of its output to the model's, in parts of the
    largest number.

    FileError if `out` exists, ModelError for a model that generates text, one that torch.export cannot
    follow, and a program that computes something else.
    """
    if out.exists() and not overwrite:
        raise FileError(f"{out}: exists; choose another output or pass overwrite")
    if head_of(checkpoint) in GENERATES:
        raise ModelError(f"{checkpoint.path}: generates text, and a program has no cache; use gguf or onnx")
    make_directory(out.parent)
    model = load_packed(checkpoint)
    partial = out.with_name(f"{out.stem}.partial{SUFFIX}")
    try:
        torch.export.save(exported_program(model), partial)
        apart = _apart(model, partial)
        if isnan(apart):
            raise ModelError(f"{checkpoint.path}: its output is not finite; its weights are damaged")
        if not apart < TOLERANCE:
            raise ModelError(
                f"{out}: its output differs from the model's by {apart:.2g} of the largest number"
            )
        os.replace(partial, out)
    except OSError as error:
        raise FileError(f"{out}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return apart


@torch.no_grad()
def _apart(model: Any, path: Path) -> float:
    program, generator = torch.export.load(path).module(), torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    given = {name: torch.ones(3, 21, dtype=torch.int64) for name in inputs_of(model)}
    given["input_ids"] = torch.randint(size, (3, 21), generator=generator)
    if "token_type_ids" in given:
        given["token_type_ids"][:, :9] = 0
    given["attention_mask"][0, 15:] = 0
    wanted, found = model(**given), program(**given)
    return max(float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in found)
