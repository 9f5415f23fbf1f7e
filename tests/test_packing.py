"""pack and unpack: the same bytes, near the entropy; nothing of a damaged file."""

import copy
import json
import re
import zlib
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.cli.main import main
from fewbits.errors import FileError
from fewbits.files.gguf.file import map_gguf_tensor, read_gguf
from fewbits.files.open import open_checkpoint
from fewbits.files.packed import pack_model, unpack_model
from fewbits.formats import FORMATS
from fewbits.formats.ggml import TYPES
from fewbits.packing import container, reader, streams
from fewbits.packing.coders import CODERS
from fewbits.storage.packed import SUFFIX, is_packed
from tests.tiny import save_tiny

PACKED = "m.packed.safetensors"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    normal = torch.randn(200, 300, generator=generator()) * torch.linspace(0.5, 9, 200)[:, None]
    codes = normal.round().clamp(-128, 127).to(torch.int8)
    flat = (torch.randn(200, 300, generator=generator()) * 3 + 128).round()
    flat[7, 7], flat[9, 9] = 250, 2  # of a class of 60,000: escaped
    found["spread"] = folder / "spread.safetensors"
    unsigned = codes.view(torch.uint8) ^ 128
    save_file({"signed": codes, "unsigned": unsigned, "flat": flat.to(torch.uint8)}, found["spread"])
    found["odd"] = folder / "odd.safetensors"
    save_file({"none": torch.empty(0, 3), "one": torch.ones(1), "f64": torch.ones(900, dtype=torch.float64),
               "bool": torch.ones(5000, dtype=torch.bool)}, found["odd"])  # fmt: skip
    return found


NAMES = ("bf16", "q4_k_m", "q3_k_m", "q8_0", "iq3_s", "gptq", "odd", "spread")


@pytest.mark.parametrize("coder", [*CODERS])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_comes_back_bit_for_bit(
    files: dict[str, Path], tmp_path: Path, name: str, coder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "PIECE", 5000)
    monkeypatch.setattr(reader, "PIECE", 5000)
    monkeypatch.setattr(container, "AT_ONCE", 30_000)
    packed = pack_model(files[name], tmp_path / PACKED, coder=coder)
    back = unpack_model(packed, tmp_path / "back")
    assert back.read_bytes() == files[name].read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {PACKED, "back"}
    with safe_open(packed, "pt") as file:  # their own reader: the container is what it says
        about = json.loads(zlib.decompress(file.get_tensor("contents").numpy().tobytes()))
        assert about["name"] == files[name].name and about["coder"] == coder
        assert set(file.keys()) == {"contents", "tables", "outside", "data"}
    if name == "spread":
        assert any(row["streams"][-1].get("rare") for row in about["tensors"]) or coder == "huffman"
    share = {"bf16": 0.75, "spread": 0.6}.get(name, 1.1)
    assert packed.stat().st_size < share * files[name].stat().st_size
    assert ("spread:300" in str(about), "signed:300" in str(about)) == ((name == "spread"),) * 2


@pytest.mark.parametrize("name", ["q4_k_m", "gptq", "model"])
def test_a_packed_model_is_opened_like_the_model(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Without a file that holds it unpacked; its bytes were compared with safetensors' reader above."""
    folder = files["bf16"].parent
    source = files[name] if name == "q4_k_m" else folder / name
    model = open_checkpoint(source)
    packed = pack_model(source, tmp_path / ("dir" if source.is_dir() else PACKED))
    there = open_checkpoint(packed)
    assert there.file_type is model.file_type and there.config == model.config
    assert {*there.side_files} == {*model.side_files} and [*there.tensors] == [*model.tensors]
    for key, tensor in model.tensors.items():
        a, b = tensor.load(), there.tensors[key].load()
        parts = zip(a.planes.values(), b.planes.values(), strict=True) if tensor.quantized else [(a, b)]
        assert all(torch.equal(*pair) for pair in parts), key
    assert {path.suffix for path in tmp_path.rglob("*")} & {".gguf", ".bin"} == set()
    assert all(is_packed(path) for path in tmp_path.rglob("*.safetensors"))


def test_a_split_gguf_is_opened_packed(tmp_path: Path) -> None:
    """Two parts as llama-gguf-split names and marks them."""
    floats = torch.randn(64, 256, generator=generator())
    for number in range(2):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{number + 1}-of-00002.gguf", "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 2)
        writer.add_tensor(f"t{number}", floats.numpy())
        for write in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
        ):
            write()
        writer.close()
    packed = [pack_model(path) for path in sorted(tmp_path.glob("*.gguf"))]
    for path in tmp_path.glob("*.gguf"):
        path.unlink()
    model = read_gguf(packed[0])
    for tensor in model.tensors.values():
        assert torch.equal(map_gguf_tensor(tensor), floats) and is_packed(tensor.file)


