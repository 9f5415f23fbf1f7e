"""train_adapter(): a low-rank adapter beside the frozen weights of a quantized model, as a PEFT directory.

base    -> runtime/load.py: its transformers model, weights packed -> adapters/peft.py: A and B beside them
parent  -> the float model, if known: its distributions are the aim, its weights the start (--init loftq)
text    -> train/lora.py -> the best adapter by held-out text -> adapters/peft.py: the directory
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.as_loaded import as_loaded
from ..adapters.peft import Shape, add_adapter, check_place, check_shape, factors_of, save_adapter
from ..adapters.transformers import head_of
from ..calibrate.tokens import Tokens
from ..errors import ModelError, PlanError, raise_all
from ..files.checkpoint import Checkpoint
from ..model.sites import TOWER, sites
from ..qtensor import QTensor
from ..runtime.load import load_packed
from ..runtime.runner import Blockwise
from ..train.lora import Judgement, LoraSettings, fit_adapter, next_token, start_from_error, toward
from ..train.teacher import run_teacher

Progress = Callable[[str, int, int], None]
LOSSES, STARTS = ("next-token", "kl"), ("zero", "loftq")
LEFT_OUT = ("router", TOWER)  # roles of weights in blocks that get no adapter unless named


@dataclass(frozen=True)
class Lora:
    """shape: of the adapter. targets: names of linear layers, or ends of names; none: all of the blocks.
    loss: next-token or kl, to the parent; None: kl where there is a parent. start: zero, or loftq."""

    shape: Shape
    targets: tuple[str, ...] = ()
    loss: str | None = None
    start: str = "zero"

    def loss_for(self, parent: Checkpoint | None) -> str:
        return self.loss or ("next-token" if parent is None else "kl")

    def check(self, parent: Checkpoint | None, settings: LoraSettings) -> None:
        """PlanError for what is unknown, or needs a parent that is not given; KernelError where PEFT is not
        installed."""
        check_shape(self.shape)
        faults = settings.faults()
        for what, given, known in (("loss", self.loss, LOSSES), ("init", self.start, STARTS)):
            if given is not None and given not in known:
                faults.append(f"{what} {given!r} is unknown; known: {', '.join(known)}")
        if parent is None and self.loss == "kl":
            faults.append("the loss kl needs the model before quantization: give it (--parent)")
        if parent is None and self.start == "loftq":
            faults.append("loftq begins at W - W_q: give the model before quantization (--parent)")
        if settings.group is not None and self.start == "loftq":
            faults.append("loftq's A is not constant in groups: leave one of --init loftq, --lora-group out")
        raise_all(PlanError, "lora", faults)


@dataclass(frozen=True)
class Where:
    """device: of the model. overwrite: replace an adapter. name: what the adapter calls its model (default:
    the path). progress: called with (stage, done, total)."""

    device: str = "cpu"
    overwrite: bool = False
    name: str | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Trained:
    """modules: with an adapter. parameters: numbers in it. history: losses on windows held out."""

    out: Path
    modules: tuple[str, ...]
    parameters: int
    loss: str
    history: tuple[Judgement, ...]

    @property
    def best(self) -> Judgement:
        return min(self.history, key=lambda judgement: judgement.held_out)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "out": str(self.out), "best": asdict(self.best)}


def train_adapter(
    base: Checkpoint,
    out: Path,
    tokens: Tokens,
    lora: Lora,
    settings: LoraSettings,
    parent: Checkpoint | None = None,
    where: Where | None = None,
) -> Trained:
    """Train an adapter for `base` on a text and write it to `out`, a PEFT directory. A killed run goes on
    from OUT.state.

    parent: the model before quantization. Raises PlanError, CalibrationError, ModelError; FileError for what
    is in the way of `out`; KernelError where PEFT is not installed."""
    where = where or Where()
    report = where.progress or _silent
    check_place(out, where.overwrite)
    lora.check(parent, settings)
    settings.check(len(tokens.windows))
    base = as_loaded(base)
    if (head := head_of(base)) != "causal":
        raise ModelError(f"{base.path}: generates no text (its head: {head}); an adapter learns next tokens")
    device = torch.device(where.device)
    model: Any = load_packed(base)
    names = adaptable(base, model, lora.targets)
    model = add_adapter(model, lora.shape, list(names), settings.seed).to(device)
    if lora.start == "loftq":
        assert parent is not None
        _start(model, names, base, as_loaded(parent), report)
    objective = next_token(tokens.windows)
    if lora.loss_for(parent) == "kl":
        assert parent is not None
        _check_vocabulary(base, parent)
        runner = Blockwise(as_loaded(parent), device=device)
        objective = toward(run_teacher(runner, tokens.windows, lambda done, n: report("parent", done, n)))
    state = out.with_name(f"{out.name}.state")
    history = fit_adapter(model, tokens.windows, objective, settings, report, state)
    save_adapter(model, out, where.name or str(base.path), where.overwrite)
    state.unlink(missing_ok=True)
    parameters = sum(found.a.numel() + found.b.numel() for _, found in factors_of(model))
    return Trained(out, tuple(names), parameters, lora.loss_for(parent), history)


def adaptable(base: Checkpoint, model: nn.Module, targets: tuple[str, ...]) -> dict[str, str]:
    """The modules that get an adapter -> the names of their weights in the checkpoint. PlanError that lists
    the known names for a target that no linear layer has."""
    known = {
        (base.seen[site.name].module if site.name in base.seen else "")
        or site.name.removesuffix(".weight"): site
        for site in sites(base)
    }
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = {name: site for name, site in known.items() if name in linear}
    inside = {
        name: site.name
        for name, site in known.items()
        if site.block is not None and site.role not in LEFT_OUT
    }
    if not targets:
        if not inside:
            raise ModelError(
                f"{base.path}: no linear layer in its blocks is known; name some (--lora-targets)"
            )
        return inside
    return {name: known[name].name for name in _named(list(known), targets)}


def check_names(checkpoint: Checkpoint, targets: tuple[str, ...]) -> None:
    """`adaptable`'s PlanError, as far as names tell before there is a model."""
    known = [
        name.removesuffix(".weight") for name, each in checkpoint.tensors.items() if len(each.shape) == 2
    ]
    seen = [checkpoint.seen[site.name].module for site in sites(checkpoint) if site.name in checkpoint.seen]
    _named([*known, *filter(None, seen)], targets)


