"""References: what exists wins, what cannot be had is one clear error."""

from pathlib import Path

import pytest

from fewbits.adapters.hub import resolve
from fewbits.errors import FileError


def test_an_existing_path_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name", tmp_path / "cache") == Path("org/name")


@pytest.mark.parametrize("reference", ["nowhere", "no/such/path", "missing/model.gguf", "org/name@"])
def test_what_is_no_reference_is_said(reference: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file or directory"):
        resolve(reference, tmp_path)


def test_a_hub_name_offline_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileError, match=r"hub cannot be reached.*local directory"):
        resolve("org/name@v1", tmp_path)