def test_a_directory_comes_back(files: dict[str, Path], tmp_path: Path) -> None:
    """Shards and their index; small files are copied, the rest is opened."""
    model = save_tiny("LlamaForCausalLM", tmp_path / "model")
    whole = load_file(model / "model.safetensors")
    names = sorted(whole)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, inside in shards.items():
        save_file({name: whole[name].bfloat16() for name in inside}, model / shard, {"format": "pt"})
    (model / "model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    packed = pack_model(model)
    assert packed == tmp_path / "model-packed"
    assert {path.suffixes[-2:] == [".packed", ".safetensors"] for path in packed.glob("*-of-*")} == {True}
    assert torch.equal(open_checkpoint(packed).tensors[names[0]].load(), whole[names[0]].bfloat16())
    back = unpack_model(packed)
    assert back == tmp_path / "model-unpacked"
    for path in model.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(FileError, match="has no weight file in it"):
        unpack_model(model, tmp_path / "other")
    with pytest.raises(FileError, match="exists; choose another output"):
        pack_model(model)
    with pytest.raises(FileError, match="is in the input itself"):
        pack_model(model, model / "packed")


def test_a_damaged_tensor_is_named_and_others_are_read(files: dict[str, Path], tmp_path: Path) -> None:
    packed = pack_model(files["bf16"].parent / "model", tmp_path / "dir") / f"model.safetensors{SUFFIX}"
    with safe_open(packed, "pt") as file:
        about = json.loads(zlib.decompress(file.get_tensor("contents").numpy().tobytes()))
    raw = bytearray(packed.read_bytes())
    last = max(about["tensors"], key=lambda row: row["offset"] if row["nbytes"] else 0)
    raw[-40] ^= 1  # the data array is the file's end
    packed.write_bytes(raw)
    model = open_checkpoint(tmp_path / "dir")
    with pytest.raises(FileError, match=f"tensor '{re.escape(last['name'])}' is damaged"):
        model.tensors[last["name"]].load()
    others = [row["name"] for row in about["tensors"] if row is not last]
    assert all(model.tensors[name].load() is not None for name in others)


@pytest.mark.parametrize("damage", ["cut", "bit", "zlib", "contents", "name", "plain"])
def test_nothing_is_left_of_a_file_that_is_damaged(
    files: dict[str, Path], tmp_path: Path, damage: str
) -> None:
    packed = pack_model(files["q4_k_m"], tmp_path / PACKED)
    raw = bytearray(packed.read_bytes())
    if damage in ("contents", "name"):
        with safe_open(packed, "pt") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
            metadata = file.metadata()
        about = zlib.decompress(arrays["contents"].numpy().tobytes())
        new = {"contents": (b'"ggml:q4_k"', b'"ggml:q9_z"'), "name": (b"q4_k_m.gguf", b"../4_k.gguf")}[damage]
        changed = zlib.compress(about.replace(*new))
        arrays["contents"] = torch.frombuffer(bytearray(changed), dtype=torch.uint8)
        save_file(arrays, packed, metadata)
        raw = bytearray(packed.read_bytes())
    elif damage == "cut":
        raw = raw[:-100]
    elif damage == "bit":
        raw[-30_000] ^= 1
    elif damage == "zlib":
        raw[raw.index(b"x\xda") + 20] ^= 1
    packed.write_bytes(files["bf16"].read_bytes() if damage == "plain" else raw)
    with pytest.raises(FileError, match=r"m\.packed\.safetensors: "):
        unpack_model(packed, None if damage == "name" else tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [PACKED]
    assert not (tmp_path.parent / "4_k.gguf").exists()


def places_in(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each entry of plain data."""
    inside = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else [])
    for key, each in inside:
        yield (*before, key)
        yield from places_in(each, (*before, key))


def test_whatever_its_contents_say_a_file_is_read_or_refused(files: dict[str, Path], tmp_path: Path) -> None:
    """Each entry of the contents replaced or left out."""
    packed = pack_model(files["spread"], tmp_path / PACKED)
    with safe_open(packed, "pt") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
    about = json.loads(zlib.decompress(arrays["contents"].numpy().tobytes()))
    refused = 0
    for place in places_in(about):
        for wrong in ("left out", -1, 10**12, None, "spread:7"):
            changed = copy.deepcopy(about)
            inner = reduce(lambda at, key: at[key], place[:-1], changed)
            if wrong == "left out":
                del inner[place[-1]]
            else:
                inner[place[-1]] = wrong
            raw = bytearray(zlib.compress(json.dumps(changed).encode()))
            save_file(
                arrays | {"contents": torch.frombuffer(raw, dtype=torch.uint8)}, packed, {"fewbits_pack": "2"}
            )
            try:
                whole = reader.Packed(packed)
                assert whole.part(0, whole.nbytes).numpy().tobytes() == files["spread"].read_bytes()
            except FileError:
                refused += 1
    assert refused > 150


def test_a_run_that_can_be_resumed_is_not_touched(files: dict[str, Path], tmp_path: Path) -> None:
    packed = pack_model(files["q8_0"], tmp_path / PACKED)
    (tmp_path / "q8_0.gguf.partial").write_text("of a run of quantize")
    unpack_model(packed)
    assert (tmp_path / "q8_0.gguf.partial").read_text() == "of a run of quantize"


def test_what_is_in_the_way_or_no_model_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    packed = pack_model(files["q8_0"], tmp_path / PACKED)
    for work in (lambda: pack_model(files["q8_0"], packed), lambda: unpack_model(packed, files["q8_0"])):
        with pytest.raises(FileError, match="exists; choose another output or pass --overwrite"):
            work()
    with pytest.raises(FileError, match="is packed already"):
        pack_model(packed, tmp_path / "twice.packed.safetensors")
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(FileError, match=r"only \.gguf and \.safetensors files"):
        pack_model(tmp_path / "notes.txt")


def test_commands(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.packed.safetensors"
    assert main(["pack", str(files["bf16"]), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["nbytes"] == out.stat().st_size and said["unpacked"] == files["bf16"].stat().st_size
    assert main(["unpack", str(out)]) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == files["bf16"].read_bytes()
    assert main(["unpack", str(out)]) == 1 and "exists" in capsys.readouterr().err


def test_an_overwritten_directory_holds_one_model_and_a_failed_one_nothing(tmp_path: Path) -> None:
    first, second = (
        save_tiny("LlamaForCausalLM", tmp_path / name, layers) for name, layers in (("a", 1), ("b", 2))
    )
    out = tmp_path / "out"
    pack_model(first, out)
    unpack_model(out, out_of := tmp_path / "plain")
    pack_model(second, out_of, overwrite=True)  # over weights that are not packed
    assert [path.name for path in out_of.glob("*.safetensors")] == ["model.safetensors" + SUFFIX]
    assert len(open_checkpoint(out_of).tensors) == len(open_checkpoint(second).tensors)
    both = out_of / "model.safetensors"
    both.write_bytes((first / "model.safetensors").read_bytes())
    for work in (pack_model, unpack_model):
        with pytest.raises(FileError, match="hold the same file; move one away"):
            work(out_of, tmp_path / "other")
    both.unlink()
    damaged = out_of / ("model.safetensors" + SUFFIX)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(FileError):
        unpack_model(out_of, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out", "plain"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="file: is a file; a directory is packed into a directory"):
        pack_model(first, tmp_path / "file", overwrite=True)
    with pytest.raises(FileError, match="nothing: no such file or directory"):
        pack_model(tmp_path / "nothing")
