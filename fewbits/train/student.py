"""Student: a quantized model whose continuous numbers can be read, written and trained as one flat vector.

linear weights on a grid     -> GridLinear: codes fixed, block parameters trainable     kind "block"
                                LatentLinear: float weights too, rounded at each pass   kind "latent"
pruned float weights         -> LatentLinear on the grid of their float type            kind "latent"
the step of a static input   -> trainable                                               kind "block"
norms and biases, 1-D        -> trainable                                               kind "vector"
everything else              -> fixed; `fixed` names it if quantized (embeddings, fused experts: their
                                modules are not plain linear layers)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..activations.mixed import Activations
from ..errors import CalibrationError
from ..files.checkpoint import Checkpoint, LazyTensor
from ..formats.plain import PlainGrid, stored, unstored
from ..qtensor import QTensor
from .halves import Halves
from .inputs import FakeInput
from .objective import Distributions, divergence, loss_and_gradient
from .rounding import latent_of, packed, spacing_of
from .settings import products
from .ste import GridLinear, LatentLinear, rounded_once, size_of

LATENT = "latent"  # the key of a float weight that codes are rounded from
INPUT = "input"  # the key of the step of a static scheme of activations
PRUNED = 0.01  # a float weight with this share of zeros was pruned
PLAIN_STEPS = 8  # of a float weight: the step that takes the place of a grid's spacing is its size by this
# Positions whose logits are computed at once: these are large, and new memory is slow. The gradient of a
# trained output layer is as large as its weight, so there are fewer of them.
POSITIONS, OF_TRAINED = 64, 512


@dataclass(frozen=True)
class Part:
    """One trained array: tensor name, block parameter's key ("" for a vector), kind, where it lives."""

    name: str
    key: str
    kind: str
    value: torch.nn.Parameter


@dataclass(frozen=True)
class Goals:
    """What a step minimizes. parent: a row of the batch and positions in it -> their distributions, None at
    share 0; share: the part of KL, the rest is next-token loss; factor: of the gradient (loss scaling);
    compute: type of the matrix products; micro: windows at once."""

    parent: Callable[[int, slice], Distributions] | None
    share: float = 1.0
    temperature: float = 1.0
    factor: float = 1.0
    compute: torch.dtype = torch.float32
    micro: int = 1


