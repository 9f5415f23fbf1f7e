"""Student: a quantized model whose continuous numbers can be read, written and trained as one flat vector.

linear weights on a grid     -> GridLinear: codes fixed, block parameters trainable     kind "block"
                                LatentLinear: float weights too, rounded at each pass   kind "latent"
norms and biases, 1-D        -> trainable                                               kind "vector"
everything else              -> fixed; `fixed` names it if quantized (embeddings, fused experts: their
                                modules are not plain linear layers)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CalibrationError
from ..files.checkpoint import Checkpoint
from ..formats.base import Grid
from ..qtensor import QTensor
from .halves import Halves
from .rounding import gap_of
from .ste import GridLinear, LatentLinear

LATENT = "latent"  # the key of a float weight that codes are rounded from
NEAR = 0.45  # of a gap: how far from its code's value a latent weight starts at most
FLOOR = 0.1  # least unit of a number, as a share of its row's mean magnitude


@dataclass(frozen=True)
class Part:
    """One trained array: tensor name, block parameter's key ("" for a vector), kind, where it lives."""

    name: str
    key: str
    kind: str
    value: torch.nn.Parameter


class Student:
    """Made of a transformers model in f32 and the checkpoint it was loaded from."""

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        tokens: torch.Tensor,
        device: torch.device,
        floats: Checkpoint | None = None,
    ):
        """tokens `(c,)`: any window, to check that the model can be split. floats: the checkpoint before it
        was quantized, if codes are trained: latent weights start at its weights, as near as codes allow."""
        self.model = model.requires_grad_(False).to(device)
        self.device, self.floats = device, floats
        self.quantized: dict[str, QTensor] = {}
        self.vectors: dict[str, torch.Tensor] = {}
        self.parts: list[Part] = []
        self.fixed: list[str] = []
        self.gaps: dict[str, torch.Tensor] = {}
        self.holds_zeros = False
        for name, tensor in checkpoint.tensors.items():
            if tensor.quantized:
                self._add_linear(name, tensor.load())
            elif len(tensor.shape) == 1:
                self._add_vector(name, tensor.load())
        if not self.parts:
            raise CalibrationError(
                f"{checkpoint.path}: nothing to train: no norm, and no quantized linear layer"
            )
        for part in self.parts:
            part.value.requires_grad_()
        self.halves = Halves(self.model, tokens.to(device))

    def _add_linear(self, name: str, q: torch.Tensor | QTensor) -> None:
        path = name.removesuffix(".weight")
        module = dict(self.model.named_modules()).get(path)
        if not isinstance(q, QTensor) or type(module) is not torch.nn.Linear:
            self.fixed.append(name)
            return
        grid, codes = q.format.unpack(q.to(self.device))
        if module.weight is self.model.get_input_embeddings().weight or not grid.parameters():
            self.fixed.append(name)
            return
        if self.floats is None:
            linear = GridLinear(grid, codes, module.bias)
        else:
            latent = self._latent(name, grid, codes)
            linear = LatentLinear(grid, latent, gap_of(grid, latent), module.bias)
        self.model.set_submodule(path, linear)
        self.quantized[name] = q
        self.parts += [Part(name, key, "block", value) for key, value in linear.block_parameters.items()]
        if isinstance(linear, LatentLinear):
            self.parts.append(Part(name, LATENT, "latent", linear.latent))
            self.gaps[name] = linear.gap

    def hold_zeros(self) -> None:
        """Weights that are 0, as pruned ones are, stay 0: so do their latent weights and the level 0 of a
        learned table, since their unit is 0."""
        self.holds_zeros = True
        for part in self.parts:
            if part.kind == "latent":
                zero = self.quantized[part.name].to(self.device).decode() == 0
                part.value.data.masked_fill_(zero, 0.0)

    def _latent(self, name: str, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
        """`(n, k)` f32: the float weight, moved so far that it is rounded to `codes`."""
        assert self.floats is not None
        w = self.floats.tensors[name].load()
        assert isinstance(w, torch.Tensor)
        w, value = w.to(self.device, torch.float32), grid.value(codes)
        reach = NEAR * gap_of(grid, w)
        latent = torch.minimum(torch.maximum(w, value - reach), value + reach)
        return torch.where(grid.round(latent) == codes, latent, value)

    def _add_vector(self, name: str, stored: torch.Tensor | QTensor) -> None:
        value = dict(self.model.named_parameters()).get(name)
        if isinstance(value, torch.nn.Parameter) and isinstance(stored, torch.Tensor):
            self.vectors[name] = stored.clone()
            self.parts.append(Part(name, "", "vector", value))

    # ---- the flat vector

    def read(self) -> torch.Tensor:
        """-> `(p,)` f32: every trained number."""
        return torch.cat([part.value.detach().flatten() for part in self.parts])

    def write(self, flat: torch.Tensor) -> None:
        for part, piece in zip(self.parts, self._pieces(flat), strict=True):
            part.value.data.copy_(piece)

    def gradient(self) -> torch.Tensor:
        """-> `(p,)`: what `learn` summed since the last call."""
        gradients = [torch.zeros_like(p.value) if p.value.grad is None else p.value.grad for p in self.parts]
        for part in self.parts:
            part.value.grad = None
        return torch.cat([value.flatten() for value in gradients])

    def units(self) -> torch.Tensor:
        """-> `(p,)`: the size of each number, at least FLOOR of its row's mean; of a latent weight the
        spacing of the grid."""
        return torch.cat([self._unit(part).flatten() for part in self.parts])

    def _unit(self, part: Part) -> torch.Tensor:
        size = part.value.detach().abs()
        unit = size.maximum(FLOOR * size.mean(-1, keepdim=True))
        unit = self.gaps[part.name] if part.kind == "latent" else unit
        return unit * (size != 0) if self.holds_zeros and part.kind != "vector" else unit

    def spans(self) -> list[tuple[slice, str]]:
        """The place of each part in the vector, and its kind."""
        found, start = [], 0
        for part in self.parts:
            found.append((slice(start, start + part.value.numel()), part.kind))
            start += part.value.numel()
        return found

    def _pieces(self, flat: torch.Tensor) -> list[torch.Tensor]:
        pieces = flat.split([part.value.numel() for part in self.parts])
        return [piece.view_as(part.value) for piece, part in zip(pieces, self.parts, strict=True)]

    def pack(self, flat: torch.Tensor) -> dict[str, QTensor | torch.Tensor]:
        """`(p,)` -> each trained tensor as stored in a file: the same codes, vectors in their own dtype."""
        values: dict[str, dict[str, torch.Tensor]] = {}
        for part, piece in zip(self.parts, self._pieces(flat), strict=True):
            values.setdefault(part.name, {})[part.key] = piece
        packed: dict[str, QTensor | torch.Tensor] = {}
        for name, given in values.items():
            if name in self.vectors:
                packed[name] = given[""].to(self.vectors[name].dtype)
            else:
                packed[name] = self._packed(name, given)
        return packed

    def _packed(self, name: str, given: Mapping[str, torch.Tensor]) -> QTensor:
        """A weight with trained block parameters; codes are those of the latent weight on the grid as
        stored."""
        q = self.quantized[name].to(self.device)
        grid, codes = q.format.unpack(q)
        parameters = {key: value for key, value in given.items() if key != LATENT}
        q = q.format.pack(grid.replaced(parameters) if parameters else grid, codes)
        if LATENT not in given:
            return q
        grid, _ = q.format.unpack(q)
        return q.format.pack(grid, grid.round(given[LATENT]))

    def rounded(self, flat: torch.Tensor) -> torch.Tensor:
        """`(p,)` -> `(p,)`: the same numbers as `pack` stores them."""
        packed, values = self.pack(flat), []
        for part, latent in zip(self.parts, self._pieces(flat), strict=True):
            value = packed[part.name]
            if part.kind == "latent":
                value = latent
            elif isinstance(value, QTensor):
                value = value.format.unpack(value)[0].parameters()[part.key]
            values.append(value.float().flatten())
        return torch.cat(values)

    # ---- running it

    def learn(self, windows: torch.Tensor, log_p: Callable[[int], torch.Tensor]) -> float:
        """Tokens `(b, c)`; log_p(i): the teacher's `(c, v)` for row i -> mean KL; its gradient is added.

        Only the logits of one window are in memory; their gradient, (q - p) / positions, needs no graph.
        """
        hidden = self.halves.blocks(windows.to(self.device))
        cut = hidden.detach().requires_grad_()
        total = 0.0
        for i in range(len(windows)):
            logits = self.halves.head(cut[i : i + 1])
            reference, quantized = log_p(i), logits.detach()[0].float().log_softmax(-1)
            total += _divergence(reference, quantized)
            logits.backward(
                (quantized.exp_().sub_(reference.exp_()) / windows.numel())[None].to(logits.dtype)
            )
        hidden.backward(cut.grad)
        return total / len(windows)

    def divergence(self, window: torch.Tensor, log_p: torch.Tensor) -> float:
        """Tokens `(c,)`, the teacher's log p `(c, v)` -> mean KL(teacher || student)."""
        with torch.no_grad():
            logits = self.halves.head(self.halves.blocks(window[None].to(self.device)))
            return _divergence(log_p, logits[0].float().log_softmax(-1))


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """`(c, v)` both -> the mean over c of KL(p || q)."""
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
