"""Weights of one shape whose codes are chosen at once: the experts of a layer, on a GPU.

A stage goes through its weights one by one. When the turn of one comes that `gptq_batch` takes, codes are
chosen for as many of those after it as are like it and fit, each from its own statistics. They wait here for
their turn. What cannot be batched, or fails there, is left to the stage, which says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...algorithms.columns import in_lockstep
from ...algorithms.gptq import Settings, gptq_batch, most_at_once
from ...calibrate.stats import Stats
from ...errors import CalibrationError, FormatError
from ...formats.trained import kept_codes
from ...qtensor import QTensor
from ..task import Spec


class Chosen(NamedTuple):
    """A weight `(n, k)`, where the model is, and its codes."""

    w: torch.Tensor
    q: QTensor


@dataclass(frozen=True)
class Candidate:
    """A weight to come. load: gives it, `(n, k)`, where the model is. again: it was quantized before, so that
    codes for which it was trained are not kept."""

    spec: Spec
    stats: Stats
    shape: tuple[int, int]
    load: Callable[[], torch.Tensor]
    again: bool = False

    @property
    def fits(self) -> bool:
        """Can its codes be chosen together with others at all?"""
        hessian = self.stats.hessian
        if self.spec.algorithm != "gptq" or self.spec.pruning is not None or hessian is None:
            return False
        return self.shape[1] == len(hessian) and in_lockstep(self.spec.format, self.shape[1], hessian)

    def like(self, other: Candidate) -> bool:
        mine, theirs = ((x.shape, x.spec.format, dict(x.spec.options)) for x in (self, other))
        return mine == theirs


class Ahead:
    """The weights of a stage, by their turn; None where one has to be alone."""

    def __init__(self, stage: Sequence[Candidate | None]) -> None:
        self._waiting = {i: each for i, each in enumerate(stage) if each is not None and each.fits}
        self._found: dict[int, Chosen] = {}

    def take(self, turn: int) -> Chosen | None:
        """What was chosen for the weight whose turn it is; None if nothing was."""
        if turn in self._waiting:
            first = self._waiting[turn]
            like = [i for i, each in self._waiting.items() if each.like(first)][: most_at_once(*first.shape)]
            batch = {i: self._waiting.pop(i) for i in like}
            if len(batch) > 1:
                self._found |= _chosen(batch)
        return self._found.pop(turn, None)


def _chosen(batch: Mapping[int, Candidate]) -> dict[int, Chosen]:
    """Those of the batch for which codes could be chosen together."""
    try:
        ws = {i: w for i, each in batch.items() if _moves(each, w := each.load())}
        if len(ws) < 2:
            return {}
        first = batch[next(iter(ws))].spec
        stats = [batch[i].stats for i in ws]
        found = gptq_batch([*ws.values()], first.format, stats, Settings(**first.options))
    except (CalibrationError, FormatError, torch.OutOfMemoryError):
        return {}  # one by one: what is wrong with one of them is said with its name
    return {i: Chosen(w, q) for (i, w), q in zip(ws.items(), found, strict=True) if q is not None}


def _moves(each: Candidate, w: torch.Tensor) -> bool:
    """Whether new codes are chosen for it: it does not lie on a grid for which it was trained."""
    return each.again or kept_codes(w, each.spec.format) == (None, None)
