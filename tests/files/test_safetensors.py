"""Our safetensors reader and layout against the safetensors package and each other."""

import gc
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fewbits.errors import FileError
from fewbits.storage.mapped import MAP_FROM, map_bytes
from fewbits.storage.safetensors import DTYPES, lay_out, map_tensor, read_header


def sample(dtype, *shape):
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 128, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_reads_what_the_package_writes(tmp_path):
    tensors = {name: sample(dtype.torch, 3, 5) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": sample(torch.float32), "none": torch.empty(0, 7)}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    entries = read_header(path)
    assert set(entries) == set(tensors)
    for name, entry in entries.items():
        assert same(map_tensor(path, entry), tensors[name]), name


def test_the_package_reads_what_we_lay_out(tmp_path):
    tensors = {f"x.{name}": sample(dtype.torch, 2, 3) for name, dtype in DTYPES.items() if name != "F8_E8M0"}
    rows = [(name, name[2:].lower(), tuple(tensor.shape)) for name, tensor in tensors.items()]
    header, entries = lay_out(rows, {"by": "fewbits"})
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + b"".join(bytes_of(tensors[entry.name]) for entry in entries))
    assert list(read_header(path).values()) == entries
    loaded = safetensors.torch.load_file(path)
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


def test_unaligned_tensors_load(tmp_path):
    header, entries = lay_out([("odd", "u8", (3,)), ("wide", "f32", (2,))])
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + b"abc" + torch.tensor([1.5, -2.0]).numpy().tobytes())
    assert map_tensor(path, entries[1]).tolist() == [1.5, -2.0]


def test_layout_faults_are_told_at_once():
    with pytest.raises(FileError, match=r"'F99'[\s\S]*'a'"):
        lay_out([("a", "u8", (1,)), ("b", "F99", (1,)), ("a", "u8", (1,))])


@pytest.mark.parametrize("nbytes", [1, MAP_FROM - 1, MAP_FROM, 3 * MAP_FROM + 5])
@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 70_001])
def test_a_map_is_its_range(tmp_path, offset, nbytes):
    path = tmp_path / "data"
    path.write_bytes(bytes(torch.arange(300_000).to(torch.uint8).tolist()))
    expected = path.read_bytes()[offset : offset + nbytes]
    assert map_bytes(path, offset, nbytes).numpy().tobytes() == expected


def maps_of(path: Path) -> int:
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_map_lives_as_long_as_its_tensors_and_is_private(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(10 * MAP_FROM))
    whole = map_bytes(path, 5, 4 * MAP_FROM)
    assert maps_of(path) == 1
    part = whole[10:20]
    whole[12] = 7
    del whole
    gc.collect()
    assert part.tolist() == [0, 0, 7] + [0] * 7
    assert path.read_bytes() == bytes(10 * MAP_FROM)
    del part
    gc.collect()
    assert maps_of(path) == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_resident_memory_follows_what_is_held(tmp_path):
    """16 tensors of 8 MiB, one held at a time: never more than a few of them resident."""
    size = 8 * 2**20
    header, entries = lay_out([(f"t{i}", "u8", (size,)) for i in range(16)])
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 16 * size)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    for entry in entries:
        assert not map_tensor(path, entry).any()
        assert resident() - before < 3 * size
