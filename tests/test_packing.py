"""pack and unpack: the same bytes, near the entropy; nothing of a damaged file."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fewbits
from fewbits import core
from fewbits.cli.main import main
from fewbits.errors import FileError
from fewbits.formats import FORMATS
from fewbits.formats.ggml import TYPES
from fewbits.packing import container, pack_file, rans, streams, unpack_file
from tests.tiny import save_tiny

needs_core = pytest.mark.skipif(not core.available(), reason="the C++ core is not built")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symbols_of(kind: str, count: int) -> torch.Tensor:
    normal = torch.randn(count, generator=generator())
    return {
        "normal": (normal * 3 + 8).round().clamp(0, 15),
        "wide": (normal * 40 + 128).round().clamp(0, 255),
        "one": torch.full((count,), 7.0),
        "rare": torch.where(torch.rand(count, generator=generator(1)) < 1e-4, 200.0, 3.0),
        "uniform": torch.randint(0, 256, (count,), generator=generator()).float(),
    }[kind].to(torch.uint8)


KINDS, COUNTS = ("normal", "wide", "one", "rare", "uniform"), (0, 1, 7, 8, 9, 63, 4099)


def test_every_byte_that_occurs_has_a_frequency() -> None:
    """As in a pruned weight: one byte is most of it, and all others are rare."""
    counts = torch.ones(256, dtype=torch.int64)
    counts[0] = 10**6
    table = rans.frequencies(counts)
    assert int(table.min()) == 1 and int(table.sum()) == 4096


def compare_streams() -> None:
    """The core writes and reads the streams of the reference."""
    for kind, count in product(KINDS, COUNTS):
        symbols = symbols_of(kind, count)
        table = rans.frequencies(torch.bincount(symbols.int(), minlength=256))
        assert int(table.sum()) == 4096
        stream = rans.encode_reference(symbols, table)
        assert torch.equal(core.rans_encode(symbols, table), stream)
        for found in (rans.decode(stream, table, count), rans.decode_reference(stream, table, count)):
            assert found is not None and torch.equal(found, symbols), (kind, count)


@needs_core
def test_the_core_writes_and_reads_the_streams_of_the_reference() -> None:
    """With the best instruction set of this machine; tests/test_core.py runs the same with every one."""
    compare_streams()


@pytest.mark.parametrize("kind", ["normal", "wide", "rare", "one"])
def test_a_stream_is_half_a_percent_above_the_entropy_at_most(kind: str) -> None:
    """The entropy by numpy, from the counts."""
    symbols = symbols_of(kind, 2**16)
    p = np.bincount(symbols.numpy(), minlength=256) / len(symbols)
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum() * len(symbols) / 8
    table = rans.frequencies(torch.bincount(symbols.int(), minlength=256))
    nbytes = rans.encode(symbols, table).numel()
    assert entropy - 1 <= nbytes <= 1.005 * entropy + 34 + (8 if kind == "rare" else 0)


@pytest.mark.parametrize("decode", [rans.decode, rans.decode_reference])
def test_damaged_streams_are_told_and_nothing_beyond_them_is_read(decode) -> None:
    symbols = symbols_of("normal", 3000)
    table = rans.frequencies(torch.bincount(symbols.int(), minlength=256))
    stream = rans.encode(symbols, table)
    for size in (0, 1, 31, 32, 33, len(stream) // 2, len(stream) - 2, len(stream) - 1):
        assert decode(stream[:size].clone(), table, 3000) is None
    assert decode(torch.cat([stream, stream[:2]]), table, 3000) is None
    assert decode(stream, table, 2999) is None and decode(stream, table, 3001) is None
    wrong = table.clone()
    wrong[8] += 1
    assert decode(stream, wrong, 3000) is None
    changed = stream.clone()
    changed[100] ^= 64
    other = decode(changed, table, 3000)
    assert other is None or not torch.equal(other, symbols)


@pytest.mark.parametrize("name", [format.name for format in TYPES])
def test_blocks_of_any_bytes_come_back(name: str) -> None:
    """Not only those that an encoder writes."""
    layout = streams.layout_of(name.removesuffix("_ggml"))
    size = FORMATS.get(name).planes[0].entries
    assert streams.block_of(layout) in (1, size)
    raw = torch.randint(0, 256, (37 * size,), generator=generator()).to(torch.uint8)
    if name == "tq1_0":  # base 3: not every byte is one that five digits make
        raw = (
            FORMATS.get(name).encode(torch.randn(37, 256, generator=generator())).planes["blocks"].reshape(-1)
        )
    parts = streams.split(layout, raw)
    assert [len(part) for part in parts] == streams.sizes(layout, len(raw))
    assert torch.equal(streams.joined(layout, parts), raw)


@pytest.mark.parametrize("layout", ["bytes", "words2", "words4"])
def test_words_of_any_bits_come_back(layout: str) -> None:
    raw = torch.randint(0, 256, (4096,), generator=generator()).to(torch.uint8)
    parts = streams.split(layout, raw)
    assert [len(part) for part in parts] == streams.sizes(layout, len(raw))
    assert torch.equal(streams.joined(layout, parts), raw)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    model = save_tiny("LlamaForCausalLM", folder / "model")
    found = {"bf16": folder / "model.safetensors"}
    floats = {name: w.bfloat16() for name, w in load_file(model / "model.safetensors").items()}
    save_file(floats, found["bf16"], {"format": "pt"})
    for to in ("q4_k_m", "q3_k_m", "q8_0", "iq3_s"):
        found[to] = folder / f"{to}.gguf"
        fewbits.quantize(model, found[to], to=to, effort="fast", verify=False)
    found["gptq"] = folder / "gptq" / "model.safetensors"
    fewbits.quantize(model, folder / "gptq", to="int4_g32", file="gptq", effort="fast", verify=False)
    found["odd"] = folder / "odd.safetensors"
    save_file({"none": torch.empty(0, 3), "one": torch.ones(1), "f64": torch.ones(900, dtype=torch.float64),
               "bool": torch.ones(5000, dtype=torch.bool)}, found["odd"])  # fmt: skip
    return found


NAMES = ("bf16", "q4_k_m", "q3_k_m", "q8_0", "iq3_s", "gptq", "odd")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_comes_back_bit_for_bit(
    files: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "PIECE", 5000)
    monkeypatch.setattr(container, "AT_ONCE", 30_000)
    packed = pack_file(files[name], tmp_path / "packed.safetensors")
    back = unpack_file(packed, tmp_path / "back")
    assert back.read_bytes() == files[name].read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"packed.safetensors", "back"}
    with safe_open(packed, "pt") as file:  # their own reader: the container is what it says
        about = json.loads(file.metadata()["fewbits_pack"])
        assert set(file.keys()) == {"data", "outside"} and about["name"] == files[name].name
    if name == "bf16":
        assert packed.stat().st_size < 0.75 * files[name].stat().st_size


@pytest.mark.parametrize("damage", ["cut", "bit", "table", "contents", "name", "plain"])
def test_nothing_is_left_of_a_file_that_is_damaged(
    files: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    packed = pack_file(files["q4_k_m"], tmp_path / "packed.safetensors")
    raw = bytearray(packed.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    if damage == "cut":
        raw = raw[:-100]
    elif damage == "bit":
        raw[start + 30_000] ^= 1
    elif damage == "table":
        raw[start : start + 4] = b"\xff" * 4
    elif damage == "contents":
        raw = raw.replace(b'\\"layout\\":\\"ggml:q4_k\\"', b'\\"layout\\":\\"ggml:q9_z\\"', 1)
    elif damage == "name":
        raw = raw.replace(b"q4_k_m.gguf", b"../4_k.gguf", 1)
    packed.write_bytes(files["bf16"].read_bytes() if damage == "plain" else raw)
    with pytest.raises(FileError, match=r"packed.safetensors: "):
        unpack_file(packed, None if damage == "name" else tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["packed.safetensors"]
    assert not (tmp_path.parent / "4_k.gguf").exists()


def test_a_run_that_can_be_resumed_is_not_touched(files: dict[str, Path], tmp_path: Path) -> None:
    packed = pack_file(files["q8_0"], tmp_path / "packed.safetensors")
    (tmp_path / "q8_0.gguf.partial").write_text("of a run of quantize")
    unpack_file(packed)
    assert (tmp_path / "q8_0.gguf.partial").read_text() == "of a run of quantize"


def test_what_is_in_the_way_or_no_model_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    packed = pack_file(files["q8_0"], tmp_path / "packed.safetensors")
    for work in (lambda: pack_file(files["q8_0"], packed), lambda: unpack_file(packed, files["q8_0"])):
        with pytest.raises(FileError, match="exists; choose another output or pass --overwrite"):
            work()
    with pytest.raises(FileError, match="is packed already"):
        pack_file(packed, tmp_path / "twice.safetensors")
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(FileError, match=r"only \.gguf and \.safetensors files"):
        pack_file(tmp_path / "notes.txt")


def test_commands(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.packed.safetensors"
    assert main(["pack", str(files["bf16"]), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["nbytes"] == out.stat().st_size and said["unpacked"] == files["bf16"].stat().st_size
    assert main(["unpack", str(out)]) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == files["bf16"].read_bytes()
    assert main(["unpack", str(out)]) == 1 and "exists" in capsys.readouterr().err
