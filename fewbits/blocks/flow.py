"""Flow: what a block reads and hands on, in the columns of one tensor.

    packed (b, t, c) --enter--> hidden states, arguments --block--> results --leave--> packed (b, t, c)

Plain models have hidden states `(b, t, h)` and nothing else; for them both steps do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..errors import ModelError
from .columns import Columns, Extent
from .stand_in import Call, Handed, Pass, Products

_PLAIN = (1, True, False), (1, False, True)


class Flow:
    """known: what each block gives, as Extents. ids: whether blocks read the token ids."""

    def __init__(self, hidden: Extent, ids: bool, read: Sequence[Handed], known: Sequence[Products]) -> None:
        self.known, self.reads_ids = known, ids
        self.plain = hidden.sides[:2] == _PLAIN and len(hidden.sides) == 3 and not ids and not read
        tokens = [Extent(_PLAIN, torch.int64)] if ids else []
        extents = [hidden, *tokens]
        for handed in read:
            given = [hidden, *known[handed.block].tensors()]
            extents.append(given[handed.number])
        self._columns = Columns(extents)
        self._places = {handed: i for i, handed in enumerate(read, 1 + ids)}
        self.whole_rows = any(extent.follows_length for extent in extents)

    def pack(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The input of block 0, of tokens `(b, t)`."""
        if self.plain:
            return hidden
        like = torch.empty(0, dtype=hidden.dtype, device=hidden.device).expand(*ids.shape, 0)
        rest = [None] * len(self._places)
        return self._columns.joined([hidden, *([ids] if self.reads_ids else []), *rest], like)

    def hidden(self, packed: torch.Tensor) -> torch.Tensor:
        return packed if self.plain else self._columns.part(packed, 0)

    def ids(self, packed: torch.Tensor) -> torch.Tensor:
        return self._columns.part(packed, 1)

    def enter(self, packed: torch.Tensor, call: Call) -> tuple[torch.Tensor, Call]:
        """-> hidden states, and the call with what earlier blocks handed on."""
        if self.plain:
            return packed, call

        def value(x: torch.Tensor | Handed) -> torch.Tensor:
            return self._columns.part(packed, self._places[x]) if isinstance(x, Handed) else x

        return self.hidden(packed), call.changed(value)

    def leave(self, block: int, packed: torch.Tensor, hidden: torch.Tensor, gave: Products) -> torch.Tensor:
        """-> packed, with the block's hidden states and what it hands on."""
        if self.plain:
            return hidden
        b, t, width = packed.shape
        columns = list(packed.split(self._columns.widths(width), -1))
        tensors = [hidden, *gave.tensors()]
        placed = {0: 0} | {i: key.number for key, i in self._places.items() if key.block == block}
        for i, number in placed.items():
            columns[i] = self._columns.parts[i].to_columns(tensors[number], b, t, packed.dtype)
        return torch.cat(columns, -1)


PLAIN = Flow(Extent((*_PLAIN, (1, False, False)), torch.float32), False, [], [])


def extents_of(first: Sequence[Products], second: Sequence[Products]) -> list[Products]:
    """What blocks gave in the passes of PROBES -> the same with Extents; None for those of no known shape."""
    made = []
    for one, other in zip(first, second, strict=True):
        others = iter(other.tensors())

        def extent(x: torch.Tensor, others=others) -> Extent | None:  # type: ignore[no-untyped-def]
            return Extent.of(x, next(others, torch.empty(0)))

        made.append(one.changed(extent))
    return made


def flow_of(run: Callable[..., Pass], same: Callable[[object, object], bool], why_not: str) -> Flow:
    """The flow of a model. run(probe, by_ids=, observe=, spread=, known=): a pass with the tokens or the
    embeddings of one of PROBES. ModelError, beginning with `why_not`, for what is none."""
    known: list[Products] = []
    try:
        ran = run(0)
        plain = not ran.writable and not ran.read and _unchanged(ran, same)
    except ModelError:
        plain = False
    if not plain:
        seen = [run(probe, observe=True) for probe in (0, 1)]
        known = extents_of(seen[0].products, seen[1].products)
        ran, spread = run(0, known=known), run(0, known=known, spread=True)
        if ran.read != seen[0].read or not same(ran.calls, spread.calls):
            raise ModelError(f"{why_not}: something happens to what one block hands to another")
    if not _unchanged(ran, same):
        raise ModelError(f"{why_not}: something happens to hidden states between its blocks")
    hidden = Extent.of(ran.hidden[0], run(1, known=known).hidden[0])
    if hidden is None or not ran.hidden[0].is_floating_point():
        raise ModelError(f"{why_not}: its hidden states have no row for each token")
    try:
        ids = not same(ran.calls, run(0, known=known, by_ids=False).calls)
    except ModelError:
        ids = True
    read = sorted(ran.read, key=lambda handed: (handed.block, handed.number))
    return Flow(hidden, ids, read, known)


def _unchanged(ran: Pass, same: Callable[[object, object], bool]) -> bool:
    return all(same(ran.hidden[0], later) for later in ran.hidden)
