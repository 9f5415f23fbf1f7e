"""verify(): load a finished output in the engine it is for, and compare with what its bytes mean.

    the file, decoded by fewbits  ->  transformers, f32            ->  logits, greedy tokens  --.
    the file itself               ->  the engine, a process apart  ->  logits, greedy tokens  --+-> Outcome

Engines round activations (llama.cpp to 8 bits, others compute in f16), so logits differ a little; a wrong
nibble order or zero point makes another model. Between the two lies a wide gap: verdict `same` asks for a
mean KL divergence below SAME. On the demo model in 4 bits llama.cpp comes to 0.01, GPTQModel to 3e-5; one
that reads zero points off by one comes to several nats (tests/engines/test_verify.py). The first token of the
continuation that differs must be a near tie, by as much as the logits of the prompt differ: so a cache that
is read wrongly shows.

Where inputs have outliers and weights few bits, an engine's rounding of activations alone can exceed that:
then it is put into our forward (blocks/rounding.py), and the engine must be as near to this as SAME, or at
least nearer than the rounding moved it: what lies near the middle of two codes falls to either side, and a
model that has lost its way makes much of it.

vLLM needs a GPU to run; its reader of configs does not, and says what would take each weight (verdict `read`)
or why nothing does (`refused`): that engine lacks the format, which says nothing against the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..adapters.transformers import load_model, load_tokenizer
from ..blocks.rounding import engine_rounding
from ..blocks.simulate import changed_inputs
from ..errors import FewbitsError, KernelError, ModelError, PlanError
from ..files.checkpoint import Checkpoint
from ..files.open import open_checkpoint
from .engines import ENGINES, SCRIPTS, Engine

SAME = 0.05  # nats a token
TEXT = "The capital of France is Paris, and the first ten prime numbers are 2, 3, 5, 7, 11, 13, 17, 19 and"
TOKENS, NEW = 32, 8


@dataclass(frozen=True)
class Outcome:
    """What an engine made of an output. verdict: "same", "differs", "failed", "not checked", or "read" and
    "refused" of one that only reads the config; reason: of all but the first, of which what had to be done.
    largest: difference of two logits, kl: mean of the positions, nats. greedy: how many of the
    `NEW` tokens agree before the first that does not."""

    engine: str
    verdict: str
    version: str | None = None
    largest: float | None = None
    kl: float | None = None
    greedy: int | None = None
    seconds: float | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """One line for people."""
        if self.verdict == "not checked":
            return f"not checked: {self.reason}"
        if self.verdict == "failed":
            return f"{self.engine} failed: {self.reason}"
        if self.verdict in ("read", "refused"):
            return f"{self.verdict} by {self.engine} {self.version}: {self.reason}"
        if self.kl is None:  # of another shape
            return f"{self.verdict} in {self.engine} {self.version}: {self.reason}"
        return (
            f"{self.verdict} in {self.engine} {self.version}: KL divergence {self.kl:.2g}, largest logit "
            f"difference {self.largest:.3g}, {self.greedy} of {NEW} greedy tokens, {self.seconds:.0f} s"
            + (f"; {self.reason}" if self.reason else "")
        )


def file_type_of(checkpoint: Checkpoint) -> str:
    """gguf, native, huggingface, or the layout of a quantized directory."""
    return checkpoint.file_type.name


def engines_of(checkpoint: Checkpoint, name: str | None = None) -> list[Engine]:
    """The engines that an output is for, or the one of this name; PlanError where that does not read it."""
    kind = file_type_of(checkpoint)
    found = ENGINES.get(kind, ())
    chosen = [engine for engine in found if name is None or engine.name.lower() == name.lower()]
    if name is not None and not chosen:
        known = ", ".join(engine.name for engine in found) or "none is known"
        raise PlanError(f"{name!r} is no engine that {kind} files are tried in: {known}")
    return chosen


def verify(
    path: str | Path, seconds: float = 600, memory: int | None = None, engine: str | None = None
) -> Outcome:
    """Load an output in its engine, in a process of its own, and compare.

    memory: bytes the process may take (default: four times the model in f32, and 4 GiB). engine: another than
    the first that the file type is for. One that fails is an Outcome, not an error.
    """
    return next(outcomes(path, seconds, memory, engine))


def outcomes(
    path: str | Path, seconds: float = 600, memory: int | None = None, engine: str | None = None
) -> Iterator[Outcome]:
    """What each engine that the output is for makes of it, in the order of ENGINES; at least one."""
    checkpoint = open_checkpoint(Path(path))
    chosen = engines_of(checkpoint, engine)
    weights = sum(int(np.prod(tensor.shape)) for tensor in checkpoint.tensors.values())
    reference = _Reference(checkpoint)
    for each in chosen:
        python = each.interpreter()
        if python is None:
            missing = " and ".join(each.packages)
            yield Outcome(each.name, "not checked", reason=f"{missing} is not installed ({each.install})")
            continue
        process = _Process(each, python, Path(path), seconds, memory or 16 * weights + 4 * 2**30)
        yield _parsed(process) if each.parses else _compared(process, reference)
    if not chosen:
        yield Outcome(
            "none", "not checked", reason=f"no engine is known for {file_type_of(checkpoint)} files"
        )


class Meaning(NamedTuple):
    """What an output's bytes mean. logits: `(t, vocabulary)` f32 of the prompt. new: NEW greedy tokens after
    it; ahead: `(NEW, vocabulary)`, the logits that each was chosen from."""

    logits: torch.Tensor
    new: list[int]
    ahead: torch.Tensor


@dataclass(frozen=True)
class _Reference:
    """The meaning of a checkpoint, computed once for all engines."""

    checkpoint: Checkpoint

    @cached_property
    def tokens(self) -> list[int]:
        return prompt(self.checkpoint)

    @cached_property
    def meaning(self) -> Meaning:
        return decoded(self.checkpoint, self.tokens)

    @torch.no_grad()
    def rounded(self) -> torch.Tensor | None:
        """Logits `(t, vocabulary)` with activations rounded as the engine does; None if that is not known."""
        change = engine_rounding(self.checkpoint)
        if change is None:
            return None
        model = load_model(self.checkpoint)
        with changed_inputs(model, change):
            return model(torch.tensor([self.tokens])).logits[0].float()


def _compared(process: _Process, reference: _Reference) -> Outcome:
    name = process.engine.name
    try:
        meaning = reference.meaning
    except ModelError as error:
        return Outcome(name, "not checked", reason=f"there is nothing to compare with: {error}")
    start = time.monotonic()
    try:
        found = process.run(reference.tokens, meaning.new)
    except KernelError as error:
        return Outcome(name, "failed", reason=str(error), seconds=time.monotonic() - start)
    outcome = compared(name, found, meaning, time.monotonic() - start)
    rounded = None if outcome.kl is None or outcome.kl < SAME else reference.rounded()
    if rounded is None:
        return outcome
    near, moved = divergence(rounded, torch.from_numpy(found["logits"])), divergence(meaning.logits, rounded)
    said = (
        f"KL divergence {near:.2g} with activations rounded as {name} rounds them, which alone is {moved:.2g}"
    )
    apart = parted(meaning, found["new"], outcome.largest or 0.0)
    verdict = "same" if near < max(SAME, moved) and apart is None else "differs"
    return replace(outcome, verdict=verdict, reason="; ".join(filter(None, (said, apart))))


def _parsed(process: _Process) -> Outcome:
    start, name = time.monotonic(), process.engine.name
    try:
        found = process.run([], [])
    except KernelError as error:
        return Outcome(name, "failed", reason=str(error), seconds=time.monotonic() - start)
    verdict = "read" if "read" in found else "refused"
    took = time.monotonic() - start
    return Outcome(name, verdict, found["version"], seconds=took, reason=found[verdict])


def prompt(checkpoint: Checkpoint) -> list[int]:
    """TEXT in the model's tokens; without a tokenizer, ids spread over its vocabulary."""
    vocabulary = int(checkpoint.config.get("text_config", checkpoint.config)["vocab_size"])
    try:
        ids = load_tokenizer(checkpoint)(TEXT)["input_ids"][:TOKENS]
    except FewbitsError:
        ids = []
    if len(ids) >= TOKENS // 2 and max(ids) < vocabulary:
        return list(ids)
    return [7919 * (i + 1) % vocabulary for i in range(TOKENS)]


