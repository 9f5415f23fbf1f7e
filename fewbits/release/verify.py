"""verify(): load a finished output in an engine that reads it, and compare with its bytes decoded.

    the file  ->  the engine, in a process of its own  ->  logits of a prompt, NEW greedy tokens --.
    the file, decoded in f32  ->  one forward pass, prompt and those tokens  ->  logits          --+-> Outcome

A classifier, a masked model or an embedding model generates nothing: its classes are compared, or its hidden
states.

Engines round activations (llama.cpp to 8 bits, others compute in f16), so logits differ a little; a wrong
nibble order or zero point gives several nats (tests/engines/test_verify.py). Verdict `same` asks for a mean
KL divergence on the prompt below the engine's measured tolerance (engines/__init__.py), and for greedy tokens
that have our largest logit too or nearly: so a cache that is read wrongly shows.

Where inputs have outliers and weights few bits, an engine's rounding of activations alone can exceed that, or
send a token to another expert.
Then a second pass of ours rounds activations the same way (blocks/rounding.py), and the engine must be as
near to it as the tolerance, or at least nearer than the rounding moved it: values near the middle of two
codes are rounded to either side, and a model of very few bits amplifies that.

Our passes have few tokens, so reading the weights is most of the work, and block by block takes as long as
whole: a large model goes block by block from the mapped file, whatever memory is free.

With the reference that an output was made of, reference.py compares both of these with it.

vLLM needs a GPU to run; its reader of configs does not, and names the scheme that takes each weight (verdict
`read`) or the reason why none does (`refused`): the engine lacks the format, the file may be right.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..activations.record import activations_of, record_of
from ..adapters.forward import GENERATES
from ..adapters.transformers import head_of, load_tokenizer
from ..blocks.rounding import engine_rounding
from ..blocks.simulate import Change, changed_inputs
from ..devices import Room
from ..engines import ENGINES, Engine, engines_of
from ..engines.process import Process
from ..errors import FewbitsError, KernelError, ModelError
from ..files.checkpoint import Checkpoint
from ..files.filetype import FileType
from ..files.open import open_checkpoint
from ..memory import Need, free_memory, resident_memory
from ..runtime.runner import Blockwise, Runner, Whole, choose
from ..table import size
from .audit import SAMPLES
from .outcome import COSINE, KL, NEW, Outcome, Trial, wrong_token
from .reference import beside, distance, misread, obstacle, own_engine, stored_type, token_faults

TEXT = "The capital of France is Paris, and the first ten prime numbers are 2, 3, 5, 7, 11, 13, 17, 19 and"
TOKENS = 32
SMALL = 2**30  # bytes: a model that needs no more is run whole


def file_type_of(checkpoint: Checkpoint) -> str:
    """gguf, native, huggingface, or the layout of a quantized directory."""
    return checkpoint.file_type.name


@dataclass(frozen=True)
class _Limits:
    """Of an engine's process."""

    seconds: float
    memory: int | None
    room: Room


def verify(
    path: str | Path,
    seconds: float = 600,
    memory: int | None = None,
    engine: str | None = None,
    room: Room | None = None,
    decoded: Checkpoint | None = None,
    reference: Checkpoint | None = None,
) -> Outcome:
    """Load an output in its engine, in a process of its own, and compare.

    memory: bytes the process may take (default: four times the model in f32, and 4 GiB). engine: another than
    the first of the file type. room: the device of an engine that takes one (default: the CPU), and the bytes
    that our forward pass may take (default: what is free). decoded: the output's values under the names of a
    model, where its own name none that we can run. reference: the model that the output was made of, which is
    compared too. An engine that fails is an Outcome, not an error.
    """
    return next(outcomes(path, seconds, memory, engine, room, decoded, reference))


def outcomes(
    path: str | Path,
    seconds: float = 600,
    memory: int | None = None,
    engine: str | None = None,
    room: Room | None = None,
    decoded: Checkpoint | None = None,
    reference: Checkpoint | None = None,
) -> Iterator[Outcome]:
    """An Outcome for each engine of the file type, in its order; at least one."""
    room, checkpoint = room or Room(), open_checkpoint(Path(path))
    ours = Decoded(decoded or checkpoint, room.left, bool(checkpoint.gguf_keys))
    chosen = [each for each in engines_of(checkpoint, engine) if each.heads or ours.head == "causal"]
    parent = None if reference is None else reference_trial(reference, seconds, memory, room)
    for each in chosen:
        trial = _trial(each, checkpoint, ours, parent, _Limits(seconds, memory, room))
        yield trial.outcome if parent is None else _beside(trial, parent, ours)
    if not chosen:
        reason = f"no engine is known for {file_type_of(checkpoint)} files of this model"
        trial = Trial(Outcome("none", "not checked", reason=reason))
        yield trial.outcome if parent is None else _beside(trial, parent, ours)


