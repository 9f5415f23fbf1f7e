"""Tables of embeddings of which each call decodes the rows that it reads."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch

from ..files.checkpoint import LazyTensor
from ..qtensor import QTensor

LARGE = 2**22  # weights of a table that is not decoded as a whole


class Table:
    """A table of embeddings, of which rows are decoded when they are asked for."""

    def __init__(self, tensor: LazyTensor, dtype: torch.dtype, device: torch.device) -> None:
        self._tensor, self.shape, self.dtype, self.device = tensor, torch.Size(tensor.shape), dtype, device

    def __getitem__(self, at: Any) -> torch.Tensor:
        at = at if isinstance(at, tuple) else (at,)
        value, rows = self._tensor.load(), torch.as_tensor(at[0]).cpu()
        found = value.decode_rows(rows.reshape(-1)) if isinstance(value, QTensor) else value[rows.reshape(-1)]
        found = found.reshape(*rows.shape, -1).to(self.device, self.dtype)
        return found[(..., *at[1:])] if at[1:] else found


def is_large_table(module: torch.nn.Module) -> bool:
    """A table that is best read by its rows: token embeddings of another kind, as far as it is called so."""
    by_ids = list(signature(module.forward).parameters)[:1] in (["input"], ["input_ids"])
    return isinstance(module, torch.nn.Embedding) and by_ids and module.weight.numel() > LARGE


def read_by_rows(module: torch.nn.Module, table: Table) -> None:
    """Give an embedding its table, in place of a weight."""
    module.padding_idx = None  # type: ignore[assignment]  # rows come in another order
    module.__dict__["weight"] = table  # found before the parameter
    module.register_forward_pre_hook(partial(_fill, table=table))
    module.register_forward_hook(partial(_empty, table=table))


def _fill(module: torch.nn.Module, args: tuple[Any, ...], table: Table) -> tuple[Any, ...]:
    rows, where = args[0].unique(return_inverse=True)
    module.__dict__["weight"] = table[rows]
    return (where, *args[1:])


def _empty(module: torch.nn.Module, *_: Any, table: Table) -> None:
    module.__dict__["weight"] = table
