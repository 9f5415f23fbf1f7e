"""What every test has: a cache folder of its own, so that none reads what another, or the user, has kept."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path_factory.mktemp("cache")))
