"""The native directory: laid out, streamed, opened: the same planes, bit for bit."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fewbits.dtypes import F32
from fewbits.files.directory import laid_out
from fewbits.files.native import NATIVE, open_native
from fewbits.files.open import file_type_at
from fewbits.files.output import copy_side_files
from fewbits.formats.base import FORMATS, Format
from fewbits.qtensor import Plane, QTensor
from tests.files.directories import write_directory


@dataclass(frozen=True)
class TwoPlanes(Format):
    """A format with planes of two dtypes: the file has to keep both apart."""

    def fit(self, w, importance=None, search=True):
        raise NotImplementedError

    def pack(self, grid, codes):
        raise NotImplementedError

    def unpack(self, q):
        raise NotImplementedError


PLANES = (Plane("codes", "uint8", columns=2), Plane("scales", "float16", columns=32))


@pytest.fixture
def two_planes(monkeypatch):
    form = TwoPlanes("test_two_planes", 32, PLANES)
    monkeypatch.setitem(FORMATS._things, form.name, form)
    return form


def random_qtensor(form, n, k):
    planes = {}
    for plane in form.planes:
        raw = torch.randint(0, 120, (plane.nbytes(n, k),), dtype=torch.uint8)
        planes[plane.name] = raw.view(plane.dtype).reshape(plane.shape(n, k))
    return QTensor(form, (n, k), planes)


def stream_native(path, tensors):
    """What a pipeline does: layout, stream, side files, index last."""
    write_directory(path, "native", tensors, {"model_type": "llama"}, {"by": "test"})
    side = path.parent / "tokenizer.json"
    side.write_text("{}")
    copy_side_files({"tokenizer.json": side}, path)


def test_round_trip(tmp_path, two_planes):
    tensors = {
        "a.weight": random_qtensor(two_planes, 3, 64),
        "norm.weight": torch.randn(5).bfloat16(),
        "b.weight": random_qtensor(FORMATS.get("q8_0"), 2, 32),
        "c.weight": torch.randn(2, 3).bfloat16(),
    }
    path = tmp_path / "m"
    stream_native(path, tensors)
    assert file_type_at(path).name == "native"
    opened = open_native(path)
    assert opened.config == {"model_type": "llama"}
    assert list(opened.side_files) == ["tokenizer.json"]
    assert opened.metadata == {"version": 1, "by": "test"}
    assert set(opened.tensors) == set(tensors)
    for name, value in tensors.items():
        lazy, got = opened.tensors[name], opened.tensors[name].load()
        assert lazy.nbytes == value.nbytes
        assert lazy.shape == tuple(value.shape)
        assert lazy.quantized == isinstance(value, QTensor)
        if isinstance(value, QTensor):
            assert lazy.dtype == got.format.name == value.format.name
            assert set(got.planes) == set(value.planes)
            assert all(torch.equal(got.planes[plane], body) for plane, body in value.planes.items())
        else:
            assert lazy.dtype == "bf16"
            assert torch.equal(got, value)


def test_the_weights_are_plain_safetensors(tmp_path, two_planes):
    """Another reader finds the planes under their names."""
    value = random_qtensor(two_planes, 3, 64)
    stream_native(tmp_path / "m", {"a.weight": value})
    loaded = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    assert set(loaded) == {"a.weight.codes", "a.weight.scales"}
    assert torch.equal(loaded["a.weight.scales"], value.planes["scales"])


def test_the_golden_bytes(two_planes):
    """The layout is what it was: files written before stay readable."""
    rows = {"w": (two_planes, (1, 32)), "n": (F32, (2,))}
    header, entries, _ = laid_out(NATIVE, rows)
    assert json.loads(header[8:]) == {
        "__metadata__": {"format": "pt"},
        "w.codes": {"dtype": "U8", "shape": [1, 16], "data_offsets": [0, 16]},
        "w.scales": {"dtype": "F16", "shape": [1, 1], "data_offsets": [16, 18]},
        "n": {"dtype": "F32", "shape": [2], "data_offsets": [18, 26]},
    }
    assert [(name, offset - len(header), nbytes) for name, offset, nbytes in entries] == [
        ("w.codes", 0, 16),
        ("w.scales", 16, 2),
        ("n", 18, 8),
    ]
    assert list(NATIVE.settings(rows, {}, {})) == [
        "config.json",
        "fewbits.json",
    ]  # it is complete with the last
    assert NATIVE.settings(rows, {}, {})["fewbits.json"] == {
        "version": 1,
        "tensors": {"w": {"format": "test_two_planes", "shape": [1, 32]}},
    }


def test_layout_does_not_depend_on_the_place(tmp_path, two_planes):
    values = {"a.weight": random_qtensor(two_planes, 3, 64)}
    for name in ("one", "two"):
        stream_native(tmp_path / name, values)
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [Path(file).read_bytes() for file in one] == [Path(file).read_bytes() for file in two]