def reference_trial(
    reference: Checkpoint, seconds: float, memory: int | None = None, room: Room | None = None
) -> Trial:
    """A reference in its own engine, and our reading of its tensors and its tokenizer. Not checked where it
    cannot be run, with the reason."""
    engine = own_engine(reference)
    if engine is None:
        name = file_type_of(reference)
        return Trial(Outcome("none", "not checked", reason=f"no engine is known for {name} files"))
    reason = obstacle(engine, reference, TOKENS + NEW, memory)
    if reason is not None:
        return Trial(Outcome(engine.name, "not checked", reason=reason))
    room = room or Room()
    ours = Decoded(reference, room.left, bool(reference.gguf_keys))
    trial = _trial(engine, reference, ours, None, _Limits(seconds, memory, room), is_reference=True)
    wrong = misread(reference, trial.said.get("tokens"))
    if wrong is None or trial.outcome.kl is None:
        return trial
    reason = "; ".join(filter(None, (wrong, trial.outcome.reason)))
    return replace(trial, outcome=replace(trial.outcome, verdict="differs", reason=reason))


def _beside(trial: Trial, parent: Trial, ours: Decoded) -> Outcome:
    """The outcome of an output, with its reference's."""
    logits = None
    if "logits" in parent.said:
        theirs = torch.from_numpy(parent.said["logits"]).float()
        try:
            found = ours.logits([*parent.said["prompt"], *trial.said.get("new", ())])
            logits = theirs, found[: len(theirs)]
        except ModelError:  # both engines alone, then
            if "logits" in trial.said:
                logits = theirs, torch.from_numpy(trial.said["logits"]).float()
    faults = token_faults(parent.said.get("tokens"), trial.said.get("tokens"))
    return beside(trial.outcome, parent.outcome, faults, logits, ours.head)


def runner_of(checkpoint: Checkpoint, memory: int | None = None) -> Runner:
    """What our own forward pass goes through: a large model block by block, whatever memory is free.
    ModelError where `memory` bytes (default: what is free) do not suffice."""
    most = max(SMALL, Blockwise(checkpoint).needs(1, TOKENS + NEW))
    return choose(checkpoint, 1, TOKENS + NEW, min(most, free_memory() if memory is None else memory))


def verification_nbytes(checkpoint: Checkpoint, file_type: FileType) -> int:
    """Bytes that our own forward pass takes over this model, or over its output of this file type; 0 where
    the engine of neither is installed."""
    asked = [ENGINES[name].interpreter(getattr(file_type, "method", None)) for name in file_type.engines[:1]]
    own = own_engine(checkpoint)
    if not any(asked) and not (own and own.interpreter(getattr(checkpoint.file_type, "method", None))):
        return 0
    return runner_of(checkpoint, sys.maxsize).needs(1, TOKENS + NEW)


def verification_need(path: Path, engine: str | None = None, memory: int | None = None) -> Need | None:
    """What `verify` will take besides the engine's own process; None where no engine runs the file.
    ModelError where `memory` bytes (default: what is free) do not suffice."""
    checkpoint = open_checkpoint(path)
    method = getattr(checkpoint.file_type, "method", None)
    if not any(each.interpreter(method) and not each.parses for each in engines_of(checkpoint, engine)[:1]):
        return None
    runner, here = runner_of(checkpoint, memory), resident_memory()
    return Need(runner.kind, here + runner.needs(1, TOKENS + NEW), here)


