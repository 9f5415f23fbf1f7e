"""Paused: a block's forward pass that stops at requested inputs and can be continued.

    batch 0   ----q k v reached| wait |----o reached| wait |---- ...      one greenlet per batch: a call stack
    batch 1                    |------|             |----- ...            that can be left and resumed

So sites can be quantized in the order of their inputs, each with the inputs after the earlier sites are
quantized, in a single pass through the block: a waiting pass continues with the weights that are then in the
module. Nothing runs in parallel, and the numbers equal those of a separate pass for each site. The cost is
the memory of the waiting passes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch

from ..blocks.block import Block


class Paused:
    """The pass of one batch `(b, t, h)` through a block, which stops when one of `stops` reads its input."""

    def __init__(self, block: Block, hidden: torch.Tensor, stops: Collection[str]):
        from greenlet import getcurrent, greenlet

        self._block, self._hidden, self._stops = block, hidden, stops
        self._current = getcurrent
        self._stack = greenlet(self._run)
        self.output: torch.Tensor | None = None

    def next(self) -> tuple[str, torch.Tensor] | None:
        """Continue to the next stop -> its site and input `(rows, k)`; None at the end, when `output` is set.
        Exceptions of the pass are raised here."""
        return self._stack.switch()

    def close(self) -> None:
        """Abandon the pass."""
        if self._stack and not self._stack.dead:
            self._stack.throw()

    def _run(self) -> None:
        with torch.no_grad():
            self.output = self._block.watched(self._hidden, self._watch)

    def _watch(self, name: str, x: torch.Tensor) -> None:
        if name in self._stops:
            self._current().parent.switch((name, x))


class Passes:
    """The paused passes of many batches through one block; abandoned at the end of a `with`."""

    def __init__(self, block: Block, batches: Iterable[torch.Tensor], stops: Collection[str]):
        self._passes = [Paused(block, hidden, stops) for hidden in batches]

    def __enter__(self) -> Sequence[Paused]:
        return self._passes

    def __exit__(self, *_: object) -> None:
        for each in self._passes:
            each.close()


@torch.no_grad()
def observed_groups(block: Block, hidden: torch.Tensor, sites: Collection[str]) -> list[list[str]]:
    """The sites by input, in the order of their inputs, from one short pass."""
    groups: list[tuple[torch.Tensor, list[str]]] = []

    def watch(name: str, x: torch.Tensor) -> None:
        if name not in sites:
            return
        for seen, names in groups:
            if seen is x:
                names.append(name)
                return
        groups.append((x, [name]))

    block.watched(block.short(hidden), watch)
    return [names for _, names in groups]
