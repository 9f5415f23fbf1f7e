"""Capture: runs a block and sums the statistics of its sites' inputs.

    x  (t, k)     the input of a site, one row per token
    H += x^T x    only the panels on and above the diagonal, one after the other; mirrored at the end

        columns   0..p   p..2p  2p..
        row 0     [####] [####] [####]        panel 0: p rows, all columns from its first
        row p            [####] [####]        panel 1
        row 2p                  [####]        almost half the products of the whole

Sites that read the same tensor share one sum, independent of their names: q, k and v, gate and up. The groups
by name (`Site.group`) are compared with it, and every difference is noted.

With a second stream, the float model's hidden states, the mismatch of each input is summed too. Both streams
go through this block, whose weights are still float, and differ by the quantization of the earlier blocks.
Experts have no mismatch: the two streams route their tokens differently, so that rows do not correspond.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..blocks.block import Block
from ..devices import has_amx
from ..errors import CalibrationError, ModelError, raise_all
from ..model.sites import Site
from .stats import Stats

MANY = 2048  # tokens
PANEL = 256  # columns; 0.7 of the time of whole products for k = 1536 and 576; 128 and 512 take longer


class Sink(Protocol):
    """The destination of outputs: a list, or Activations. Batch i is replaced if there is one, else
    appended."""

    def __len__(self) -> int: ...
    def __setitem__(self, i: int, x: torch.Tensor, /) -> None: ...
    def append(self, x: torch.Tensor, /) -> None: ...


@dataclass(frozen=True)
class Capture:
    """The statistics of a block's sites. Sites that share an input share one Stats object.

    unseen: sites without input: experts without a token, unused weights.
    notes: differences between observed inputs and the names of sites.
    """

    stats: Mapping[str, Stats]
    unseen: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class FloatStream:
    """The same batches in the float model. block: used for them if the watched block already has quantized
    weights. outputs: get the block's output for each batch."""

    batches: Iterable[torch.Tensor]
    block: Block | None = None
    outputs: Sink | None = None


class _Enough(Exception):
    """Every requested site was reached: the rest of the forward pass is not needed."""


@torch.no_grad()
def capture(
    block: Block,
    batches: Iterable[torch.Tensor],
    sites: Sequence[Site],
    hessian: bool = True,
    floats: FloatStream | None = None,
    outputs: Sink | None = None,
) -> Capture:
    """Hidden states `(b, t, h)`, batch by batch -> the statistics of the inputs of `sites`.

    floats: the same batches in the float model, for the mismatch. outputs: get the block's output for
    each batch (they may be the batches themselves); without them, a pass ends with the last site.
    Raises CalibrationError, naming block and site, for activations that are not finite.
    """
    strangers = [
        f"site {site.name!r} is not one of this block" for site in sites if site.name not in block.names
    ]
    raise_all(ModelError, block.name, strangers)
    collector = _Collector({site.name: site for site in sites}, hessian, floats is not None)
    pairs = zip(batches, repeat(None)) if floats is None else zip(batches, floats.batches, strict=True)
    for i, (hidden, floating) in enumerate(pairs):
        inputs = {}
        if floats is not None and floating is not None:
            inputs = _inputs(floats.block or block, i, floating, collector.aligned, floats.outputs)
        collector.begin(inputs, whole=outputs is not None)
        _run(block, i, hidden, collector.watch, outputs)
    return collector.result(block.name)


@torch.no_grad()
def advance(block: Block, batches: Iterable[torch.Tensor], outputs: Sink) -> None:
    """Hidden states `(b, t, h)`, batch by batch -> the block's outputs, which may replace them.

    Raises CalibrationError, naming block and site, if they are not finite.
    """
    for i, hidden in enumerate(batches):
        _run(block, i, hidden, None, outputs)


def _run(block: Block, i: int, hidden: torch.Tensor, watch: Any, outputs: Sink | None) -> None:
    """Run one batch; its output, if requested, is checked and stored at place i."""
    try:
        output = _whole(block, hidden) if watch is None else block.watched(hidden, watch)
    except _Enough:
        return
    check_output(block, i, hidden, output)
    if outputs is None:
        return
    if i < len(outputs):
        outputs[i] = output
    else:
        outputs.append(output)