class Student:
    """Made of a transformers model in f32 and the checkpoint it was loaded from."""

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        tokens: torch.Tensor,
        device: torch.device,
        floats: Checkpoint | None = None,
        activations: Activations | None = None,
        keep_zeros: bool = False,
    ):
        """tokens `(c,)`: any window, to check that the model can be split. floats: the checkpoint before it
        was quantized, if codes are trained: latent weights start at its weights, as near as codes allow.
        activations: how inputs of its linear layers are quantized, if they are. keep_zeros: the checkpoint is
        pruned: what is 0 stays 0, and float weights with zeros are trained too."""
        self.model = model.requires_grad_(False).to(device)
        self.device, self.floats, self.activations = device, floats, activations
        self.quantized: dict[str, QTensor] = {}
        self.vectors: dict[str, torch.Tensor] = {}
        self.parts: list[Part] = []
        self.fixed: list[str] = []
        self.latents: dict[str, LatentLinear] = {}
        self.keep_zeros = keep_zeros
        for name, tensor in checkpoint.tensors.items():
            if tensor.quantized:
                self._add_linear(name, tensor.load())
            elif len(tensor.shape) == 1:
                self._add_vector(name, tensor.load())
            elif (pruned := self._pruned(name, tensor)) is not None:
                self._add_linear(name, pruned)
        if keep_zeros:
            self._hold_zeros()
        if not self.parts:
            raise CalibrationError(
                f"{checkpoint.path}: nothing to train: no norm, and no quantized linear layer"
            )
        for part in self.parts:
            part.value.requires_grad_()
        self.halves = Halves(self.model, tokens.to(device))

    def _add_linear(self, name: str, q: torch.Tensor | QTensor) -> None:
        module = self._linear(name)
        if not isinstance(q, QTensor) or module is None:
            self.fixed.append(name)
            return
        grid, codes = q.format.unpack(q.to(self.device))
        idle = self.floats is None and self.activations is None and not grid.parameters()
        if module.weight is self.model.get_input_embeddings().weight or idle:
            self.fixed.append(name)
            return
        if self.floats is None:
            linear = GridLinear(grid, codes, module.bias)
        else:
            w = self._float(name)
            gap = size_of(w) / PLAIN_STEPS if isinstance(grid, PlainGrid) else spacing_of(grid, w)
            latent = latent_of(grid, codes, w)
            linear = LatentLinear(grid, latent, gap, module.bias)
        self.model.set_submodule(name.removesuffix(".weight"), linear)
        self.quantized[name] = q
        self.parts += [Part(name, key, "block", value) for key, value in linear.block_parameters.items()]
        if isinstance(linear, LatentLinear):
            self.parts.append(Part(name, LATENT, "latent", linear.latent))
            self.latents[name] = linear
        if self.activations is not None and self.activations.quantizes(name):
            linear.input = FakeInput(self.activations.quantizer(name), self.device)
            if linear.input.scale is not None:
                self.parts.append(Part(name, INPUT, "block", linear.input.scale))

    def _linear(self, name: str) -> torch.nn.Linear | None:
        """The plain linear layer whose weight this is."""
        try:
            module = self.model.get_submodule(name.removesuffix(".weight"))
        except AttributeError:
            return None
        return module if type(module) is torch.nn.Linear else None

    def _pruned(self, name: str, tensor: LazyTensor) -> QTensor | None:
        """A float weight that was pruned, on the grid of its type, if codes are trained."""
        trained = self.keep_zeros and self.floats is not None and name in self.floats.tensors
        if not trained or self._linear(name) is None:
            return None
        w = tensor.load()
        assert isinstance(w, torch.Tensor)
        many = float((w == 0).float().mean()) >= PRUNED
        return unstored(w) if many else None

    def _hold_zeros(self) -> None:
        """Weights that are 0, as pruned ones are, stay 0: so do their latent weights and the level 0 of a
        learned table, since their unit is 0."""
        for part in self.parts:
            if part.kind == "latent":
                zero = self.quantized[part.name].to(self.device).decode() == 0
                part.value.data.masked_fill_(zero, 0.0)

    def _float(self, name: str) -> torch.Tensor:
        """`(n, k)` f32: the weight before it was quantized."""
        assert self.floats is not None
        w = self.floats.tensors[name].load()
        assert isinstance(w, torch.Tensor)
        return w.to(self.device, torch.float32)

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

    def move(self, start: torch.Tensor, unit: torch.Tensor, a: torch.Tensor) -> None:
        """Write start + unit * a, `(p,)` each, without another vector of that size."""
        for part, (at, _) in zip(self.parts, self.spans(), strict=True):
            torch.mul(unit[at], a[at], out=part.value.data.view(-1)).add_(start[at])

    def gradients(self) -> list[torch.Tensor]:
        """-> the part of each span, `(p,)`: what `learn` summed since the last call."""
        found = [torch.zeros_like(p.value) if p.value.grad is None else p.value.grad for p in self.parts]
        for part in self.parts:
            part.value.grad = None
        return [value.flatten() for value in found]

    def units(self) -> torch.Tensor:
        """-> `(p,)`: the size of each number, at least FLOOR of its row's mean; of a latent weight the
        spacing of the grid."""
        return torch.cat([self._unit(part).flatten() for part in self.parts])

    def _unit(self, part: Part) -> torch.Tensor:
        unit = self.latents[part.name].gap if part.kind == "latent" else size_of(part.value)
        return unit * (part.value.detach() != 0) if self.keep_zeros and part.kind != "vector" else unit

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
                packed[name] = stored(self._packed(name, given))
        return packed

    def _packed(self, name: str, given: Mapping[str, torch.Tensor]) -> QTensor:
        """A weight with trained block parameters; codes are those of the latent weight on the grid as
        stored."""
        q = self.quantized[name].to(self.device)
        grid, codes = q.format.unpack(q)
        parameters = {key: value for key, value in given.items() if key not in (LATENT, INPUT)}
        grid = grid.replaced(parameters) if parameters else grid
        if LATENT not in given:
            return q.format.pack(grid, codes)
        return packed(q.format, grid, codes, given[LATENT])

    def ranges(self, flat: torch.Tensor) -> dict[str, list[float]]:
        """`(p,)` -> the step and zero point of each static input, as a record of activations has them."""
        found = {}
        for part, piece in zip(self.parts, self._pieces(flat), strict=True):
            if part.key == INPUT:
                assert self.activations is not None
                affine = self.activations.quantizers[part.name].affine
                found[part.name] = [float(piece), 0 if affine is None else int(affine.zero)]
        return found

    def weight_of(self, part: Part) -> torch.Tensor:
        """What the latent weight of a part is rounded to now."""
        return self.latents[part.name].weight

    def rounded(self, flat: torch.Tensor) -> torch.Tensor:
        """`(p,)` -> `(p,)`: the same numbers as `pack` stores them."""
        packed, values = self.pack(flat), []
        for part, latent in zip(self.parts, self._pieces(flat), strict=True):
            value = packed[part.name]
            if part.key in (LATENT, INPUT):
                value = latent
            elif isinstance(value, QTensor):
                value = value.format.unpack(value)[0].parameters()[part.key]
            values.append(value.float().flatten())
        return torch.cat(values)

    # ---- running it

    def learn(self, windows: torch.Tensor, goals: Goals) -> float:
        """Tokens `(b, c)` -> mean loss over them; its gradient, times goals.factor, is added.

        Only the logits of POSITIONS are in memory; their gradient needs no graph."""
        total = 0.0
        once = rounded_once([*self.halves.modules(), *self.model.modules()])
        with once, self.halves.product_in(goals.compute):
            for start in range(0, len(windows), goals.micro):
                total += self._learn(windows, range(start, min(start + goals.micro, len(windows))), goals)
        return total / len(windows)

    def _learn(self, windows: torch.Tensor, rows: range, goals: Goals) -> float:
        """-> the sum of the losses of these rows."""
        batch = windows[rows.start : rows.stop].to(self.device)
        with products(goals.compute, self.device):
            hidden = self.halves.blocks(batch)
        cut = hidden.detach().float().requires_grad_()
        total = 0.0
        trained = isinstance(self.halves.output, GridLinear)
        positions = OF_TRAINED if trained else POSITIONS
        for i, row in enumerate(rows):
            for start in range(0, batch.shape[1], positions):
                at = slice(start, min(start + positions, batch.shape[1]))
                with products(goals.compute, self.device):
                    # For the strides of a slice of a batch torch would copy the output's weight each time.
                    logits = self.halves.head(cut[i, at][None])
                parent = None if goals.parent is None else goals.parent(row, at)
                loss, gradient = loss_and_gradient(
                    logits.detach()[0], parent, batch[i], at, goals.share, goals.temperature
                )
                total += loss
                logits.backward(gradient.mul_(goals.factor / len(windows))[None].to(logits.dtype))
        assert cut.grad is not None
        hidden.backward(cut.grad.to(hidden.dtype))
        return total

    def blame(self, window: torch.Tensor) -> str:
        """Tokens `(c,)` -> the first module whose output is not finite, for an error; "" if none is."""
        found: list[str] = []

        def look(name: str) -> Callable[..., None]:
            def hook(module: Any, given: Any, out: Any) -> None:
                if isinstance(out, torch.Tensor) and not found and not bool(out.isfinite().all()):
                    found.append(name)

            return hook

        hooks = [module.register_forward_hook(look(name)) for name, module in self.halves.named()]
        with torch.no_grad():
            self.halves.blocks(window[None].to(self.device))
        for handle in hooks:
            handle.remove()
        return found[0] if found else ""

    def loss(self, window: torch.Tensor, log_p: torch.Tensor | None, share: float) -> float:
        """Tokens `(c,)`, the teacher's log p `(c, v)`, None where share is 0 -> share of the mean
        KL(teacher || student), and the rest of the next-token loss."""
        window = window.to(self.device)
        with torch.no_grad():
            log_q = self.halves.head(self.halves.blocks(window[None]))[0].float().log_softmax(-1)
            loss = 0.0 if log_p is None else share * divergence(log_p, log_q)
            following = log_q[:-1].gather(-1, window[1:, None])
            return loss - ((1 - share) * float(following.mean()) if share < 1 else 0.0)
