"""Runs a decoder block by block, with the weights of one block in memory.

    tokens (b, t) --embed--> hidden (b, t, h) --block 0--> hidden --block 1--> ... --head--> logits

The transformers model is built without weights, and each block is replaced by a stand-in. The model's own
forward pass then computes everything around the blocks, for every architecture. Stand-ins that record their
calls give the embeddings and each block's arguments (position embeddings, masks, which differ between layers
with and without a window). Stand-ins that return given hidden states give the final norm and the output
layer. A block is a copy of the replaced module with the weights of the checkpoint.

Fused expert arrays are filled from one weight per expert (`files/experts.py`), so names and shapes are those
of the Checkpoint. Batches have sequences of equal length, without padding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch

from ..adapters.as_loaded import as_loaded
from ..adapters.transformers import empty_model
from ..errors import CalibrationError, ModelError, raise_all
from ..files.checkpoint import Checkpoint
from ..files.experts import pieces
from ..model.sites import sites
from ..qtensor import QTensor
from .block import Block, Call, get_tensor, put_tensor


class _Arrived(Exception):
    """The last block was reached: the rest of the forward pass is not needed."""


@dataclass
class _Pass:
    """One forward pass through the stand-ins. give: what each returns; None: stop at the last."""

    n_blocks: int
    give: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    calls: list[Call] = field(default_factory=list)


class _StandIn(torch.nn.Module):
    """Replaces a block: records its call and returns the given hidden states."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["stands_for"] = block  # not as a child: its parameters are no longer the model's
        self.running: _Pass | None = None

    def __getattr__(self, name: str) -> Any:
        """A forward pass may read attributes of its blocks, such as their type of attention."""
        return getattr(self.__dict__["stands_for"], name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.running is not None
        running = self.running
        if not running.calls:
            running.hidden = hidden
        running.calls.append(Call(args, kwargs))
        if running.give is not None:
            return running.give
        if len(running.calls) == running.n_blocks:
            raise _Arrived
        return hidden


class BlockModel:
    """A decoder with the weights of one block in memory. dtype: of the computation, f32 or bf16.

    Raises ModelError for a model whose blocks cannot be found, and one that lists every tensor that is
    missing, not one of the model's, or of another shape.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        checkpoint = as_loaded(checkpoint)
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        self._model = empty_model(checkpoint)
        self.path, blocks = _find_blocks(self._model, checkpoint)
        self._made_of = {
            key: pieces(key, tuple(value.shape), checkpoint.config.get("model_type"))
            for key, value in self._model.state_dict().items()
        }
        modules = {id(module): name for name, module in self._model.named_modules()}
        table = self._model.get_input_embeddings()
        table.padding_idx = None  # it has a few of its rows, in another order: ids are translated for it
        table.register_forward_pre_hook(lambda module, ids: (self._row_of(*ids),))
        self._rows: torch.Tensor | None = None
        self._table = f"{modules[id(table)]}.weight"
        output = modules.get(id(self._model.get_output_embeddings()))  # None: no language model's head
        self._output = None if output is None else f"{output}.weight"
        self._copies = self._model.all_tied_weights_keys  # tied tensor -> the one that it is
        self._made_of |= {copy: self._made_of[source] for copy, source in self._copies.items()}
        known = signature(self._model.forward).parameters
        self._no_cache = {"use_cache": False} if "use_cache" in known else {}
        self._check_names()
        _move_buffers(self._model, self.device)
        self._blocks = list(blocks)
        self._stand_ins = [_StandIn(block) for block in self._blocks]
        for i, stand_in in enumerate(self._stand_ins):
            blocks[i] = stand_in
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._head: dict[str, torch.Tensor] | None = None

    @property
    def n_blocks(self) -> int:
        return len(self._blocks)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(b, t)` int64 -> `(b, t, h)`: the input of block 0. Only the rows of these tokens are decoded."""
        name = next(iter(self._made_of[self._table]))
        size = self.checkpoint.tensors[name].shape[0]
        low, high = (int(edge) for edge in torch.aminmax(tokens))
        if low < 0 or high >= size:
            raise CalibrationError(
                f"tokens from {low} to {high}: {name} has {size} rows; use the model's own tokenizer"
            )
        self._rows = tokens.unique().cpu()
        table = _rows(self.checkpoint.tensors[name].load(), self._rows).to(self.device, self.dtype)
        ran = self._ahead({self._table: table}, input_ids=tokens.to(self.device))
        assert ran.hidden is not None
        if not _same(ran.calls, self._calls_for(ran.hidden)):
            raise ModelError(
                f"{self.checkpoint.path}: the blocks read more of the tokens than their hidden states; "
                f"{self._model.config.model_type!r} cannot be run block by block"
            )
        return ran.hidden

    def _row_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids -> rows of the table, which holds those of `_rows` alone."""
        assert self._rows is not None
        return torch.searchsorted(self._rows.to(ids.device), ids)

    def names(self, i: int) -> list[str]:
        """Checkpoint names of block i's tensors, in the order of its modules; experts one by one."""
        return [name for key in self._keys(i) for name in self._made_of[key]]

    def weights(self, i: int) -> dict[str, torch.Tensor]:
        """The tensors of block i, decoded to f32: copies that do not reference the mapped file."""
        self._head = None
        return {name: self._decode(name, torch.float32) for name in self.names(i)}

    def block(self, i: int, weights: Mapping[str, torch.Tensor]) -> Block:
        """Block i filled with `weights`: every name of `names(i)`. A weight with the dtype and device of the
        computation is shared with the block, not copied."""
        self._head = None
        faults = [f"tensor {name!r} is missing" for name in self.names(i) if name not in weights]
        raise_all(ModelError, f"{self.path}.{i}", faults)
        # The config is shared, not copied: blocks only read it.
        shared = {id(self._model.config): self._model.config}
        module = deepcopy(self._blocks[i], shared)
        prefix = f"{self.path}.{i}."
        made_of = {key.removeprefix(prefix): self._made_of[key] for key in self._keys(i)}
        block = Block(f"{self.path}.{i}", module, made_of, lambda hidden: self._calls_for(hidden)[i])
        block.dtype, block.device = self.dtype, self.device
        block.set(weights)
        return block

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(b, t, h)` -> `(b, t, vocab)`: final norm and output.

        Their weights stay in memory until the next call of `weights` or `block`.
        """
        hidden = hidden.to(self.device, self.dtype)
        if self._output is None:
            raise ModelError(f"{self.checkpoint.path}: {type(self._model).__name__} has no logits of tokens")
        if self._head is None:
            name = next(iter(self._made_of[self._output]))
            self._head = self._around() | {self._output: self._decode(name, self.dtype)}
        running = _Pass(self.n_blocks, give=hidden)
        with self._filled(self._head), self._standing_in(running):
            logits = self._model(inputs_embeds=hidden, **self._no_cache).logits
        if logits.shape[:2] != hidden.shape[:2]:
            raise ModelError(
                f"{self.checkpoint.path}: hidden states {tuple(hidden.shape)} gave logits "
                f"{tuple(logits.shape)}; {self._model.config.model_type!r} cannot be run block by block"
            )
        return logits

    # ---- the model around the blocks ----

    def _calls_for(self, hidden: torch.Tensor) -> list[Call]:
        """The arguments of each block for hidden states of this batch and length."""
        shape = tuple(hidden.shape)
        if shape not in self._calls:
            width = self._model.get_input_embeddings().embedding_dim  # not always the hidden states'
            empty = torch.zeros((*shape[:-1], width), dtype=self.dtype, device=self.device)
            self._calls[shape] = self._ahead({}, inputs_embeds=empty).calls
        return self._calls[shape]

    @torch.no_grad()
    def _ahead(self, weights: dict[str, torch.Tensor], **inputs: torch.Tensor) -> _Pass:
        """The model's forward pass up to the last block, without the blocks."""
        running = _Pass(self.n_blocks)
        with self._filled(self._around() | weights), self._standing_in(running):
            try:
                self._model(**inputs, **self._no_cache)
            except _Arrived:
                return running
        raise ModelError(
            f"{self.checkpoint.path}: its forward pass called {len(running.calls)} of the "
            f"{self.n_blocks} blocks of {self.path}; it cannot be run block by block"
        )

    def _around(self) -> dict[str, torch.Tensor]:
        """The weights outside the blocks, without the embedding and the output layer."""
        skipped = {self._table, self._output}
        return {
            key: self._decode(name, self.dtype)
            for key, made_of in self._made_of.items()
            if key not in skipped and not key.startswith(f"{self.path}.")
            for name in made_of
        }

    def _decode(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        value = self.checkpoint.tensors[name].load()
        value = value.decode() if isinstance(value, QTensor) else value
        return value.to(self.device, dtype, copy=True)

    @contextmanager
    def _filled(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Puts weights into their modules temporarily, then back to the meta device."""
        before = {key: get_tensor(self._model, key) for key in weights}
        for key, weight in weights.items():
            put_tensor(self._model, key, weight)
        try:
            yield
        finally:
            for key, empty in before.items():
                put_tensor(self._model, key, empty)

    @contextmanager
    def _standing_in(self, running: _Pass) -> Iterator[None]:
        for stand_in in self._stand_ins:
            stand_in.running = running
        try:
            yield
        finally:
            for stand_in in self._stand_ins:
                stand_in.running = None

    # ---- names ----

    def _keys(self, i: int) -> list[str]:
        if not 0 <= i < self.n_blocks:
            raise ModelError(f"{self.checkpoint.path}: block {i} does not exist, it has {self.n_blocks}")
        return [key for key in self._made_of if key.startswith(f"{self.path}.{i}.")]

    def _check_names(self) -> None:
        """ModelError unless the tensors are exactly those of the model."""
        wanted: dict[str, tuple[int, ...]] = {}
        for key, empty in self._model.state_dict().items():
            for name, place in self._made_of[key].items():
                wanted[name] = tuple(empty[place].shape)
        tensors = {n: t for n, t in self.checkpoint.tensors.items() if n not in self.checkpoint.aside}
        skipped = [*map(re.escape, self._copies), *self._model._keys_to_ignore_on_load_unexpected]
        if any(name.endswith("position_ids") for name, _ in self._model.named_buffers()):
            skipped.append(r"(^|\.)position_ids$")  # as transformers does
        ignored = "|".join(skipped)
        known = {name for name in tensors if name in wanted or (ignored and re.search(ignored, name))}
        faults = [f"tensor {name!r} is missing" for name in wanted if name not in tensors]
        faults += [f"tensor {name!r} is not one of the model's" for name in tensors if name not in known]
        faults += [
            f"tensor {name!r} is {tuple(tensors[name].shape)}, the config says {shape}"
            for name, shape in wanted.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ]
        raise_all(ModelError, f"{self.checkpoint.path} as {type(self._model).__name__}", faults)


def _find_blocks(model: torch.nn.Module, checkpoint: Checkpoint) -> tuple[str, torch.nn.ModuleList]:
    """The list of modules with all weights that have a block number, each under its number."""
    numbered = {site.name: site.block for site in sites(checkpoint) if site.block is not None}
    lists = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
    candidates = [
        name
        for name in lists
        if numbered and all(weight.startswith(f"{name}.{i}.") for weight, i in numbered.items())
    ]
    if len(candidates) == 1:
        return candidates[0], lists[candidates[0]]
    shown = ", ".join(f"{name} ({len(modules)})" for name, modules in list(lists.items())[:5]) or "none"
    example = next(iter(numbered), "none")
    raise ModelError(
        f"{checkpoint.path}: block order cannot be found: looked in {type(model).__name__} for one list of "
        f"modules that holds the {len(numbered)} weights with a block number (first: {example}), each under "
        f"its number; it has the lists {shown}"
    )


def _rows(value: torch.Tensor | QTensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a table, decoded; if a format's rows are not independent, all are decoded."""
    if not isinstance(value, QTensor):
        return value[rows]
    if all(plane.flat is None and plane.rows in (1, None) for plane in value.format.planes):
        return value.take_rows(rows).decode()
    return value.decode()[rows]


def _move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def _same(a: Any, b: Any) -> bool:
    """Whether two calls have the same, possibly nested, arguments."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Call):
        return _same((a.args, a.kwargs), (b.args, b.kwargs))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a is b or a == b)
