"""Stand-ins: what takes the place of a model's blocks in its own forward pass, to see how it calls them.

    observed    the block runs, with zeros for weights: what does it return, what does it change?
    else        zeros of the shapes that were observed, or nothing but the hidden states

A tensor that one block hands to later ones, in its output or in a dictionary that all of them get, is
`Handed(block, number)` in the recorded calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.func import functional_call

from .columns import Extent

Change = Callable[[Any], Any]


class Arrived(Exception):
    """The last block was reached: the rest of the forward pass is not needed."""


@dataclass(frozen=True)
class Call:
    """The arguments of a block besides its hidden states. named: by which name it gets those, if by any."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: str | None = None

    def changed(self, change: Change) -> Call:
        """With `change` of each tensor, and containers of its own."""
        return replace(self, args=changed(self.args, change), kwargs=changed(self.kwargs, change))

    def run(self, function: Callable[[tuple[Any, ...], dict[str, Any]], Any], hidden: torch.Tensor) -> Any:
        """The function called with the arguments as the block gets them."""
        if self.named:
            return function(self.args, self.kwargs | {self.named: hidden})
        return function((hidden, *self.args), self.kwargs)

    @property
    def tables(self) -> list[MutableMapping[Any, Any]]:
        """The dictionaries among the arguments, which a block may write to."""
        return [table for value in (*self.args, *self.kwargs.values()) for table in _tables(value)]


@dataclass(frozen=True)
class Handed:
    """Output `number` of a block, its hidden states first, then what it writes to dictionaries."""

    block: int
    number: int


@dataclass
class Products:
    """What a block gave in one pass. rest: its outputs besides hidden states; None: it returns no tuple.
    written: number of a dictionary of its call, key and value."""

    rest: Any
    written: list[tuple[int, Any, Any]]

    @staticmethod
    def of(result: Any, before: Sequence[dict[Any, Any]], tables: Sequence[Any]) -> Products:
        rest = tuple(result[1:]) if isinstance(result, tuple | list) else None
        written = [
            (i, key, value)
            for i, (old, table) in enumerate(zip(before, tables, strict=True))
            for key, value in table.items()
            if key not in old or old[key] is not value
        ]
        return Products(rest, written)

    def changed(self, change: Change) -> Products:
        return Products(
            changed(self.rest, change),
            [(i, key, changed(value, change)) for i, key, value in self.written],
        )

    def tensors(self) -> list[Any]:
        found: list[Any] = []
        self.changed(found.append)
        return found


@dataclass
class Pass:
    """One forward pass through the stand-ins.

    give: what each returns as hidden states; None: its input, and the last stops the pass. known: what each
    block gives otherwise, with an Extent for each tensor; empty: nothing. observe: run the blocks, and keep
    what they give in `products`. spread: put random numbers in its place.
    """

    n_blocks: int
    known: Sequence[Products] = ()
    give: torch.Tensor | None = None
    observe: bool = False
    spread: bool = False
    hidden: list[torch.Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of the blocks called
    products: list[Products] = field(default_factory=list)
    sizes: tuple[int, int] = (1, 1)  # b and t
    handed: list[tuple[torch.Tensor, Handed]] = field(default_factory=list)
    writable: bool = False  # whether two blocks get the same dictionary, which the first may have written to
    _tables: list[Any] = field(default_factory=list)

    def mark(self, x: torch.Tensor) -> Any:
        """A tensor that a block has handed on -> which it is."""
        return next((name for tensor, name in reversed(self.handed) if tensor is x), x)

    def enter(self, hidden: torch.Tensor, call: Call) -> None:
        self.hidden.append(hidden)
        self.calls.append(call.changed(self.mark))
        self.writable |= any(table is other for table in call.tables for other in self._tables)
        self._tables += call.tables

    @property
    def read(self) -> set[Handed]:
        """What later blocks read of what earlier ones handed on."""
        found: list[Any] = []
        for call in self.calls:
            call.changed(found.append)
        return {handed for handed in found if isinstance(handed, Handed)}


class StandIn(torch.nn.Module):
    """Replaces a block: records its call and gives what `Pass` says, in the form of the block's output."""

    def __init__(self, block: torch.nn.Module, number: int) -> None:
        super().__init__()
        self.__dict__["stands_for"] = block  # not as a child: its parameters are no longer the model's
        self.number, self.running = number, None

    running: Pass | None

    def __getattr__(self, name: str) -> Any:
        """A forward pass may read attributes of its blocks, such as their type of attention."""
        return getattr(self.__dict__["stands_for"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        running = self.running
        assert running is not None
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        call = Call(rest, kwargs, None if args else "hidden_states")
        running.numbers.append(self.number)
        running.enter(hidden, call)
        if running.observe:
            products = self._observed(running, hidden, call)
        elif running.known:
            device = hidden.device
            products = running.known[self.number].changed(lambda x: _zeros(x, *running.sizes, device))
        else:
            products = Products(None, [])
        if running.give is None and len(running.calls) == running.n_blocks:
            raise Arrived
        hidden = (hidden if running.give is None else running.give).clone()
        if running.spread:
            products = products.changed(_spread)
        tensors = [hidden, *products.tensors()]
        running.handed += [(x, Handed(self.number, i)) for i, x in enumerate(tensors)]
        for i, key, value in products.written:
            call.tables[i][key] = value
        return hidden if products.rest is None else (hidden, *products.rest)

    def _observed(self, running: Pass, hidden: torch.Tensor, call: Call) -> Products:
        block, call = self.__dict__["stands_for"], call.changed(lambda x: x)
        zeros = {
            name: torch.zeros((), dtype=hidden.dtype, device=hidden.device).expand(weight.shape)
            for name, weight in block.named_parameters()
            if weight.is_meta
        }
        before = [dict(table) for table in call.tables]
        result = call.run(lambda args, kwargs: functional_call(block, zeros, args, kwargs), hidden)
        running.products.append(Products.of(result, before, call.tables))
        return running.products[-1]


def changed(value: Any, change: Change) -> Any:
    """A copy of nested tuples, lists and dictionaries, with `change` of what they hold: tensors and Handed,
    and the extents of tensors."""
    if isinstance(value, torch.Tensor | Handed | Extent):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(changed(part, change) for part in value)
    if isinstance(value, MutableMapping):
        made = copy(value)
        for key, part in value.items():
            made[key] = changed(part, change)
        return made
    return value


def _tables(value: Any) -> Iterator[MutableMapping[Any, Any]]:
    if type(value) in (tuple, list):
        for part in value:
            yield from _tables(part)
    elif isinstance(value, MutableMapping):
        for part in value.values():
            yield from _tables(part)
        yield value


def _zeros(x: Any, b: int, t: int, device: torch.device) -> Any:
    return x.zeros(b, t, device) if isinstance(x, Extent) else x


def _spread(x: Any) -> Any:
    """Other numbers in a tensor, so that what is computed from it differs too."""
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return torch.randn(x.shape, dtype=x.dtype, device=x.device)
    return x
