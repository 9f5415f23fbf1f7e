"""PEFT: adapters of low rank (LoRA) on a transformers model, whose weights may be packed.

    y = W x + scale B A x      W (n, k) frozen, A (r, k) and B (n, r) trained; scale = alpha / r

Optional: `pip install 'fewbits[lora]'`. What it makes is a plain PeftModel, and what it writes is PEFT's own
directory: adapter_config.json and adapter_model.safetensors.
Sources: LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314 (over quantized weights).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import FileError, KernelError, PlanError
from ..files.adapter import is_adapter
from ..storage.atomic import make_directory

ADAPTER = "default"  # PEFT's name of the only adapter of a model


@dataclass(frozen=True)
class Shape:
    """rank: r. alpha: scale times r. dropout: share of the inputs of A that are dropped while training."""

    rank: int
    alpha: float
    dropout: float = 0.0


@dataclass(frozen=True)
class Factors:
    """A `(r, k)` and B `(n, r)` of one module, what their product is multiplied by, and the share of the
    inputs that is dropped while they are trained."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    dropout: float = 0.0


def add_adapter(model: Any, shape: Shape, modules: Sequence[str], seed: int = 0) -> Any:
    """A transformers model -> a PeftModel with a new adapter on these modules; the model is changed. B begins
    as zeros, A as torch's linear layers do. KernelError if PEFT is not installed."""
    peft = _peft()
    config = peft.LoraConfig(
        r=shape.rank, lora_alpha=shape.alpha, lora_dropout=shape.dropout, target_modules=list(modules),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with _quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def factors_of(model: Any) -> Iterator[tuple[str, Factors]]:
    """The factors of a PeftModel's adapter, by module of the model that is adapted."""
    for name, module in model.get_base_model().named_modules():
        if ADAPTER in getattr(module, "lora_A", {}):
            a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            dropout = float(getattr(module.lora_dropout[ADAPTER], "p", 0.0))
            yield name, Factors(a, b, float(module.scaling[ADAPTER]), dropout)


def check_place(out: Path, overwrite: bool = False) -> None:
    """FileError if something is in the way of an adapter's directory: with overwrite, what is no adapter."""
    if out.exists() and not (overwrite and is_adapter(out)):
        way = "not an adapter" if overwrite else "choose another output or pass --overwrite"
        raise FileError(f"{out}: exists; {way}")


def save_adapter(model: Any, out: Path, base: str, overwrite: bool = False) -> None:
    """Write a PeftModel's adapter as PEFT does, complete or not at all. base: what adapter_config.json names
    as the adapted model."""
    from safetensors import SafetensorError

    check_place(out, overwrite)
    make_directory(out.parent)
    try:
        partial = Path(tempfile.mkdtemp(".partial", f".{out.name[:64]}.", out.parent))
        try:
            model.peft_config[ADAPTER].base_model_name_or_path = base
            with _quiet():
                model.save_pretrained(partial / "new", save_embedding_layers=False)
            _put(partial / "new", out, partial / "old")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _put(new: Path, out: Path, old: Path) -> None:
    """Move a directory to `out`, and what is there to `old`, or back if that fails."""
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(new, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise


def check_shape(shape: Shape) -> None:
    """PlanError for a rank, an alpha or a dropout that no adapter has; KernelError without PEFT."""
    _peft()
    if shape.rank < 1 or not shape.alpha > 0 or not 0 <= shape.dropout < 1:
        raise PlanError(
            f"rank {shape.rank}, alpha {shape.alpha}, dropout {shape.dropout}: a rank is 1 or more, alpha is "
            "positive, dropout a share from 0 up to 1"
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise KernelError(f"peft is not installed ({error}); `pip install 'fewbits[lora]'`") from error
    return peft


@contextmanager
def _quiet() -> Iterator[None]:
    """Without notices of what PEFT asks transformers in an older way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