@dataclass
class Decoded:
    """A checkpoint's own forward pass: its weights decoded, in f32. memory: bytes that it may take. gguf: the
    engine is that of a GGUF file.

    ModelError where the model cannot be run.
    """

    checkpoint: Checkpoint
    memory: int | None = None
    gguf: bool = False
    _passes: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def head(self) -> str:
        """What the model gives; one that cannot be run counts as generating text."""
        try:
            return head_of(self.checkpoint)
        except ModelError:
            return "causal"

    @cached_property
    def runner(self) -> Runner:
        if self.head in GENERATES:
            return runner_of(self.checkpoint, self.memory)
        whole, free = Whole(self.checkpoint), free_memory() if self.memory is None else self.memory
        if (needed := whole.needs(1, TOKENS)) > free:
            raise ModelError(f"it needs {size(needed)} of memory, {size(free)} are free")
        return whole

    @property
    def change(self) -> Change | None:
        """How its engine rounds the inputs of weights, where that is known."""
        if (said := record_of(self.checkpoint.metadata, "activations")) is None:
            return engine_rounding(self.checkpoint) if self.gguf else None
        return activations_of(said).change

    def logits(self, ids: list[int]) -> torch.Tensor:
        """`(t, vocabulary)` f32; of a text's classes `(1, classes)`; of embeddings hidden states `(t, h)`.
        Engines that choose the same tokens share a pass."""
        if tuple(ids) not in self._passes:
            self._passes[tuple(ids)] = self._logits(ids)
        return self._passes[tuple(ids)]

    def rounded(self, ids: list[int]) -> torch.Tensor | None:
        """The same with activations rounded as the engine does; None if that is not known."""
        return None if self.change is None else self._logits(ids, self.change)

    @torch.inference_mode()
    def _logits(self, ids: list[int], change: Change | None = None) -> torch.Tensor:
        window, runner = torch.tensor([ids]), self.runner
        if isinstance(runner, Whole) and runner.packed and change is not None:
            runner = Blockwise(self.checkpoint)
        if isinstance(runner, Blockwise):
            try:
                return _block_by_block(runner, window, change)
            except ModelError:  # an architecture whose blocks do not stand alone
                runner = Whole(self.checkpoint)
                if runner.needs(1, len(ids)) > (self.memory or free_memory()):
                    raise
                self.runner = runner
        with nullcontext() if change is None else changed_inputs(runner.model, change):
            if self.head in GENERATES:
                return next(iter(runner.logits(window)))
            out = runner.model(input_ids=window)
        rows: torch.Tensor = out["logits"] if "logits" in out else out["last_hidden_state"]
        return rows[0] if rows.ndim == 3 else rows


def _block_by_block(runner: Blockwise, window: torch.Tensor, change: Change | None) -> torch.Tensor:
    """`(1, t)` int64 -> `(t, vocabulary)` f32, `change` applied to the inputs of every block's weights."""
    runner.start(window)
    for i in range(runner.n_blocks):
        block = runner.blocks.block(i, runner.blocks.weights(i))
        with nullcontext() if change is None else changed_inputs(block.module, change, block.name):
            runner.hidden[0] = block(runner.hidden[0])
        del block  # before the next is decoded
    logits = runner.logits_of(0)
    runner.forget()
    return logits


def _trial(
    engine: Engine,
    checkpoint: Checkpoint,
    ours: Decoded,
    parent: Trial | None,
    limits: _Limits,
    is_reference: bool = False,
) -> Trial:
    """One file in one engine, and decoded by us. parent: its reference's trial."""
    try:
        stored = stored_type(engine, checkpoint, TOKENS + NEW, limits.memory) if is_reference else None
        process = Process(engine, checkpoint, limits.seconds, limits.memory, stored, limits.room)
        if engine.parses:
            return Trial(_parsed(process))
        if not ours.checkpoint.config:
            raise ModelError("only the engine knows the file's architecture")
        said = parent.said if parent else {}
        tokens = said.get("prompt") or prompt(ours.checkpoint)
    except (KernelError, ModelError) as error:
        return Trial(Outcome(engine.name, "not checked", reason=str(error)))
    texts = (said.get("tokens") or {}).get("texts", [TEXT, *SAMPLES])
    start, new = time.monotonic(), 0 if is_reference or ours.head != "causal" else NEW
    name = "AutoModel" if ours.head == "embedding" else None
    try:
        [theirs] = process.logits([tokens], new=new, texts=texts, class_name=name)
    except KernelError as error:
        return Trial(Outcome(engine.name, "failed", reason=str(error), seconds=time.monotonic() - start))
    found = process.said | {"logits": theirs, "new": process.said["new"][0], "prompt": tokens}
    took, left = time.monotonic() - start, found.get("unexpected", [])
    outcome = _compared(engine, ours, tokens, found, took)
    if left and is_reference:
        outcome = replace(outcome, reason="; ".join(filter(None, (_left_out(left), outcome.reason))))
    elif left := sorted(set(left) - set(said.get("unexpected", []))):
        outcome = replace(outcome, verdict="failed", reason=_left_out(left))
    return Trial(outcome if new else replace(outcome, greedy=None), found)


