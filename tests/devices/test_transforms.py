"""Transforms of pairs on another device: the CPU's scales."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from fewbits.files.open import open_checkpoint
from fewbits.transforms import TRANSFORMS
from tests.contracts.transform_contract import Case, make_case
from tests.tiny import save_tiny

from .same import same_tensor

QUICK: dict[str, dict[str, Any]] = {"awq": {"steps": 2, "rows": 16}, "smooth": {}, "equalize": {"rounds": 2}}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    path = save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("model") / "llama")
    return make_case(open_checkpoint(path))


@pytest.mark.parametrize("name", [*TRANSFORMS])
def test_scales_are_the_cpus(name: str, case: Case, device: torch.device) -> None:
    pairs = case.pairs[:2]
    names = {each for pair in pairs for each in pair.names()}

    def scales(weights: Mapping[str, torch.Tensor], stats: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        given = (weights, pairs, stats, case.formats("int8_channel"))
        return {pair.name: scale for pair, scale in TRANSFORMS.get(name)(*given, **QUICK[name])}

    there = {each: weight.to(device) for each, weight in case.weights.items() if each in names}
    wanted = scales(case.weights, case.stats)
    found = scales(there, {each: stats.to(device) for each, stats in case.stats.items()})
    assert wanted and found.keys() == wanted.keys()
    for pair, scale in wanted.items():
        same_tensor(found[pair], scale, exact=False)
