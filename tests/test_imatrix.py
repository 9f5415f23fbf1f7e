"""llama.cpp's importance matrices: golden ones are read and written again, bad ones refused."""

import struct

import pytest
import torch
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.calibrate.imatrix import gguf_importance, open_statistics, read_imatrix, write_imatrix
from fewbits.calibrate.store import save_statistics
from fewbits.errors import CalibrationError, FewbitsError, FileError
from tests.attacks.forge import ARRAY, F32, STRING, UINT32, gguf, key, string, tensor, u32, u64
from tests.statistics_cases import GOLDEN, GOLDEN_CHUNK, NAMES, model, seen_of


def test_an_imatrix_of_llama_cpp_is_read():
    """Against the `gguf` package's reader; expert 1 saw nothing, so the .dat file has ones there."""
    theirs = {t.name: torch.from_numpy(t.data.copy()) for t in GGUFReader(GOLDEN / "imatrix.gguf").tensors}
    found = read_imatrix(GOLDEN / "imatrix.gguf", model())
    assert (found.tokens, found.source, found.knows) == (GOLDEN_CHUNK, "text.txt", {"mean_square"})
    block = "model.layers.0.block_sparse_moe.experts"
    assert found.unseen == tuple(f"{block}.1.{w}.weight" for w in ("w1", "w2", "w3"))
    for name, hf in (("ffn_gate_exps", "w1"), ("ffn_down_exps", "w2"), ("ffn_up_exps", "w3")):
        sums, counts = theirs[f"blk.0.{name}.weight.in_sum2"], theirs[f"blk.0.{name}.weight.counts"].flatten()
        for e in (0, 2, 3, 4, 5, 6, 7):
            stats = found.of(f"{block}.{e}.{hf}.weight")
            assert stats.count == counts[e] and torch.equal(stats.mean_square, sums[e] / counts[e])
    key, query = (found.of(f"model.layers.0.self_attn.{part}_proj.weight") for part in "kq")
    assert key is query and torch.equal(key.mean_square, theirs["blk.0.attn_k.weight.in_sum2"] / GOLDEN_CHUNK)

    old = read_imatrix(GOLDEN / "imatrix.dat", model(), GOLDEN_CHUNK)
    assert (old.sites, old.unseen, old.tokens, old.source) == (
        found.sites,
        found.unseen,
        found.tokens,
        "text.txt",
    )
    for site in found.sites:
        assert torch.equal(old.of(site).mean_square, found.of(site).mean_square)
    assert "upper bound" in " ".join(old.notes)


def test_an_imatrix_of_llama_cpp_is_written_again_as_it_was(tmp_path):
    """The .dat file byte for byte; of the other the header, and sums to a rounding of mean and product."""
    for suffix in ("gguf", "dat"):
        golden, path = GOLDEN / f"imatrix.{suffix}", tmp_path / f"ours.{suffix}"
        write_imatrix(read_imatrix(golden, model(), GOLDEN_CHUNK), model(), path, GOLDEN_CHUNK)
        if suffix == "dat":
            assert path.read_bytes() == golden.read_bytes()
            continue
        start = GGUFReader(golden).data_offset
        assert path.read_bytes()[:start] == golden.read_bytes()[:start]
        for ours, theirs in zip(GGUFReader(path).tensors, GGUFReader(golden).tensors, strict=True):
            a, b = torch.from_numpy(ours.data.copy()), torch.from_numpy(theirs.data.copy())
            torch.testing.assert_close(a, b, rtol=2 * 2.0**-24, atol=0)


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read(tmp_path, name, suffix):
    """A .dat file has no counts of single experts. 4 roundings: times and by the count, or the chunks."""
    path, tokens = tmp_path / f"imatrix.{suffix}", 2 * GOLDEN_CHUNK
    saved = seen_of(model(name), tokens=tokens, unseen=("experts.3.",))
    write_imatrix(saved, model(name), path, GOLDEN_CHUNK)
    found = (
        open_statistics(path, model(name))
        if suffix == "gguf"
        else read_imatrix(path, model(name), GOLDEN_CHUNK)
    )
    assert (found.sites, found.unseen, found.tokens) == (saved.sites, saved.unseen, tokens)
    for site in saved.sites:
        ours, theirs = saved.of(site), found.of(site)
        torch.testing.assert_close(theirs.mean_square, ours.mean_square, rtol=4 * 2.0**-24, atol=0)
        assert theirs.absmax is None and theirs.hessian is None
        assert theirs.count == ours.count or (suffix == "dat" and ".experts." in site)