def _whole(block: Block, hidden: torch.Tensor) -> torch.Tensor:
    """The block's output; in halves where a GPU has no memory for all sequences at once."""
    try:
        return block(hidden)
    except torch.OutOfMemoryError:
        if len(hidden) == 1:
            raise
    return torch.cat([_whole(block, part).cpu() for part in hidden.chunk(2)])


def _inputs(
    block: Block, i: int, hidden: torch.Tensor, sites: set[str], outputs: Sink | None
) -> dict[str, torch.Tensor]:
    """The input of each of `sites` in one batch, by site."""
    inputs: dict[str, torch.Tensor] = {}

    def watch(name: str, x: torch.Tensor) -> None:
        if name in sites:
            inputs[name] = x
        if outputs is None and inputs.keys() == sites:
            raise _Enough

    _run(block, i, hidden, watch, outputs)
    return inputs


def check_output(block: Block, i: int, hidden: torch.Tensor, output: torch.Tensor) -> None:
    """Raise CalibrationError, naming the first site whose input is not finite, unless batch i's output is."""
    if bool(torch.isfinite(output.sum())):  # a sum is finite only if every term is
        return
    bad: list[str] = []

    def watch(name: str, x: torch.Tensor) -> None:
        if not bad and not bool(torch.isfinite(x).all()):
            bad.append(name)

    block.watched(hidden, watch)
    lost = int((~torch.isfinite(output)).sum())
    if not lost:  # the sum overflowed
        raise CalibrationError(
            f"{block.name}: batch {i}: outputs up to {float(output.abs().max()):g} are too large to go on; "
            "check the weights of that block"
        )
    first = f"the first site whose input is not finite is {bad[0]}" if bad else "every site's input is finite"
    already = int((~torch.isfinite(hidden)).sum())
    entered = f"{already} were so on entering; " if already else ""
    raise CalibrationError(
        f"{block.name}: batch {i}: {lost} of {output.numel()} outputs are NaN or infinite; {entered}{first}. "
        "Check the weights of that block (evaluate the checkpoint), or compute in f32"
    )


class _Collector:
    """Sums for each input of the requested sites, in the order in which inputs appear."""

    def __init__(self, wanted: Mapping[str, Site], hessian: bool, mismatch: bool) -> None:
        self._wanted, self._hessian, self._mismatch = wanted, hessian, mismatch
        self._sums: dict[str, Sums] = {}  # by leader: the first site that read the input
        self._leader: dict[str, str] = {}
        self._batches = 0

    @property
    def aligned(self) -> set[str]:
        """The sites whose rows are the same tokens in both streams."""
        return {name for name, site in self._wanted.items() if site.expert is None}

    def begin(self, floats: dict[str, torch.Tensor], whole: bool) -> None:
        """A new batch. floats: the same inputs in the float model. whole: continue to the block's output."""
        self._batches += 1
        self._floats, self._whole = floats, whole
        self._read: Any = WeakTensorKeyDictionary()  # input -> leader, while the input lives
        self._left = set(self._wanted)

    def watch(self, name: str, x: torch.Tensor) -> None:
        if name not in self._wanted:
            return
        leader = self._read.get(x)
        known = self._leader.setdefault(name, leader or name)
        if known != (leader or name):
            raise CalibrationError(
                f"{name} reads the input of {known} in one batch and that of {leader or 'itself alone'} in "
                "another; a block whose data flow depends on the batch cannot be calibrated"
            )
        if leader is None:
            self._read[x] = name
            mismatch = self._mismatch and self._wanted[name].expert is None
            if name not in self._sums:
                self._sums[name] = Sums(x.shape[1], self._hessian, mismatch, x.device)
            self._sums[name].add(x, self._floats.pop(name, None) if mismatch else None)
        self._left.discard(name)
        if not self._left and not self._whole:
            raise _Enough

    def result(self, block: str) -> Capture:
        if not self._batches and self._wanted:
            raise CalibrationError(
                f"{block}: no input reached any of {len(self._wanted)} sites; give it tokens"
            )
        faults = [
            f"{name}: inputs up to {float(sums.absmax.max()):g} have no finite squares"
            for name, sums in self._sums.items()
            if not sums.finite
        ]
        raise_all(CalibrationError, block, faults)
        statistics = {leader: sums.stats() for leader, sums in self._sums.items()}
        stats = {name: statistics[self._leader[name]] for name in self._wanted if name in self._leader}
        unseen = tuple(name for name in self._wanted if name not in self._leader)
        return Capture(stats, unseen, tuple(self._notes()))

    def _notes(self) -> list[str]:
        """Disagreements of observation and names about shared inputs."""
        read: dict[str, list[str]] = {}
        weights_of: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            read.setdefault(leader, []).append(name)
            weights_of.setdefault(self._wanted[name].group, []).append(name)
        notes = []
        for names in read.values():
            if len({self._wanted[name].group for name in names}) > 1:
                notes.append(f"{', '.join(names)} read one input, their names say otherwise")
        for group, names in weights_of.items():
            if len({self._leader[name] for name in names}) > 1:
                notes.append(f"{', '.join(names)} read different inputs, their names say one: {group}")
        return notes


