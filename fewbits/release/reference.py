"""An output beside the model that it was made of.

    the reference, in its own engine (transformers' loader; llama.cpp for GGUF)  ->  logits, tokens --.
    the reference, decoded by us  ->  logits                        within the tolerance? ------------+
    the output, decoded by us     ->  logits             loss: KL divergence to the engine's ---------+
    the output, in its engine     ->  tokens, ends of text, template              equal? -------------'

The first comparison finds what `verify` of the output alone cannot: a wrong reading of the input (theta of
the rotary embedding, a head, a tie) goes into the output, and its engine then agrees with it.

The loss of quantization has no bound in general, but one in sense: an output that is farther from the
reference than equal probabilities for all tokens holds nothing of it. On the demo model that is 9.55 nats;
q2_k, rounded to nearest without data, is at 0.94.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import log
from typing import Any

import torch

from ..adapters.transformers import load_tokenizer
from ..dtypes import DTYPES
from ..engines import Engine, engines_of
from ..errors import FewbitsError
from ..files.checkpoint import Checkpoint
from ..memory import free_memory
from ..runtime.runner import Blockwise, Whole
from .outcome import Outcome


def own_engine(reference: Checkpoint) -> Engine | None:
    """The engine that runs a reference: the first of its file type that is installed, else the first."""
    method = getattr(reference.file_type, "method", None)
    running = [engine for engine in engines_of(reference) if not engine.parses]
    return next((each for each in running if each.interpreter(method)), next(iter(running), None))


def _needs(engine: Engine, reference: Checkpoint, tokens: int) -> dict[str | None, int]:
    """Bytes of memory that an engine takes for a reference, by the type that weights stay in (None: f32)."""
    if engine.mapped:
        return {None: reference.nbytes}
    needs: dict[str | None, int] = {None: Whole(reference).needs(1, tokens)}
    names = {tensor.dtype for tensor in reference.tensors.values()}
    stored = DTYPES.get(names.pop()) if len(names) == 1 else None  # a loader that keeps bf16 rounds f32 too
    if engine.by_layer and stored and stored.weight:
        needs[stored.torch_name] = reference.nbytes + Blockwise(reference).needs(1, tokens)
    return needs


def stored_type(engine: Engine, reference: Checkpoint, tokens: int, memory: int | None) -> str | None:
    """The type that weights stay in where f32 takes more than `memory` bytes (default: what is free)."""
    free = min(free_memory(), memory or free_memory())
    fitting = [kind for kind, nbytes in _needs(engine, reference, tokens).items() if nbytes <= free]
    return None if None in fitting else next(iter(fitting), None)


def obstacle(engine: Engine, reference: Checkpoint, tokens: int, memory: int | None) -> str | None:
    """Why a reference cannot be run in a process of `memory` bytes (default: what is free), if so."""
    if not reference.path.exists():
        return f"{reference.path} is not there"
    needs = min(_needs(engine, reference, tokens).values())
    free = min(free_memory(), memory or free_memory())
    if needs <= free:
        return None
    return f"{engine.name} needs {needs / 2**30:.2f} GiB of memory for it, {free / 2**30:.2f} GiB are free"


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean KL divergence in nats of logits `(t, vocabulary)`; one of them may be padded to more."""
    width = min(ours.shape[1], theirs.shape[1])
    p, q = (x[:, :width].double().log_softmax(-1) for x in (ours, theirs))
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))  # rounding may leave -1e-12


def distance(ours: torch.Tensor, theirs: torch.Tensor, head: str) -> float:
    """The divergence; of embeddings `(t, h)` mean 1 - cosine."""
    if head != "embedding":
        return divergence(ours, theirs)
    a, b = ours.double(), theirs.double()
    return max(0.0, float(1 - torch.nn.functional.cosine_similarity(a, b).mean()))


def misread(reference: Checkpoint, tokens: Mapping[str, Any] | None) -> str | None:
    """Where our tokenizer of a reference differs from its engine's; None where it does not."""
    if not tokens:
        return None
    try:
        tokenizer = load_tokenizer(reference)
    except FewbitsError as error:
        return f"its tokenizer cannot be loaded: {error}"
    for text, ids in zip(tokens["texts"], tokens["ids"], strict=True):
        if (ours := list(tokenizer(text)["input_ids"])) != ids:
            return f"{text[:20]!r} ... becomes {_parting(ours, ids)} here"
    return None


def token_faults(reference: Mapping[str, Any] | None, output: Mapping[str, Any] | None) -> list[str]:
    """What an output's engine does otherwise than the reference's with texts."""
    if not reference or not output:
        return []
    faults = []
    for text, ids, found in zip(reference["texts"], reference["ids"], output["ids"], strict=False):
        if ids != found:
            faults.append(f"{text[:20]!r} ... becomes {_parting(found, ids)}")
    if reference["bos"] not in (None, output["bos"]):
        faults.append(f"the token that begins a text is {output['bos']}, the reference's {reference['bos']}")
    ends = sorted(set(reference["ends"]) - set(output["ends"]))
    if ends:
        faults.append(f"it does not stop at {', '.join(map(str, ends))}, which end the reference's text")
    if reference["template"] and reference["template"] != output["template"]:
        faults.append(f"its chat template {'differs' if output['template'] else 'is missing'}")
    return faults


def _parting(found: list[int], wanted: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b),
              min(len(found), len(wanted)))  # fmt: skip
    a, b = found[at : at + 3], wanted[at : at + 3]
    return f"tokens {a or 'none'} instead of {b or 'none'} in place {at + 1}"


def beside(
    outcome: Outcome,
    reference: Outcome,
    tokens: list[str],
    logits: tuple[torch.Tensor, torch.Tensor] | None,
    head: str = "causal",
) -> Outcome:
    """The outcome of an output, with that of its reference. tokens: faults of its tokens. logits: the
    reference's by its engine, the output's by us. head: what they are; one text's classes may well be near
    equal probabilities, so only tokens are compared with these."""
    faults, loss = list(tokens), None
    if reference.verdict == "differs":
        faults.insert(0, "fewbits reads the reference otherwise than its own engine does")
    if logits is not None:
        loss, flat = distance(*logits, head), flatness(logits[0])
        if loss > flat and head in ("causal", "masked"):
            faults.append(
                f"its KL divergence to the reference is {loss:.3g}, more than the {flat:.3g} of equal "
                "probabilities for all tokens: nothing of the model is left; use more bits, or --calibrate"
            )
    outcome = replace(outcome, reference=reference, loss=loss)
    if outcome.verdict == "failed" and outcome.reason == reference.reason:
        return replace(outcome, verdict="not checked", reason=f"nor is the reference: {outcome.reason}")
    if not faults or outcome.verdict == "failed":
        return outcome
    reason = "; ".join(filter(None, (*faults, outcome.reason)))
    return replace(outcome, verdict="differs", reason=reason)


def flatness(logits: torch.Tensor) -> float:
    """KL divergence in nats from logits `(t, vocabulary)` to equal probabilities: log V - entropy."""
    p = logits.float().log_softmax(-1).double()
    return float(log(p.shape[1]) + (p.exp() * p).sum(-1).mean())
