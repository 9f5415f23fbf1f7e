"""Packages are imported at their first use and then cost nothing more."""

import sys

import pytest

from fewbits.lazy import lazy_module


def test_an_attribute_is_looked_up_once(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    lazy = lazy_module("colorsys")
    assert "colorsys" not in sys.modules
    hsv = lazy.rgb_to_hsv
    assert hsv is sys.modules["colorsys"].rgb_to_hsv and vars(lazy)["rgb_to_hsv"] is hsv


def test_what_the_package_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'colorsys' has no attribute 'nothing'"):
        _ = lazy_module("colorsys").nothing
