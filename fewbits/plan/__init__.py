"""The format of each tensor: rules of the user, and llama.cpp's mixtures.

    rules.py      Rule and Plan: ordered patterns, read from TOML or the command line
    mixtures.py   llama.cpp's file types as tables
    recipes.py    how those tables are applied to the tensors of a model
    choices.py    both combined: one checked decision for each tensor

Only the first is imported here: the others are for the pipeline.
"""

from .rules import Plan, Rule, parse_rule

__all__ = ["Plan", "Rule", "parse_rule"]