def test_unseen_experts_weigh_their_columns_alike_in_llama_cpp():
    rows = gguf_importance(seen_of(model(), unseen=("experts.3.",)), model())
    experts = rows["blk.0.ffn_up_exps.weight"].view(8, 16)
    assert bool((experts[3] == 1).all()) and not bool((experts == 1).all(1)[[0, 1, 2, 4, 5, 6, 7]].any())


def test_a_kind_of_file_is_told_by_its_content(tmp_path):
    found = seen_of(model(), unseen=("experts.1.",))
    save_statistics(found, tmp_path / "a")
    write_imatrix(found, model(), tmp_path / "b")
    write_imatrix(found, model(), tmp_path / "c.dat")
    (tmp_path / "c.dat").rename(tmp_path / "c")
    for name in "abc":
        assert open_statistics(tmp_path / name, model()).sites == found.sites
    with pytest.raises(FileError, match="cannot be read"):
        open_statistics(tmp_path / "d", model())


KEYS = [
    key("general.type", STRING, string("imatrix")),
    key("imatrix.datasets", ARRAY, u32(STRING) + u64(1) + string("text")),
    key("imatrix.chunk_count", UINT32, u32(2)),
    key("imatrix.chunk_size", UINT32, u32(32)),
]


def forged(rows: dict[str, tuple[list[int], list[float]]], keys: list[bytes] = KEYS) -> bytes:
    """name -> (ne, values), each padded to the alignment."""
    tensors, data = [], b""
    for name, (ne, values) in rows.items():
        tensors.append(tensor(name, ne, F32, len(data)))
        raw = struct.pack(f"<{len(values)}f", *values)
        data += raw + bytes(-len(raw) % 32)
    return gguf(keys, tensors, data)


K, DOWN, EXPERTS = "blk.0.attn_k.weight", "blk.0.attn_output.weight", "blk.0.ffn_up_exps.weight"
ONES = ([16], [1.0] * 16)
FORGED = {
    "a model": (forged({}, [key("general.type", STRING, string("model"))]), "general.type is 'model'"),
    "no entries": (forged({}), "it has no entries"),
    "no chunks": (forged({}, KEYS[:2]), "imatrix.chunk_count is None"),
    "no counts": (forged({f"{K}.in_sum2": ONES}), f"'{K}' has no tensor '{K}.counts'"),
    "no sums": (forged({f"{K}.counts": ([1], [2.0])}), f"no tensor '{K}.in_sum2'"),
    "counts that are none": (
        forged({f"{K}.in_sum2": ONES, f"{K}.counts": ([1], [0.5])}), "counts that are not counts: [0.5]"),
    "a negative count": (
        forged({f"{K}.in_sum2": ONES, f"{K}.counts": ([1], [-1.0])}), "counts that are not counts: [-1.0]"),
    "a count of nan": (
        forged({f"{K}.in_sum2": ONES, f"{K}.counts": ([1], [float("nan")])}), "counts that are not counts"),
    "three counts": (
        forged({f"{K}.in_sum2": ONES, f"{K}.counts": ([1, 3], [1.0] * 3)}), "16 sums for 3 counts"),
    "sums unseen": (
        forged({f"{K}.in_sum2": ONES, f"{K}.counts": ([1], [0.0])}), "sums where its count is 0"),
    "nan, and a negative one elsewhere": (
        forged({f"{K}.in_sum2": ([16], [float("nan")] + [1.0] * 15), f"{K}.counts": ([1], [2.0]),
                f"{DOWN}.in_sum2": ([16], [-1.0] * 16), f"{DOWN}.counts": ([1], [2.0])}),
        f"'{K}' has 1 values that are not finite and 0 that are negative\n  "
        f"'{DOWN}' has 0 values that are not finite and 16 that are negative"),
    "another model's names and columns": (
        forged({"blk.7.attn_k.weight.in_sum2": ONES, "blk.7.attn_k.weight.counts": ([1], [2.0]),
                f"{K}.in_sum2": ([17], [1.0] * 17), f"{K}.counts": ([1], [2.0])}),
        "'blk.7.attn_k.weight' is not a weight of MixtralForCausalLM-1x16 (llama, sites"),
    "columns": (
        forged({f"{K}.in_sum2": ([17], [1.0] * 17), f"{K}.counts": ([1], [2.0])}),
        f"'{K}' has 17 values, the weight needs 16"),
    "experts": (
        forged({f"{EXPERTS}.in_sum2": ([16, 4], [1.0] * 64), f"{EXPERTS}.counts": ([1, 4], [2.0] * 4)}),
        f"'{EXPERTS}' has 64 values, the weight needs 8 x 16"),
    "counts of fewer experts": (
        forged({f"{EXPERTS}.in_sum2": ([16, 8], [1.0] * 128), f"{EXPERTS}.counts": ([1, 4], [2.0] * 4)}),
        f"'{EXPERTS}' has 4 counts, the weight has 8 experts"),
    "dat: empty": (b"", "is empty"),
    "dat: absurd entries": (struct.pack("<ii", 2**31 - 1, 0), "claims 2147483647 entries"),
    "dat: no entries": (struct.pack("<i", 0) + bytes(64), "claims 0 entries"),
    "dat: long name": (struct.pack("<ii", 1, 2**30) + bytes(64), "claims 1073741824 bytes, 1024"),
    "dat: negative name": (struct.pack("<ii", 1, -1) + bytes(64), "claims -1 bytes"),
    "dat: absurd values": (
        struct.pack("<ii1sii", 1, 1, b"a", 1, 2**30) + bytes(64), "claims 4294967296 bytes, 64 are left"),
    "dat: no chunks": (struct.pack("<ii1siif", 1, 1, b"a", 0, 1, 1.0), "has 1 values of 0 chunks"),
    "dat: twice": (
        struct.pack("<i", 2) + struct.pack("<i1siif", 1, b"a", 1, 1, 1.0) * 2, "'a' appears twice"),
    "dat: nan": (struct.pack("<ii1siif", 1, 1, b"a", 1, 1, float("nan")), "1 values that are not finite"),
    "dat: more behind": (
        struct.pack("<ii1siif", 1, 1, b"a", 1, 1, 1.0) + struct.pack("<ii", 1, 0) + b"more",
        "4 bytes follow the last field"),
}  # fmt: skip


