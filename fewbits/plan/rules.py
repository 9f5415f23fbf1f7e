"""Plan: ordered rules for the format and algorithm of each weight. The first match wins.

    PATTERN=[ALGORITHM:]FORMAT[,OPTION=VALUE]...           a rule on the command line:
    *.down_proj=q6_k
    *.mlp.*=gptq:int4_g128,damp=0.05

    [[rule]]                             the same in a plan file (TOML)
    match = "*.mlp.*"
    format = "int4_g128"
    algorithm = "gptq"
    options = {damp = 0.05}

    [run]                                options of the run, named as on the command line; once, before
    to = "q4_k_m"                        the rules; the command line has priority
    method = "gptq"

A pattern is a shell wildcard (`*`, `?`, `[...]`), matched against every name of a weight: its own,
its own without `.weight`, and the same of its GGUF name. `to_toml` is canonical, so its SHA-256 is
the plan's digest in a receipt.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Any

from ..errors import FewbitsError, PlanError, raise_all
from ..formats import kind_of

Option = bool | int | float | str


@dataclass(frozen=True)
class Rule:
    """The format and algorithm of weights with a matching name. `options` are keyword arguments of the
    algorithm; without an algorithm, that of the run is used."""

    match: str
    format: str
    algorithm: str | None = None
    options: Mapping[str, Option] = field(default_factory=dict)

    def matches(self, names: Sequence[str]) -> bool:
        spellings = [spelling for name in names for spelling in (name, name.removesuffix(".weight"))]
        return any(fnmatchcase(spelling, self.match) for spelling in spellings)


@dataclass(frozen=True)
class Plan:
    """Ordered rules, and options of the run. Raises PlanError with every fault for invalid rules; the reader
    of `run` checks its keys."""

    rules: tuple[Rule, ...] = ()
    run: Mapping[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = [
            f"rule {i} ({rule.match}): {fault}"
            for i, rule in enumerate(self.rules)
            for fault in _faults(rule)
        ]
        raise_all(PlanError, "plan", faults)

    def choose(self, names: Sequence[str]) -> Rule | None:
        """The first rule that matches any of a weight's names, None if there is none."""
        return next((rule for rule in self.rules if rule.matches(names)), None)

    def to_toml(self) -> str:
        """Canonical TOML: `Plan.from_toml` of it is this plan."""
        head = [f"{_toml(name)} = {_toml(self.run[name])}" for name in sorted(self.run)]
        tables = ["\n".join(["[run]", *head]) + "\n"] if head else []
        return "\n".join([*tables, *(_rule_toml(rule) for rule in self.rules)])

    @staticmethod
    def from_toml(text: str, where: str = "plan") -> Plan:
        """Read a plan file; raises PlanError naming `where` and every fault."""
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"{where}: not TOML: {error}") from None
        entries = table.pop("rule", [])
        if not isinstance(entries, list):
            raise PlanError(
                f"{where}: 'rule' is one table; write [[rule]], with two brackets, before each rule"
            )
        run = table.pop("run", {})
        faults = [f"unknown key {key!r}; a plan holds [run] and [[rule]] tables only" for key in table]
        if not isinstance(run, dict) or not all(isinstance(value, Option) for value in run.values()):
            faults.append("[run] is a table of booleans, numbers and strings")
        for i, entry in enumerate(entries):
            faults += [f"rule {i}: {fault}" for fault in _entry_faults(entry)]
        raise_all(PlanError, where, faults)
        return Plan(tuple(Rule(**entry) for entry in entries), run)

    def digest(self) -> str:
        """SHA-256 of the canonical TOML, in hexadecimal."""
        return sha256(self.to_toml().encode()).hexdigest()


def parse_rule(text: str) -> Rule:
    """`PATTERN=[ALGORITHM:]FORMAT[,OPTION=VALUE]...` -> Rule.

    A value is written as in TOML (`true`, `3`, `0.5`, `"text"`); anything else is a string.
    """
    match, equals, rest = text.partition("=")
    target, *options = rest.split(",")
    algorithm, colon, format_ = target.rpartition(":")
    faults = []
    if not (match and equals and format_) or (colon and not algorithm):
        faults.append("a rule is PATTERN=[ALGORITHM:]FORMAT[,OPTION=VALUE]..., such as '*.down_proj=q6_k'")
    values: dict[str, Option] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not (name and equals and value):
            faults.append(f"option {option!r} is not OPTION=VALUE")
        elif name in values:
            faults.append(f"option {name!r} is given twice")
        else:
            values[name] = _value(value)
    raise_all(PlanError, f"rule {text!r}", faults)
    return Rule(match, format_, algorithm or None, values)


def _value(text: str) -> Option:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, Option) else text


def _faults(rule: Rule) -> list[str]:
    faults = [f"{name} is empty" for name in ("match", "format", "algorithm") if getattr(rule, name) == ""]
    if rule.format:
        try:
            kind_of(rule.format)
        except FewbitsError as error:
            faults.append(str(error))
    for name, value in rule.options.items():
        if not isinstance(value, Option):
            faults.append(
                f"option {name!r} is a {type(value).__name__}; options are booleans, numbers and strings"
            )
    return faults


def _entry_faults(entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return [f"is a {type(entry).__name__}, not a table"]
    kinds = {"match": str, "format": str, "algorithm": str, "options": dict}
    faults = [f"unknown key {key!r}; known: {', '.join(kinds)}" for key in entry if key not in kinds]
    faults += [f"{key!r} is missing" for key in ("match", "format") if key not in entry]
    for key, kind in kinds.items():
        if key in entry and not isinstance(entry[key], kind):
            faults.append(f"{key!r} is a {type(entry[key]).__name__}, not a {kind.__name__}")
    return faults


def _rule_toml(rule: Rule) -> str:
    lines = ["[[rule]]", f"match = {_toml(rule.match)}", f"format = {_toml(rule.format)}"]
    if rule.algorithm is not None:
        lines.append(f"algorithm = {_toml(rule.algorithm)}")
    if rule.options:
        pairs = ", ".join(f"{_toml(name)} = {_toml(rule.options[name])}" for name in sorted(rule.options))
        lines.append(f"options = {{{pairs}}}")
    return "\n".join(lines) + "\n"


def _toml(value: Option) -> str:
    """One TOML value. JSON's escapes are TOML's, except for DEL, which TOML escapes too."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)