def _left_out(names: Sequence[str]) -> str:
    return f"{len(names)} tensors of the file are left out of the model, such as {', '.join(names[:3])}"


def _compared(
    engine: Engine, ours: Decoded, tokens: list[int], found: Mapping[str, Any], took: float
) -> Outcome:
    """What an engine found, against our pass over the prompt and the tokens that the engine chose."""
    ids = tokens + found["new"]
    try:
        logits = ours.logits(ids)
    except ModelError as error:
        return Outcome(engine.name, "not checked", reason=f"there is nothing to compare with: {error}")
    tolerance = engine.tolerance_of(ours.checkpoint)
    outcome = compared(engine.name, found, logits, tolerance, took, ours.head)
    rounded = None if outcome.kl is None or outcome.verdict == "same" else ours.rounded(ids)
    if rounded is None:
        return outcome
    count, theirs = len(logits) - len(found["new"]), torch.from_numpy(found["logits"]).float()
    near = distance(rounded[:count], theirs, ours.head)
    moved = distance(logits[:count], rounded[:count], ours.head)
    text = (
        f"{outcome.measure} {near:.2g} with activations rounded as {engine.name} rounds them, which alone is "
        f"{moved:.2g}"
    )
    wrong = wrong_token(logits[count - 1 :], found["new"], outcome.largest or 0.0)[1]
    if wrong is not None:
        largest = float((rounded[:count] - theirs[:, : rounded.shape[1]]).abs().max())
        wrong = wrong_token(rounded[count - 1 :], found["new"], largest)[1]
    verdict = "same" if near < max(tolerance, moved) and wrong is None else "differs"
    return replace(outcome, verdict=verdict, reason="; ".join(filter(None, (text, wrong))))


def _parsed(process: Process) -> Outcome:
    start, name = time.monotonic(), process.engine.name
    try:
        list(process.logits([]))
    except KernelError as error:
        return Outcome(name, "failed", reason=str(error), seconds=time.monotonic() - start)
    found = process.said
    verdict = "read" if "read" in found else "refused"
    took = time.monotonic() - start
    return Outcome(name, verdict, found["version"], seconds=took, reason=found[verdict])


def prompt(checkpoint: Checkpoint) -> list[int]:
    """TEXT in the model's tokens; without a tokenizer, ids spread over its vocabulary. ModelError where the
    config does not say how large that is."""
    vocabulary = checkpoint.text_config.get("vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise ModelError(f"its config has {vocabulary!r} as vocab_size, so no tokens can be made up for it")
    try:
        ids = load_tokenizer(checkpoint)(TEXT)["input_ids"][:TOKENS]
    except FewbitsError:
        ids = []
    if len(ids) >= TOKENS // 2 and max(ids) < vocabulary:
        return list(ids)
    return [7919 * (i + 1) % vocabulary for i in range(TOKENS)]


def compared(
    engine: str,
    found: Mapping[str, Any],
    ours: torch.Tensor,
    tolerance: float,
    seconds: float,
    head: str = "causal",
) -> Outcome:
    """found: the engine's logits `(t, vocabulary)` and new tokens. ours: `(t + new, vocabulary)`. head: what
    these rows are; of an embedding they are hidden states, whose tolerance is one of 1 - cosine."""
    theirs = torch.from_numpy(found["logits"]).float()
    count = len(ours) - len(found["new"])
    if theirs.shape[0] != count or theirs.shape[1] < ours.shape[1]:
        reason = f"its logits are {tuple(theirs.shape)}, the file's are {(count, ours.shape[1])}"
        return Outcome(engine, "differs", found["version"], seconds=seconds, reason=reason)
    kl, measure = distance(ours[:count], theirs, head), COSINE if head == "embedding" else KL
    largest = float((ours[:count] - theirs[:, : ours.shape[1]]).abs().max())
    greedy, wrong = wrong_token(ours[count - 1 :], found["new"], largest)
    verdict, note = "same" if kl < tolerance and wrong is None else "differs", wrong or found.get("note")
    return Outcome(engine, verdict, found["version"], largest, kl, greedy, seconds, note, measure=measure)
