"""pack and unpack: the same bytes, near the entropy; nothing of a damaged file."""

import heapq
import json
import re
import zlib
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fewbits
from fewbits import core
from fewbits.cli.main import main
from fewbits.errors import FileError
from fewbits.files.gguf.file import map_gguf_tensor, read_gguf
from fewbits.files.open import open_checkpoint
from fewbits.files.packed import pack_model, unpack_model
from fewbits.formats import FORMATS
from fewbits.formats.ggml import TYPES
from fewbits.packing import container, huffman, rans, reader, spread, streams
from fewbits.packing.coders import CODERS
from fewbits.storage.packed import SUFFIX, is_packed
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


PACKED = "m.packed.safetensors"
KINDS, COUNTS = ("normal", "wide", "one", "rare", "uniform"), (0, 1, 7, 31, 32, 33, 63, 4099)


def test_every_symbol_keeps_a_frequency() -> None:
    """One symbol takes nearly all, and two hundred others must have theirs."""
    counts = torch.ones(256, dtype=torch.int64)
    counts[200:], counts[7] = 0, 10**6
    table = rans.frequencies(counts)
    assert int(table.sum()) == 4096 and torch.equal(table > 0, counts > 0)


def compare_streams() -> None:
    """The core writes and reads the streams of the references, with one table or several."""
    for kind, count in product(KINDS, COUNTS):
        symbols = symbols_of(kind, count)
        counts = torch.bincount(symbols.int(), minlength=256)
        classes = torch.randint(0, 3, (count,), generator=generator(2)).to(torch.uint8)
        for table, of in (
            (rans.frequencies(counts), None),
            (torch.stack([rans.frequencies(counts * (i + 1) + (i > 1)) for i in range(3)]), classes),
        ):
            assert bool((table.reshape(-1, 256).sum(1) == 4096).all())
            stream = rans.encode_reference(symbols, table, of)
            assert torch.equal(core.rans_encode(symbols, table, of), stream)
            for decode in (rans.decode, rans.decode_reference):
                found = decode(stream, table, count, of)
                assert found is not None and torch.equal(found, symbols), (kind, count)
        lengths = huffman.lengths(counts)
        piece = huffman.encode(symbols, lengths)
        for decode in (huffman.decode, huffman.decode_reference):
            found = decode(piece, lengths, count)
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
    assert entropy - 1 <= nbytes <= 1.005 * entropy + rans.STREAM + (8 if kind == "rare" else 0)


@pytest.mark.parametrize("name", [*CODERS])
@pytest.mark.parametrize("plain", [False, True])
def test_damaged_streams_are_told_and_nothing_beyond_them_is_read(name: str, plain: bool) -> None:
    coder = CODERS[name]
    decode = {"rans": rans, "huffman": huffman}[name].decode_reference if plain else coder.decode
    symbols = symbols_of("normal", 3000)
    table = coder.table(torch.bincount(symbols.int(), minlength=256))
    stream = coder.encode(symbols, table, None)
    for size in (0, 1, 31, 32, 33, 127, 128, len(stream) // 2, len(stream) - 2, len(stream) - 1):
        assert decode(stream[:size].clone(), table, 3000, None) is None
    assert decode(torch.cat([stream, stream[:2]]), table, 3000, None) is None
    assert decode(stream, table, 2999, None) is None and decode(stream, table, 3001, None) is None
    wrong = table.clone()
    wrong[8] += 1 if name == "rans" else 9
    assert decode(stream, wrong, 3000, None) is None
    for seed in range(20):
        changed = stream.clone()
        changed[int(torch.randint(0, len(stream), (1,), generator=generator(seed)))] ^= 64
        other = decode(changed, table, 3000, None)
        assert other is None or not torch.equal(other, symbols)


def least_lengths(counts: list[int]) -> int:
    """Bits of the best prefix code, by Huffman's own algorithm."""
    heap, total = sorted(count for count in counts if count), 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


@pytest.mark.parametrize("kind", ["normal", "wide", "uniform"])
def test_huffman_codes_are_the_shortest_and_complete(kind: str) -> None:
    counts = torch.bincount(symbols_of(kind, 4099).int(), minlength=256)
    lengths = huffman.lengths(counts)
    assert huffman.coded_bits(counts, lengths) == least_lengths(counts.tolist())
    assert sum(2.0 ** -int(n) for n in lengths if n) == 1.0  # Kraft
    words = [f"{code:b}".zfill(int(n)) for code, n in zip(huffman.codes(lengths), lengths, strict=True) if n]
    assert not any(a != b and b.startswith(a) for a, b in product(words, words))


def test_huffman_codes_of_a_limit_are_the_best_of_it() -> None:
    """Every choice of lengths of five symbols, limit 3; then Fibonacci counts, which want 19 bits."""
    counts = torch.zeros(256, dtype=torch.int64)
    counts[:5] = torch.tensor([1, 1, 2, 4, 8])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huffman, "BITS", 3)
        found = huffman.coded_bits(counts, huffman.lengths(counts))
    allowed = [n for n in product((1, 2, 3), repeat=5) if sum(2.0**-each for each in n) <= 1]
    assert found == min(sum(a * b for a, b in zip(counts[:5].tolist(), n, strict=True)) for n in allowed)
    a, b = 1, 1
    for i in range(20):
        counts[i], a, b = a, b, a + b
    lengths = huffman.lengths(counts)
    assert int(lengths.max()) == 12 and sum(2.0 ** -int(n) for n in lengths if n) == 1.0


def test_classes_follow_the_spread_of_rows_and_columns() -> None:
    """A quarter of an octave each; codes of one spread need no more than their entropy."""
    rows = torch.tensor([1.0, 4.0]).repeat_interleave(400)
    columns = torch.tensor([4.0, 8.0]).repeat_interleave(300)
    normal = torch.randn(800, 600, generator=generator())
    codes = (normal * rows[:, None] * columns + 128).round().clamp(0, 255).to(torch.uint8)
    found = spread.classes(*spread.fitted(codes)).float()
    assert abs(float(found[500:, 400:].mean() - found[:300, :200].mean()) - 4 * 3) < 0.5
    assert abs(float(found[:300, :200].mean()) - spread.ZERO - 4 * 2) < 0.5


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
    found["spread"] = folder / "spread.safetensors"
    save_file({"signed": codes, "unsigned": codes.view(torch.uint8) ^ 128}, found["spread"])
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
    with pytest.raises(FileError, match="has no packed file in it"):
        unpack_model(model, tmp_path / "other")
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