def _named(known: Sequence[str], targets: tuple[str, ...]) -> list[str]:
    """The names that are a target, or end in one."""
    chosen: list[str] = []
    faults = []
    for target in targets:
        found = [name for name in known if name == target or name.endswith(f".{target}")]
        chosen += found
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in known})
            faults.append(f"no linear layer is called {target!r}; there are {', '.join(ends)}")
    raise_all(PlanError, "--lora-targets", faults)
    return list(dict.fromkeys(chosen))


def _start(model: Any, names: dict[str, str], base: Checkpoint, parent: Checkpoint, report: Progress) -> None:
    """A and B of each module from the error of its weight."""
    for done, (module, found) in enumerate(factors_of(model)):
        report("loftq", done, len(names))
        name = names[module]
        before, now = (_floats(each, name, found.b.device) for each in (parent, base))
        if before.shape != now.shape or min(now.shape) < found.a.shape[0]:
            raise ModelError(
                f"{name}: {tuple(now.shape)} here, {tuple(before.shape)} in {parent.path}, rank "
                f"{found.a.shape[0]}; loftq needs the same shape and a rank not above it"
            )
        start_from_error(found, before - now)
    report("loftq", len(names), len(names))


def _floats(checkpoint: Checkpoint, name: str, device: torch.device) -> torch.Tensor:
    if name not in checkpoint.tensors:
        raise ModelError(f"{checkpoint.path}: has no {name}; give the parent of the same architecture")
    value = checkpoint.tensors[name].load()
    return (value.decode() if isinstance(value, QTensor) else value.float()).to(device)


def _check_vocabulary(base: Checkpoint, parent: Checkpoint) -> None:
    ours, theirs = (each.text_config.get("vocab_size") for each in (base, parent))
    if ours != theirs:
        raise ModelError(
            f"{parent.path}: a vocabulary of {theirs}, that of {base.path} has {ours}; it is not its parent"
        )


def _silent(stage: str, done: int, total: int) -> None:
    pass
