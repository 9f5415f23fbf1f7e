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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from ..adapters.as_loaded import as_loaded
from ..adapters.transformers import empty_model, tensors_in
from ..errors import CalibrationError, ModelError, raise_all
from ..files.checkpoint import Checkpoint
from ..qtensor import QTensor
from .block import Block, Call, get_tensor, put_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Arrived(Exception):
    """The last block was reached: the rest of the forward pass is not needed."""


@dataclass
class _Pass:
    """One forward pass through the stand-ins. give: what each returns; None: stop at the last. outputs: how
    many each kind of block returns, where it is not one. observe: run the blocks themselves, with zeros for
    weights, to see that number."""

    n_blocks: int
    outputs: dict[type, int]
    give: torch.Tensor | None = None
    observe: bool = False
    hidden: list[torch.Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    others: list[torch.Tensor] = field(default_factory=list)
    carried: bool = False  # whether a block reads another output of an earlier one


class _StandIn(torch.nn.Module):
    """Replaces a block: records its call and returns the given hidden states, in the form of the block's."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["stands_for"] = block  # not as a child: its parameters are no longer the model's
        self.running: _Pass | None = None

    def __getattr__(self, name: str) -> Any:
        """A forward pass may read attributes of its blocks, such as their type of attention."""
        return getattr(self.__dict__["stands_for"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.running is not None
        running, kind = self.running, type(self.__dict__["stands_for"])
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        running.hidden.append(hidden)
        running.calls.append(Call(args, kwargs))
        running.carried |= any(
            each is other for each in (*args, *kwargs.values()) for other in running.others
        )
        if running.observe:
            return self._observed(running, hidden)
        if running.give is None and len(running.calls) == running.n_blocks:
            raise _Arrived
        hidden = hidden if running.give is None else running.give
        outputs = running.outputs.get(kind, 0)
        return (hidden, *[None] * (outputs - 1)) if outputs else hidden

    def _observed(self, running: _Pass, hidden: torch.Tensor) -> Any:
        block, call = self.__dict__["stands_for"], running.calls[-1]
        zeros = {
            name: torch.zeros(weight.shape, dtype=hidden.dtype, device=hidden.device)
            for name, weight in block.named_parameters()
            if weight.is_meta
        }
        result = functional_call(block, zeros, (hidden, *call.args), call.kwargs)
        if not isinstance(result, tuple | list):
            return hidden
        running.outputs[type(block)] = len(result)
        running.others += [other for other in result[1:] if isinstance(other, torch.Tensor)]
        if len(running.calls) == running.n_blocks:
            raise _Arrived
        return (hidden, *result[1:])


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
        self._made_of = tensors_in(self._model, checkpoint)
        self.path, blocks = _find_blocks(self._model, checkpoint)
        modules = {id(module): name for name, module in self._model.named_modules()}
        table = self._model.get_input_embeddings()
        table.padding_idx = None  # it has a few of its rows, in another order: ids are translated for it
        table.register_forward_pre_hook(lambda module, ids: (self._row_of(*ids),))
        self._rows: torch.Tensor | None = None
        self._table = f"{modules[id(table)]}.weight"
        output = modules.get(id(self._model.get_output_embeddings()))  # None: no language model's head
        self._output = None if output is None else f"{output}.weight"
        self._copies = self._model.all_tied_weights_keys  # tied tensor -> the one that it is
        self._left_out = {name for copy in self._copies for name in self._made_of[copy]}
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
        self._outputs: dict[type, int] = {}  # of the kinds of blocks that return several
        self._check_flow()

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
        value = self.checkpoint.tensors[name].load()
        table = value.decode_rows(self._rows) if isinstance(value, QTensor) else value[self._rows]
        weights = {self._table: table.to(self.device, self.dtype)}
        ran = self._ahead(weights, input_ids=tokens.to(self.device))
        hidden = ran.hidden[0]
        if not _same(ran.calls, self._calls_for(hidden)):
            raise ModelError(f"{self._why_not()}: blocks read more of the tokens than their hidden states")
        return hidden

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

    def forget_head(self) -> None:
        """Free the weights of `head`."""
        self._head = None

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
        running = _Pass(self.n_blocks, self._outputs, give=hidden)
        with self._filled(self._head), self._standing_in(running):
            logits = self._model(inputs_embeds=self._embeddings(hidden.shape), **self._no_cache).logits
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
            self._calls[shape] = self._ahead({}, inputs_embeds=self._embeddings(shape)).calls
        return self._calls[shape]

    def _embeddings(self, shape: Sequence[int]) -> torch.Tensor:
        """Embeddings for hidden states of this shape, which may have another width."""
        width = get_tensor(self._model, self._table).shape[-1]
        return torch.zeros((*shape[:2], width), dtype=self.dtype, device=self.device)

    def _check_flow(self) -> None:
        """ModelError unless each block reads what the one before it returns, and nothing else of it."""
        embeddings = self._embeddings((2, 4, 1)).normal_(
            generator=torch.Generator(self.device).manual_seed(0)
        )
        if not self._passes_on(embeddings, observe=False) and not self._passes_on(embeddings, observe=True):
            raise ModelError(f"{self._why_not()}: something happens to hidden states between its blocks")

    def _passes_on(self, embeddings: torch.Tensor, observe: bool) -> bool:
        try:
            ran = self._ahead({}, observe, inputs_embeds=embeddings)
        except ModelError:
            if observe:
                raise
            return False
        if ran.carried:
            raise ModelError(f"{self._why_not()}: blocks hand on more than their hidden states")
        return all(_same(ran.hidden[0], later) for later in ran.hidden)

    def _why_not(self) -> str:
        kind = self._model.config.model_type
        return f"{self.checkpoint.path}: {kind!r} cannot be run block by block"

    @torch.no_grad()
    def _ahead(
        self, weights: dict[str, torch.Tensor], observe: bool = False, **inputs: torch.Tensor
    ) -> _Pass:
        """The model's forward pass up to the last block, without the blocks."""
        running = _Pass(self.n_blocks, self._outputs, observe=observe)
        with self._filled(self._around() | weights), self._standing_in(running):
            try:
                self._model(**inputs, **self._no_cache)
            except _Arrived:
                return running
            except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
                raise ModelError(f"{self._why_not()}: {type(error).__name__}: {error}") from error
        raise ModelError(
            f"{self.checkpoint.path}: its forward pass called {len(running.calls)} of the "
            f"{self.n_blocks} blocks of {self.path}; it cannot be run block by block"
        )

    def _around(self) -> dict[str, torch.Tensor]:
        """The weights outside the blocks, without the embedding and the output layer."""
        skipped = {self._table, self._output}
        around: dict[str, torch.Tensor] = {}
        for key in self._made_of:
            if key in skipped or key.startswith(f"{self.path}."):
                continue
            whole = torch.empty(get_tensor(self._model, key).shape, dtype=self.dtype, device=self.device)
            for name, place in self._made_of[key].items():
                place.of(whole).copy_(self._decode(name, self.dtype))
            around[key] = whole
        return around

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
                wanted[name] = tuple(place.of(empty).shape)
        tensors = {n: t for n, t in self.checkpoint.tensors.items() if n not in self.checkpoint.aside}
        skipped = [*map(re.escape, self._left_out), *(self._model._keys_to_ignore_on_load_unexpected or [])]
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


def _find_blocks(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[str, torch.nn.ModuleList]:
    """The outermost list of modules with matrices in the decoder: one entry for each layer of its config."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    decoder: Any = found if hasattr(found, "config") else model.base_model
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    lists: dict[str, torch.nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, torch.nn.ModuleList) and not nested and _has_matrices(module):
            lists[name] = module
    depth = getattr(decoder.config, "num_hidden_layers", None)
    candidates = [name for name in lists if len(lists) == 1 or len(lists[name]) == depth]
    top = min((name.count(".") for name in candidates), default=0)
    candidates = [name for name in candidates if name.count(".") == top]
    if len(candidates) == 1:
        name = candidates[0]
        return f"{prefix}.{name}" if prefix else name, lists[name]
    shown = ", ".join(f"{name} ({len(modules)})" for name, modules in list(lists.items())[:5]) or "none"
    raise ModelError(
        f"{checkpoint.path}: block order cannot be found: looked in {type(decoder).__name__} for one list of "
        f"{depth} blocks; it has the lists {shown}"
    )


def _has_matrices(modules: torch.nn.ModuleList) -> bool:
    return any(parameter.ndim > 1 for module in modules for parameter in module.parameters())


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