class Sums:
    """The running statistics of one input: plain sums in f32, divided once at the end."""

    def __init__(self, k: int, hessian: bool, mismatch: bool, device: torch.device) -> None:
        self.count = 0
        self.absmax = torch.zeros(k, device=device)
        self.square = None if hessian else torch.zeros(k, device=device)
        self.hessian = torch.zeros(k, k, device=device) if hessian else None
        self.mismatch = torch.zeros(k, k, device=device) if mismatch else None

    def add(self, x: torch.Tensor, floats: torch.Tensor | None = None) -> None:
        """`(t, k)` inputs, and the same in the float model if mismatch is needed."""
        given, x = x, x.float()
        self.count += x.shape[0]
        torch.maximum(self.absmax, torch.maximum(x.amax(0), -x.amin(0)), out=self.absmax)
        if self.square is not None:
            self.square += x.square().sum(0)
        if self.hessian is not None:
            with factors_in_bf16(x):
                add_outer(self.hessian, given if given.is_cuda else x)
        if self.mismatch is None:
            return
        if floats is None or floats.shape != x.shape:
            got = "nothing" if floats is None else str(tuple(floats.shape))
            raise CalibrationError(
                f"the float stream gave {got} where the quantized one gave {tuple(x.shape)}; both need "
                "batches of the same shapes"
            )
        with factors_in_bf16(x):
            self.mismatch.addmm_((floats.float() - x).T, x)

    @property
    def finite(self) -> bool:
        # |H_ij| <= sqrt(H_ii H_jj): a finite diagonal is enough.
        square = self.hessian.diagonal() if self.hessian is not None else self.square
        assert square is not None
        return bool(torch.isfinite(square).all())

    def stats(self) -> Stats:
        """The means; the sums are used up."""
        if self.hessian is not None:
            mirror(self.hessian)
            self.hessian /= self.count
            mean_square = self.hessian.diagonal().clone()
        else:
            assert self.square is not None
            mean_square = self.square / self.count
        if self.mismatch is not None:
            self.mismatch /= self.count
        return Stats(self.count, self.absmax, mean_square, self.hessian, self.mismatch)


@contextmanager
def factors_in_bf16(x: torch.Tensor) -> Iterator[None]:
    """Within, for inputs `(t, k)` of thousands of tokens, f32 products round their factors to bf16 on a CPU
    with AMX, and sum in f32: 2^-8 of an element at most, which averages out."""
    if x.is_cuda or len(x) < MANY or not has_amx():
        yield
        return
    backend: Any = torch.backends.mkldnn
    products = backend.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def add_outer(h: torch.Tensor, x: torch.Tensor) -> None:
    """h `(k, k)` f32 += x^T x of x `(t, k)`, in place; below the diagonal panels h is unchanged.

    x: f32; or on a GPU 16-bit floats, whose products are exact in f32, in which they are summed."""
    for start in range(0, h.shape[0], PANEL):
        left, right = x[:, start : start + PANEL].T, x[:, start:]
        if x.dtype.itemsize == 2:
            h[start : start + PANEL, start:] += torch.mm(left, right, out_dtype=torch.float32)
        else:
            h[start : start + PANEL, start:].addmm_(left, right)


def mirror(h: torch.Tensor) -> None:
    """Copy the part above the diagonal of `(k, k)` below it, in place."""
    for start in range(0, h.shape[0], PANEL):
        stop = start + PANEL
        corner = h[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        h[stop:, start:stop] = h[start:stop, stop:].T
