"""Plans: first match wins, TOML round trips exactly, faults are all named at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits.errors import PlanError
from fewbits.plan import Plan, Rule, parse_rule

FORMATS = ["q6_k", "q8_0", "int4_g128", "nf4", "f16"]
text = st.text(st.characters(codec="utf-8"), min_size=1)
option = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | text
rules = st.builds(
    Rule,
    text,
    st.sampled_from(FORMATS),
    text,
    st.dictionaries(text, option.filter(lambda v: v == v), max_size=3),
)


@given(st.lists(rules, max_size=4))
def test_toml_round_trips(listed):
    plan = Plan(tuple(listed))
    again = Plan.from_toml(plan.to_toml())
    assert again == plan
    assert again.to_toml() == plan.to_toml()
    assert again.digest() == plan.digest()
    kinds = [[type(value) for value in dict(sorted(rule.options.items())).values()] for rule in plan.rules]
    assert kinds == [[type(value) for value in rule.options.values()] for rule in again.rules]


@given(st.lists(rules, min_size=1, max_size=4), st.data())
def test_digest_changes_with_any_rule(listed, data):
    i = data.draw(st.integers(0, len(listed) - 1))
    changed = [
        *listed[:i],
        Rule(listed[i].match + "x", listed[i].format, "rtn", listed[i].options),
        *listed[i + 1 :],
    ]
    assert Plan(tuple(changed)).digest() != Plan(tuple(listed)).digest()


@given(st.lists(rules, max_size=4), st.lists(text, min_size=1, max_size=2))
def test_the_first_matching_rule_wins(listed, names):
    matching = [rule for rule in listed if rule.matches(names)]
    assert Plan(tuple(listed)).choose(names) == (matching[0] if matching else None)
    everything = Rule("*", "q8_0")
    assert Plan((everything, *listed)).choose(names) is everything


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("model.layers.3.mlp.down_proj.weight", True),
        ("model.layers.3.mlp.down_proj", True),
        ("*.down_proj", True),
        ("*down_proj.weight", True),
        ("blk.3.ffn_down", True),
        ("blk.[0-3].*", True),
        ("*.Down_proj", False),
        ("down_proj", False),
        ("*.up_proj", False),
    ],
)
def test_patterns_see_every_name_of_a_weight(pattern, matches):
    names = ["model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"]
    assert Rule(pattern, "q6_k").matches(names) == matches


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("*.down_proj=q6_k", Rule("*.down_proj", "q6_k")),
        ("*=gptq:int4_g128", Rule("*", "int4_g128", "gptq")),
        ("*=q6_k,search=false,seed=3", Rule("*", "q6_k", None, {"search": False, "seed": 3})),
        ("*=gptq:nf4,damp=0.05,order=act", Rule("*", "nf4", "gptq", {"damp": 0.05, "order": "act"})),
        ('*=q6_k,a="1",day=2026-01-01', Rule("*", "q6_k", None, {"a": "1", "day": "2026-01-01"})),
    ],
)
def test_rules_on_the_command_line(written, rule):
    assert parse_rule(written) == rule
    assert Plan.from_toml(Plan((rule,)).to_toml()).rules == (rule,)


@pytest.mark.parametrize(
    ("written", "part"),
    [
        ("q6_k", "PATTERN="),
        ("=q6_k", "PATTERN="),
        ("*=", "PATTERN="),
        ("*=:q6_k", "PATTERN="),
        ("*=gptq:", "PATTERN="),
        ("*=q6_k,search", "'search' is not OPTION=VALUE"),
        ("*=q6_k,a=1,a=2", "'a' is given twice"),
    ],
)
def test_a_rule_that_cannot_be_read_says_how_to_write_it(written, part):
    with pytest.raises(PlanError) as caught:
        parse_rule(written)
    assert part in str(caught.value)
    assert repr(written) in str(caught.value)


def test_unknown_formats_are_all_named_at_once():
    with pytest.raises(PlanError) as caught:
        Plan((Rule("a", "q7_k"), Rule("b", "q8_0"), Rule("c", "int99_g128")))
    message = str(caught.value)
    assert "rule 0 (a)" in message and "q7_k" in message
    assert "rule 2 (c)" in message and "int99_g128" in message
    assert "rule 1" not in message


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ("[[rule]", ["not TOML"]),
        ("[rule]\nmatch = '*'", ["[[rule]]"]),
        ("rule = [3]", ["rule 0", "not a table"]),
        ("[[rule]]\nmatch = 3\nbits = 4", ["'match' is a int", "'format' is missing", "unknown key 'bits'"]),
        ("[[rule]]\nmatch = '*'\nformat = 'q8_0'\noptions = {a = [1]}", ["option 'a' is a list"]),
        ("[[rules]]\nmatch = '*'", ["unknown key 'rules'"]),
    ],
)
def test_faults_of_a_plan_file_are_all_named(toml, parts):
    with pytest.raises(PlanError) as caught:
        Plan.from_toml(toml, "plan.toml")
    assert all(part in str(caught.value) for part in parts)


def test_an_empty_plan_chooses_nothing():
    assert Plan.from_toml("").choose(["a.weight"]) is None


def test_a_plan_file_may_say_how_the_whole_run_goes():
    plan = Plan.from_toml('[run]\nmethod = "gptq"\ntokens = 4096\n\n[[rule]]\nmatch = "*"\nformat = "q6_k"\n')
    assert plan.run == {"method": "gptq", "tokens": 4096} and plan.rules == (Rule("*", "q6_k"),)
    assert Plan.from_toml(plan.to_toml()) == plan
    assert plan.digest() != Plan(plan.rules).digest()
    with pytest.raises(PlanError, match=r"\[run\] is a table"):
        Plan.from_toml("run = 3")