@pytest.mark.parametrize("lie", FORGED)
def test_a_bad_imatrix_is_one_error(tmp_path, lie):
    data, says = FORGED[lie]
    path = tmp_path / "imatrix"
    path.write_bytes(data)
    with pytest.raises((FileError, CalibrationError)) as caught:
        read_imatrix(path, model())
    assert str(path) in str(caught.value) and says in str(caught.value)


def test_the_honest_twin_of_the_forgeries_is_read(tmp_path):
    path = tmp_path / "imatrix"
    path.write_bytes(forged({f"{K}.in_sum2": ONES, f"{K}.counts": ([1], [2.0])}))
    found = read_imatrix(path, model())
    assert found.of("model.layers.0.self_attn.k_proj.weight").count == 2 and found.tokens == 64
    assert "no entry for 28 weights" in found.notes[1] and len(found.unseen) == 28


def test_weights_of_one_input_with_other_values_are_kept_apart(tmp_path):
    path, query = tmp_path / "imatrix", "blk.0.attn_q.weight"
    twos = ([16], [2.0] * 16)
    rows = {f"{K}.in_sum2": ONES, f"{K}.counts": ([1], [1.0]), f"{query}.in_sum2": twos}
    path.write_bytes(forged({**rows, f"{query}.counts": ([1], [1.0])}))
    found = read_imatrix(path, model())
    for part, value in (("k", 1.0), ("q", 2.0)):
        stats = found.of(f"model.layers.0.self_attn.{part}_proj.weight")
        assert torch.equal(stats.mean_square, torch.full((16,), value))


def test_an_imatrix_cut_anywhere_is_refused_or_lacks_only_what_may_lack(tmp_path):
    """A .dat file may end after its entries, or after its chunks; a GGUF file is padded at its end."""
    for suffix in ("gguf", "dat"):
        whole, path = (GOLDEN / f"imatrix.{suffix}").read_bytes(), tmp_path / "imatrix"
        text = 4 + len("text.txt")
        ends = [len(whole) - text, len(whole) - text - 4] if suffix == "dat" else []
        last = len(whole) - (text + 4 if suffix == "dat" else 32 - 8 * 4 + 1)  # 8 counts of 4 bytes are last
        for size in {*range(0, last, 17), *range(last - 9, last)}:
            path.write_bytes(whole[:size])
            with pytest.raises(FileError):
                read_imatrix(path, model())
        for size in ends:
            path.write_bytes(whole[:size])
            assert read_imatrix(path, model(), GOLDEN_CHUNK).tokens == GOLDEN_CHUNK


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["gguf", "dat"]), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4)
)
def test_damage_is_never_another_kind_of_error(tmp_path_factory, suffix, changes):
    raw = bytearray((GOLDEN / f"imatrix.{suffix}").read_bytes())
    for where, value in changes:
        raw[int(where**2 * (len(raw) - 1))] = value
    path = tmp_path_factory.mktemp("damaged") / "imatrix"
    path.write_bytes(raw)
    try:
        found = read_imatrix(path, model())
    except FewbitsError as error:
        assert str(path) in str(error)
    else:
        assert all(bool(found.of(site).mean_square.isfinite().all()) for site in found.sites)
