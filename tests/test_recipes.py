"""Recipes without an engine: against the types that llama.cpp once gave, and properties.

tests/engines/test_recipes.py makes golden/recipes.json (FEWBITS_UPDATE_GOLDEN=1).
"""

import json
import random
from pathlib import Path

import gguf
import pytest

from fewbits.errors import PlanError
from fewbits.plan.mixtures import RECIPES, ROWS, Row
from fewbits.plan.recipes import Hyper, block_size, choose_types, kept_reason, needing_imatrix
from tests.recipe_cases import CASES, summarize

GOLDEN = json.loads((Path(__file__).parent / "golden" / "recipes.json").read_text())
LLAMA = Hyper("llama", 1, 4, 4)


def choices(case, recipe, **options):
    hyper, tensors = CASES[case]
    name, _, imatrix = recipe.partition("+")
    return choose_types(name, tensors, hyper, has_imatrix=bool(imatrix), **options)


@pytest.mark.parametrize("case", CASES)
def test_types_equal_those_of_llama_quantize(case):
    assert len(GOLDEN[case]) > len(set(RECIPES.values()))
    for recipe, expected in GOLDEN[case].items():
        ours = {name: choice.type for name, choice in choices(case, recipe).items()}
        assert summarize(ours) == expected, recipe


def test_golden_table_holds_every_recipe():
    names = {recipe.name for recipe in RECIPES.values()}
    for case in CASES:
        assert {recipe.partition("+")[0] for recipe in GOLDEN[case]} == names


def test_every_row_of_the_table_decides_some_tensor(monkeypatch):
    """A row that no case needs is either dead or untested."""
    used = set()
    holds = Row.holds

    def spy(row, facts):
        found = holds(row, facts)
        used.update([row] if found else [])
        return found

    monkeypatch.setattr(Row, "holds", spy)
    for case in CASES:
        for recipe in GOLDEN[case]:
            choices(case, recipe)
    assert [row for row in ROWS if row not in used] == []


def test_the_order_in_which_tensors_are_given_does_not_matter():
    hyper, tensors = CASES["llama"]
    shuffled = random.Random(0).sample(tensors, len(tensors))
    assert choose_types("q4_k_m", shuffled, hyper) == choose_types("q4_k_m", tensors, hyper)
    assert list(choose_types("q4_k_m", shuffled, hyper)) == [name for name, _, _ in shuffled]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_type_divides_its_row_and_every_change_has_a_reason(recipe):
    for hyper, tensors in CASES.values():
        shapes = {name: shape for name, shape, _ in tensors}
        for name, choice in choose_types(recipe, tensors, hyper).items():
            assert shapes[name][-1] % block_size(choice.type) == 0
            assert (choice.type != choice.wanted) <= (choice.reason is not None)


@pytest.mark.parametrize(
    ("wanted", "row", "type_", "reason"),
    [
        ("q4_k", 576, "q5_0", "row length 576 is not a multiple of 256, the block of q4_k"),
        ("q6_k", 576, "q8_0", "row length 576 is not a multiple of 256, the block of q6_k"),
        ("q4_k", 80, "f16", "row length 80 is not a multiple of 256, the block of q4_k"),
        ("q8_0", 80, "f16", "row length 80 is not a multiple of 32, the block of q8_0"),
        ("q8_0", 96, "q8_0", None),
    ],
)
def test_fall_back_says_why(wanted, row, type_, reason):
    tensors = [("blk.0.attn_q.weight", (4, row), "f32")]
    choice = choose_types("q5_1", tensors, LLAMA, overrides=lambda name: wanted)["blk.0.attn_q.weight"]
    assert (choice.type, choice.wanted, choice.reason) == (type_, wanted, reason)


@pytest.mark.parametrize(
    ("name", "shape", "kept"),
    [
        ("blk.0.attn_q.weight", (2, 8), False),
        ("blk.0.ffn_up_exps.weight", (4, 2, 8), False),
        ("blk.0.attn_q.bias", (8,), True),
        ("blk.0.attn_q.weight", (1, 8), True),
        ("blk.0.attn_q_norm.weight", (2, 8), True),
        ("blk.0.ffn_gate_inp.weight", (4, 8), True),
        ("position_embd.weight", (4, 8), True),
    ],
)
def test_kept_tensors_stay_as_stored_whatever_the_rule_says(name, shape, kept):
    choice = choose_types("q8_0", [(name, shape, "bf16")], LLAMA, overrides=lambda name: "f16")[name]
    assert choice.type == ("bf16" if kept else "f16")
    assert (kept_reason(name, shape) is not None) == kept


def test_numbers_are_those_of_gguf():
    theirs = {t.name.lower().split("_", 1)[-1]: int(t) for t in gguf.LlamaFileType}
    assert all(recipe.file_type == theirs[recipe.name] for recipe in RECIPES.values())


def test_aliases_are_the_medium_mixtures():
    for short in ("q3_k", "q4_k", "q5_k"):
        assert RECIPES[short] is RECIPES[short + "_m"]
        assert choices("llama", short) == choices("llama", short + "_m")


def test_the_smallest_types_need_an_importance_matrix():
    for recipe, needs in (("iq2_xs", True), ("q4_k_m", False)):
        types = {name: choice.type for name, choice in choices("llama", recipe).items()}
        assert bool(needing_imatrix(recipe, types)) == needs


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("q4_k_x", [], LLAMA), ["unknown recipe 'q4_k_x'", "q4_k_m"]),
        (("q4_k_m", [("a.weight", (2, 256), "f32")] * 2, LLAMA), ["a.weight", "2 times"]),
        (("q4_k_m", [], Hyper("glm5-next", 1, 1, 1)), ["glm5-next"]),
    ],
)
def test_faults_are_named(arguments, parts):
    with pytest.raises(PlanError) as caught:
        choose_types(*arguments)
    assert all(part in str(caught.value) for part in parts)


def test_an_override_that_is_no_ggml_type_is_refused():
    with pytest.raises(PlanError, match="'int4_g128' is not a GGML type"):
        choose_types("q4_k_m", [("a.weight", (2, 256), "f32")], LLAMA, overrides=lambda name: "int4_g128")