@torch.no_grad()
def decoded(checkpoint: Checkpoint, tokens: list[int]) -> Meaning:
    """The bytes decoded, by transformers in f32."""
    model, ids, ahead = load_model(checkpoint), list(tokens), []
    logits = last = model(torch.tensor([ids])).logits[0].float()
    for _ in range(NEW):
        ahead.append(last[-1].float())
        ids.append(int(last[-1].argmax()))
        last = model(torch.tensor([ids])).logits[0]
    return Meaning(logits, ids[len(tokens) :], torch.stack(ahead))


def compared(engine: str, found: dict[str, Any], meaning: Meaning, seconds: float) -> Outcome:
    """The engine's logits and tokens beside ours -> Outcome."""
    theirs, ours = torch.from_numpy(found["logits"]).float(), meaning.logits
    if theirs.shape[0] != ours.shape[0] or theirs.shape[1] < ours.shape[1]:
        reason = f"it gave logits {tuple(theirs.shape)}, the file means {tuple(ours.shape)}"
        return Outcome(engine, "differs", found["version"], seconds=seconds, reason=reason)
    kl, largest = divergence(ours, theirs), float((ours - theirs[:, : ours.shape[1]]).abs().max())
    apart = parted(meaning, found["new"], largest)
    verdict = "same" if kl < SAME and apart is None else "differs"
    pairs = zip(meaning.new, found["new"], strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(meaning.new))
    return Outcome(engine, verdict, found["version"], largest, kl, same, seconds, apart or found.get("note"))


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean KL divergence in nats of logits `(t, vocabulary)`; theirs may be padded to more."""
    p, q = (x[:, : ours.shape[1]].float().log_softmax(-1).double() for x in (ours, theirs))
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))  # rounding may leave -1e-12


def parted(meaning: Meaning, new: Sequence[int], largest: float) -> str | None:
    """Why the first greedy token that differs is no near tie; None where all agree, or it is one: two logits
    that are each off by `largest` at most change places if they are no more than twice that apart."""
    for i, (ours, theirs) in enumerate(zip(meaning.new, new, strict=True)):
        if ours == theirs:
            continue
        gap = float(meaning.ahead[i][ours] - meaning.ahead[i][theirs])
        if gap <= 2 * largest:
            return None
        return (
            f"it continues with token {theirs} instead of {ours} in place {i + 1}, whose logit is lower "
            f"by {gap:.3g}, and no logit of the prompt is off by more than {largest:.3g}"
        )
    return None


@dataclass(frozen=True)
class _Process:
    """An engine's script on a file, within limits."""

    engine: Engine
    python: str
    path: Path
    seconds: float
    memory: int

    def run(self, tokens: list[int], expected: list[int]) -> dict[str, Any]:
        """-> logits, new, version, or what a parser said; KernelError if it fails or takes too much."""
        with tempfile.TemporaryDirectory() as name:
            task, result, said = (Path(name) / part for part in ("task.json", "result.npz", "said.txt"))
            about = {"tokens": tokens, "new": NEW, "expected": expected}
            about |= {"threads": torch.get_num_threads(), "imports": self.engine.imports}
            task.write_text(json.dumps(about))
            script = str(SCRIPTS / self.engine.script)
            command = [self.python, script, str(self.path.resolve()), str(task), str(result)]
            with said.open("wb") as out:
                process = subprocess.Popen(command, stdout=out, stderr=out, env=self.environment(), cwd=name)
                _watch(process, self.seconds, self.memory)
            lines = said.read_text(errors="replace").strip().splitlines()
            if process.returncode != 0 or not (result.exists() or self.engine.parses):
                why = " | ".join(lines[-3:]) or "it said nothing"
                raise KernelError(f"exit code {process.returncode}: {why}")
            last: dict[str, Any] = json.loads(lines[-1])
            if self.engine.parses:
                return last
            with np.load(result) as arrays:
                return {
                    **{key: arrays[key] for key in arrays},
                    "version": last["version"],
                    "note": last.get("note"),
                }

    def environment(self) -> dict[str, str]:
        found = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
        if self.python != sys.executable:
            found.pop("PYTHONPATH", None)
        elif self.engine.imports:  # ours: found there as it was found here
            here = [str(Path(__file__).parents[1]), *found.get("PYTHONPATH", "").split(os.pathsep)]
            found["PYTHONPATH"] = os.pathsep.join(filter(None, here))
        return found


def _watch(process: subprocess.Popen[bytes], seconds: float, memory: int) -> None:
    """Wait for the process; kill it, with KernelError, beyond its time or resident bytes."""
    start, status = time.monotonic(), Path(f"/proc/{process.pid}/status")
    try:
        while process.poll() is None:
            if time.monotonic() - start > seconds:
                raise KernelError(f"it took more than {seconds:.0f} s")
            lines = status.read_text().splitlines() if status.exists() else []
            held = next((int(li.split()[1]) * 1024 for li in lines if li.startswith("VmRSS")), 0)
            if held > memory:
                raise KernelError(f"it took more than {memory / 2**30:.1f} GiB of memory")
            time.sleep(0.05)
    except (FileNotFoundError, ProcessLookupError):
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
