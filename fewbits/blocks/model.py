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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.as_loaded import as_loaded
from ..adapters.computed import fill_computed
from ..adapters.forward import reads_twice, stands_on, text_inputs, without_cache
from ..adapters.observed import Stack, stacks_of
from ..adapters.transformers import empty_model, tensors_in
from ..errors import CalibrationError, ModelError, raise_all
from ..files.checkpoint import Checkpoint
from ..model.sites import TOWER
from ..qtensor import QTensor
from .block import Block, get_tensor, put_tensor
from .columns import PROBES
from .flow import PLAIN, flow_of
from .stand_in import Arrived, Call, Pass, StandIn
from .tables import Table, is_large_table, read_by_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FAILURES = (TypeError, ValueError, LookupError, AttributeError, RuntimeError)  # of a forward pass


class BlockModel:
    """A decoder with the weights of one block in memory. dtype: of the computation, f32 or bf16. stack: which
    of the model's, for the encoder of an encoder-decoder; the stacks before it are whole in memory.

    Raises ModelError for a model whose blocks cannot be found, and one that lists every tensor that is
    missing, not one of the model's, or of another shape.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        stack: int = -1,
    ) -> None:
        checkpoint = as_loaded(checkpoint)
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        self._model = empty_model(checkpoint)
        self._made_of = tensors_in(self._model, checkpoint)
        fill_computed(self._model, self._made_of, checkpoint.tensors)
        stacks = _stacks(self._model, checkpoint)
        self.n_stacks = len(stacks)
        self.hears_noise = reads_twice(self._model) and len(stacks) == 1  # for want of an encoder of text
        _, self.path, blocks = stacks[stack]
        later = stacks[stacks.index(stacks[stack]) + 1 :]
        self._apart = tuple(f"{each.path}." for each in (stacks[stack], *later))
        modules = {id(module): name for name, module in self._model.named_modules()}
        self._table = f"{modules[id(_table_of(self._model, checkpoint))]}.weight"
        self._rows, self._width = get_tensor(self._model, self._table).shape
        output = modules.get(id(self._model.get_output_embeddings()))  # None: no language model's head
        self._output = None if output is None else f"{output}.weight"
        self._copies = self._model.all_tied_weights_keys  # tied tensor -> the one that it is
        self._left_out = {name for copy in self._copies for name in self._made_of[copy]}
        self._made_of |= {copy: self._made_of[source] for copy, source in self._copies.items()}
        self._no_cache = without_cache(self._model)
        self._check_names()
        _move_buffers(self._model, self.device, checkpoint)
        stands_on(self._model, self.device)
        self._blocks = list(blocks)
        self._stand_ins = [StandIn(block, i) for i, block in enumerate(self._blocks)]
        for i, stand_in in enumerate(self._stand_ins):
            blocks[i] = stand_in
        self._places = list(range(len(self._blocks)))  # in that list, of the blocks that text goes through
        self._looked_up = set(self._read_rows_alone())
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._last: tuple[torch.Tensor, list[Call]] | None = None  # token ids and their calls
        self._heads: dict[torch.dtype, dict[str, torch.Tensor]] = {}  # by the type of the output's weight
        self._flow = PLAIN
        with self._filled(self._around()):
            self._around_is_there = True
            self._places = self._called()
            for i, place in enumerate(self._places):
                self._stand_ins[place].number = i
            self._flow = flow_of(self._probe, _same, self._why_not())
        self._around_is_there = False

    @property
    def n_blocks(self) -> int:
        """Of the blocks that text goes through: Llama 3.2's cross attention is for images alone."""
        return len(self._places)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(b, t)` int64 -> `(b, t, h)`: the input of block 0. Only the rows of these tokens are decoded."""
        name = next(iter(self._made_of[self._table]))
        size = self.checkpoint.tensors[name].shape[0]
        low, high = (int(edge) for edge in torch.aminmax(tokens))
        if low < 0 or high >= size:
            raise CalibrationError(
                f"tokens from {low} to {high}: {name} has {size} rows; use the model's own tokenizer"
            )
        ran = self._ahead(input_ids=tokens.to(self.device))
        packed = self._flow.pack(ran.hidden[0], tokens.to(self.device))
        if not self._flow.reads_ids and not _same(ran.calls, self._calls_for(packed)):
            raise ModelError(f"{self._why_not()}: blocks read more of the tokens than their hidden states")
        return packed

    def names(self, i: int) -> list[str]:
        """Checkpoint names of block i's tensors, in the order of its modules; experts one by one."""
        return [name for key in self._keys(i) for name in self._made_of[key]]

    def weights(self, i: int, device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """The tensors of block i, decoded to f32, on a device (default: the model's): copies that do not
        reference the mapped file."""
        self._heads.clear()
        return {name: self._decode(name, torch.float32, device or self.device) for name in self.names(i)}

    def block(self, i: int, weights: Mapping[str, torch.Tensor]) -> Block:
        """Block i filled with `weights`: every name of `names(i)`. A weight with the dtype and device of the
        computation is shared with the block, not copied."""
        self._heads.clear()
        faults = [f"tensor {name!r} is missing" for name in self.names(i) if name not in weights]
        raise_all(ModelError, f"{self.path}.{self._places[i]}", faults)
        # The config is shared, not copied: blocks only read it.
        shared = {id(self._model.config): self._model.config}
        place = self._places[i]
        module = deepcopy(self._blocks[place], shared)
        prefix = f"{self.path}.{place}."
        made_of = {key.removeprefix(prefix): self._made_of[key] for key in self._keys(i)}
        block = Block(f"{self.path}.{place}", module, made_of, lambda hidden: self._calls_for(hidden)[i])
        block.dtype, block.device, block.number, block.flow = self.dtype, self.device, i, self._flow
        block.set(weights)
        return block

    def forget_head(self) -> None:
        """Free the weights of `head`."""
        self._heads.clear()

    def head(self, hidden: torch.Tensor, product: torch.dtype | None = None) -> torch.Tensor:
        """`(b, t, h)` -> `(b, t, vocab)`: final norm and output. product: the type that autocast gives the
        output's matrix product, in which its weight is kept too.

        Their weights stay in memory until the next call of `weights` or `block`.
        """
        hidden = hidden.to(self.device, self.dtype)
        if self._output is None:
            raise ModelError(f"{self.checkpoint.path}: {type(self._model).__name__} has no logits of tokens")
        if self.dtype not in self._heads:
            name = next(iter(self._made_of[self._output]))
            weight = self._decode(name, self.dtype, self.device)
            self._heads[self.dtype] = self._around() | {self._output: weight}
        if (product := product or self.dtype) not in self._heads:
            usual = self._heads[self.dtype]
            self._heads[product] = usual | {self._output: usual[self._output].to(product)}
        states = self._flow.hidden(hidden)
        running = Pass(self.n_blocks, self._flow.known, states, sizes=(hidden.shape[0], hidden.shape[1]))
        with self._filled(self._heads[product]), self._standing_in(running):
            logits = self._model(**self._given(self._inputs(hidden)), **self._no_cache).logits
        if logits.shape[:2] != hidden.shape[:2]:
            raise ModelError(
                f"{self.checkpoint.path}: hidden states {tuple(hidden.shape)} gave logits "
                f"{tuple(logits.shape)}; {self._model.config.model_type!r} cannot be run block by block"
            )
        return logits

    # ---- the model around the blocks ----

    def _calls_for(self, packed: torch.Tensor) -> list[Call]:
        """The arguments of each block for hidden states of this batch and length, or of these tokens."""
        shape = tuple(packed.shape[:2])
        if not self._flow.reads_ids:
            if shape not in self._calls:
                self._calls[shape] = self._ahead(None, **self._inputs(packed)).calls
            return self._calls[shape]
        ids = self._flow.ids(packed)
        if self._last is None or not _same(self._last[0], ids):
            self._last = ids, self._ahead(input_ids=ids).calls
        return self._last[1]

    def _inputs(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model is given for packed hidden states: their tokens, or embeddings of zeros."""
        if self._flow.reads_ids:
            return {"input_ids": self._flow.ids(packed)}
        return {"inputs_embeds": self._embeddings(packed.shape)}

    def _given(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Token ids, or embeddings, as the model's forward pass takes them."""
        return text_inputs(self._model, inputs["input_ids"], self.dtype) if "input_ids" in inputs else inputs

    def _embeddings(self, shape: Sequence[int]) -> torch.Tensor:
        """Embeddings for hidden states of this shape, which may have another width."""
        return torch.zeros((*shape[:2], self._width), dtype=self.dtype, device=self.device)

    def _probe(self, probe: int, by_ids: bool = True, **settings: Any) -> Pass:
        """A short pass, with tokens or with embeddings of zeros."""
        b, t = PROBES[probe]
        if not by_ids:
            return self._ahead(settings, inputs_embeds=self._embeddings((b, t)))
        ids = (torch.arange(b * t, device=self.device) + 3) % self._rows
        return self._ahead(settings, input_ids=ids.reshape(b, t))

    def _why_not(self) -> str:
        kind = self._model.config.model_type
        return f"{self.checkpoint.path}: {kind!r} cannot be run block by block"

    @torch.no_grad()
    def _ahead(self, settings: Mapping[str, Any] | None = None, **inputs: torch.Tensor) -> Pass:
        """The model's forward pass up to the last block, without the blocks. settings: of the Pass."""
        sizes = next(iter(inputs.values())).shape[:2]
        given = {"known": self._flow.known, "sizes": tuple(sizes)} | dict(settings or {})
        running = Pass(self.n_blocks, **given)
        with self._filled({} if self._around_is_there else self._around()), self._standing_in(running):
            try:
                self._model(**self._given(inputs), **self._no_cache)
            except Arrived:
                if running.hidden[0].is_meta:
                    raise ModelError(f"{self._why_not()}: it reads a table that is not there") from None
                return running
            except _FAILURES as error:
                raise ModelError(f"{self._why_not()}: {type(error).__name__}: {error}") from error
        raise ModelError(
            f"{self.checkpoint.path}: its forward pass called {len(running.calls)} of the "
            f"{self.n_blocks} blocks of {self.path}; it cannot be run block by block"
        )

    @torch.no_grad()
    def _called(self) -> list[int]:
        """The blocks that a pass calls, in order; all of them where that cannot be told."""
        every, ids = list(range(len(self._blocks))), torch.arange(4, device=self.device)[None] % self._rows
        for observe in (False, True):
            running = Pass(len(every), observe=observe)
            with self._standing_in(running), self._stopping_at_head():
                try:
                    self._model(**self._given({"input_ids": ids}), **self._no_cache)
                except Arrived:
                    pass
                except _FAILURES:
                    continue
            found = running.numbers
            return found if found and len({*found}) == len(found) else every
        return every

    def _stopping_at_head(self) -> AbstractContextManager[Any]:
        """Ends a pass at the output layer, whose weights are not there."""

        def stop(*_: Any) -> None:
            raise Arrived

        head = self._model.get_output_embeddings()
        return nullcontext() if head is None else head.register_forward_pre_hook(stop)

    def _around(self) -> dict[str, torch.Tensor]:
        """The weights outside the blocks, without tables of embeddings and the output layer."""
        skipped = self._looked_up | {self._output}
        around: dict[str, torch.Tensor] = {}
        for key, made_of in self._made_of.items():
            if key in skipped or key.startswith(self._apart) or self._in_tower(made_of):
                continue
            whole = torch.empty(get_tensor(self._model, key).shape, dtype=self.dtype, device=self.device)
            for name, place in self._made_of[key].items():
                place.of(whole).copy_(self._decode(name, self.dtype, self.device))
            around[key] = whole
        return around

    def _read_rows_alone(self) -> Iterator[str]:
        """Tables of embeddings of which each call decodes the rows that it reads; their keys."""

        for name, module in self._model.named_modules():
            key = f"{name}.weight"
            if key == self._table or is_large_table(module):
                tensor = self.checkpoint.tensors[next(iter(self._made_of[key]))]
                read_by_rows(module, Table(tensor, self.dtype, self.device))
                yield key

    def _in_tower(self, made_of: Mapping[str, Any]) -> bool:
        """Whether a tensor is of a part that no text goes through."""
        return any((seen := self.checkpoint.seen.get(name)) and seen.role == TOWER for name in made_of)

    def _decode(self, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        value = self.checkpoint.tensors[name].load().to(device)  # as few bytes as it has
        value = value.decode() if isinstance(value, QTensor) else value
        return value.to(dtype, copy=True)

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
    def _standing_in(self, running: Pass) -> Iterator[None]:
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
        return [key for key in self._made_of if key.startswith(f"{self.path}.{self._places[i]}.")]

    def _check_names(self) -> None:
        """ModelError unless the tensors are exactly those of the model."""
        wanted: dict[str, tuple[int, ...]] = {}
        for key, empty in self._model.state_dict().items():
            for name, place in self._made_of.get(key, {}).items():
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


def _stacks(model: PreTrainedModel, checkpoint: Checkpoint) -> list[Stack]:
    try:
        return stacks_of(model)
    except ModelError as error:
        raise ModelError(f"{checkpoint.path}: {error}") from error


def _table_of(model: PreTrainedModel, checkpoint: Checkpoint) -> torch.nn.Module:
    try:
        return model.get_input_embeddings()
    except NotImplementedError as error:
        kind = checkpoint.config.get("model_type")
        raise ModelError(
            f"{checkpoint.path}: {kind!r} cannot be run block by block: it has no one table of embeddings"
        ) from error


def _move_buffers(model: torch.nn.Module, device: torch.device, checkpoint: Checkpoint) -> None:
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                kind = checkpoint.config.get("model_type")
                raise ModelError(
                    f"{checkpoint.path}: {kind!r} cannot be run block by block: buffer {name!r} is in no file"
                )
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
