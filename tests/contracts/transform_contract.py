"""What every transform promises, as functions that take one and a model and assert.

A new pair transform is registered and passes all of it: see `PROMISES`, and test_transforms.py, which
crosses them with the registry (and the rotation) and with one model of each structure.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fewbits.adapters.transformers import load_model
from fewbits.calibrate.stats import Stats
from fewbits.files.checkpoint import Checkpoint
from fewbits.formats import FORMATS
from fewbits.model.archs import check_complete, require_architecture
from fewbits.model.sites import role_of
from fewbits.transforms.pairs import Pair, find_pairs

# Some fifteen linear maps behind each other, each a sum of up to 512 products in another order: an error
# of sqrt(512) * 2^-24 = 1.3e-6 each, of random sign, so sqrt(15) * 1.3e-6 = 5e-6 in all. At most 3e-6 seen.
REASSOCIATED = 1e-5


@dataclass(frozen=True)
class Case:
    """A float model with what its transforms are given; `inputs` are made up, with a few loud columns."""

    checkpoint: Checkpoint
    tokens: torch.Tensor
    logits: torch.Tensor
    weights: Mapping[str, torch.Tensor]
    pairs: list[Pair]
    stats: Mapping[str, Stats]

    def formats(self, kind: str) -> dict:
        """A format for every consumer but the routers."""
        return {name: None if role_of(name) == "router" else FORMATS.get(kind) for name in self.stats}


Transform = Callable[[Case], Checkpoint]


def make_case(checkpoint: Checkpoint) -> Case:
    tokens = torch.randint(3, 500, (2, 16), generator=torch.Generator().manual_seed(0))
    pairs = find_pairs(checkpoint)
    stats = {}
    for i, pair in enumerate(pairs):
        x = inputs(i, 64, pair.size * pair.repeat)
        stats |= dict.fromkeys(pair.consumers, Stats.of(x))
    weights = {name: tensor.load().float() for name, tensor in checkpoint.tensors.items()}
    return Case(checkpoint, tokens, logits(checkpoint, tokens), weights, pairs, stats)


def inputs(seed: int, t: int, k: int, loud: float = 30.0) -> torch.Tensor:
    """`(t, k)` random, of which one column in 32 is `loud` times larger."""
    x = torch.randn(t, k, generator=torch.Generator().manual_seed(seed))
    x[:, 5::32] *= loud
    return x


def logits(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(checkpoint)(tokens).logits


def move(after: torch.Tensor, before: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())


def something_changes(transform: Transform, case: Case) -> None:
    after = transform(case).tensors
    changed = [name for name, w in case.weights.items() if not torch.equal(after[name].load().float(), w)]
    assert any(case.weights[name].ndim == 2 and ".layers." in name for name in changed)


def logits_do_not_move(transform: Transform, case: Case) -> None:
    assert move(logits(transform(case), case.tokens), case.logits) <= REASSOCIATED


def checkpoint_stays_complete(transform: Transform, case: Case) -> None:
    after = transform(case)
    check_complete(require_architecture(after.config), after.config, after.tensors)
    assert set(after.tensors) - set(case.checkpoint.tensors) <= {"lm_head.weight"}
    assert {name: tensor.shape for name, tensor in after.tensors.items() if name in case.weights} == {
        name: tuple(w.shape) for name, w in case.weights.items()
    }


def tensors_are_what_they_say(transform: Transform, case: Case) -> None:
    for name, tensor in transform(case).tensors.items():
        value = tensor.load()
        assert (tensor.name, tensor.shape, tensor.quantized) == (name, tuple(value.shape), False)
        assert (tensor.kind.torch, tensor.nbytes) == (value.dtype, value.nbytes)


def input_is_left_alone(transform: Transform, case: Case) -> None:
    before = {name: w.clone() for name, w in case.weights.items()}
    config = dict(case.checkpoint.config)
    for tensor in transform(case).tensors.values():
        tensor.load()
    assert case.checkpoint.config == config
    assert all(torch.equal(case.weights[name], w) for name, w in before.items())
    assert all(torch.equal(case.checkpoint.tensors[name].load().float(), w) for name, w in before.items())


def the_same_twice(transform: Transform, case: Case) -> None:
    one, two = transform(case).tensors, transform(case).tensors
    assert all(torch.equal(one[name].load(), two[name].load()) for name in one)


PROMISES = (
    something_changes,
    logits_do_not_move,
    checkpoint_stays_complete,
    tensors_are_what_they_say,
    input_is_left_alone,
    the_same_twice,
)
