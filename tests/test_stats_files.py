"""Statistics of a model: merged, joined, asked for importance, and in a file."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.calibrate.statistics import (
    check_model,
    gather,
    identify,
    importance_notes,
    importance_of,
    join,
    merge,
)
from fewbits.calibrate.stats import Stats
from fewbits.calibrate.store import load_statistics, save_statistics
from fewbits.errors import CalibrationError, FileError
from fewbits.files.open import open_checkpoint
from fewbits.model.sites import sites
from fewbits.storage.safetensors import lay_out, read_header
from tests.statistics_cases import MIXTRAL, ROUNDING, SMALL, agree, model, seen_of
from tests.tiny import save_tiny, write_float_gguf


def test_sites_of_one_group_are_stored_once():
    found = seen_of(model("LlamaForCausalLM"))
    assert len(found.sites) == 7 and len(found.groups) == 4  # q k v | o | gate up | down
    q, k = (
        found.of("model.layers.0.self_attn.q_proj.weight"),
        found.of("model.layers.0.self_attn.k_proj.weight"),
    )
    assert q is k and q is not None


def test_values_that_no_activation_has_are_all_named():
    good = Stats.of(torch.randn(5, 4))
    bad = {
        "a.weight": replace(good, mean_square=good.mean_square - 100),
        "b.weight": replace(good, hessian=good.hessian * torch.nan),
        "c.weight": replace(good, absmax=good.absmax / 0),
        "d.weight": good,
    }
    with pytest.raises(CalibrationError) as caught:
        gather(identify(model()), "text", 5, bad)
    said = str(caught.value)
    assert "a.weight: mean_square is negative" in said and "c.weight: absmax has 4 of 4" in said
    assert "b.weight: hessian has 16 of 16 values that are not finite" in said and "d.weight" not in said


def test_merged_statistics_are_those_of_both_texts():
    torch.manual_seed(0)
    x, y = torch.randn(40, 8), torch.randn(24, 8)
    name = identify(model())
    one = gather(name, "one", 40, {"a.weight": Stats.of(x), "b.weight": Stats.of(x[:, :3])})
    two = gather(name, "two", 24, {"a.weight": Stats.of(y), "c.weight": Stats.of(y[:, :2])}, ["b.weight"])
    both = merge(one, two)
    assert (both.source, both.tokens, both.unseen) == ("one + two", 64, ())
    assert agree(both.of("a.weight"), Stats.of(torch.cat([x, y])), ROUNDING)
    assert agree(both.of("b.weight"), Stats.of(x[:, :3])) and agree(both.of("c.weight"), Stats.of(y[:, :2]))


def test_a_merge_splits_groups_that_only_one_side_shares():
    torch.manual_seed(0)
    x, y, z = (torch.randn(10, 4) for _ in range(3))
    shared, name = Stats.of(x), identify(model())
    one = gather(name, "one", 10, {"a.weight": shared, "b.weight": shared})
    two = gather(name, "two", 10, {"a.weight": Stats.of(y), "b.weight": Stats.of(z)})
    both = merge(one, two)
    assert agree(both.of("a.weight"), shared + Stats.of(y)) and agree(
        both.of("b.weight"), shared + Stats.of(z)
    )


def test_a_merge_says_what_only_one_side_knew():
    full, diagonal = seen_of(model()), seen_of(model(), 1, hessian=False)
    for both in (merge(full, diagonal), merge(diagonal, full)):
        assert both.knows == {"absmax", "mean_square"}
        (note,) = both.notes
        assert note == "hessian is in only one of the merged statistics, so the result does not have it"
        assert all(both.of(site).hessian is None for site in both.sites)


def test_parts_of_one_run_are_joined():
    whole = seen_of(model(layers=2))
    parts = [
        gather(
            whole.model,
            whole.source,
            whole.tokens,
            {s: whole.of(s) for s in whole.sites if f".{i}." in s[:16]},
        )
        for i in range(2)
    ]
    joined = join(parts)
    assert set(joined.sites) == set(whole.sites) and joined.tokens == whole.tokens
    assert all(agree(joined.of(site), whole.of(site)) for site in whole.sites)
    with pytest.raises(CalibrationError, match="is in 2 parts"):
        join([*parts, parts[0]])
    with pytest.raises(CalibrationError, match="saw 20 tokens of text 1, another 20 of text 0"):
        join([parts[0], replace(parts[1], source="text 1")])


def test_a_model_is_the_same_in_every_file_type(tmp_path):
    for name, fields in (
        ("LlamaForCausalLM", SMALL),
        ("Qwen2ForCausalLM", SMALL),
        ("MixtralForCausalLM", MIXTRAL),
    ):
        source = open_checkpoint(save_tiny(name, tmp_path / name, **fields))
        as_gguf = open_checkpoint(write_float_gguf(source, tmp_path / f"{name}.gguf"))
        assert identify(source).same_as(identify(as_gguf)), name


def test_statistics_of_another_model_are_refused(tmp_path):
    path = tmp_path / "stats.safetensors"
    save_statistics(seen_of(model(layers=2)), path)
    for other in (model(), model(layers=2, hidden=32), model("Qwen3MoeForCausalLM", layers=2)):
        with pytest.raises(CalibrationError) as caught:
            load_statistics(path, other)
        assert str(identify(model(layers=2))) in str(caught.value) and str(identify(other)) in str(
            caught.value
        )
        with pytest.raises(CalibrationError, match="different models"):
            merge(seen_of(model(layers=2)), seen_of(other))
    check_model(load_statistics(path), model(layers=2))
    llama, qwen = (identify(model(name)) for name in ("LlamaForCausalLM", "Qwen3ForCausalLM"))
    assert llama.digest == qwen.digest and not llama.same_as(qwen)


def test_a_site_with_other_columns_is_named():
    found = seen_of(model())
    site = "model.layers.0.self_attn.o_proj.weight"
    wrong = gather(found.model, "text", 5, {site: Stats.of(torch.randn(5, 7))})
    with pytest.raises(CalibrationError, match=f"{site}' has 16 columns, its statistics 7"):
        check_model(wrong, model())


# ---- importance ----------------------------------------------------------------------------------


def test_importance_is_the_mean_square_of_what_was_seen():
    found = seen_of(model())
    for site in sites(model()):
        if site.block is not None:
            assert torch.equal(importance_of(found, site), found.of(site.name).mean_square)
    assert importance_notes(found) == ()


def test_an_expert_that_saw_nothing_takes_the_tokens_of_the_others():
    found = seen_of(model(), unseen=("experts.1.", "experts.5."))
    site = next(s for s in sites(model()) if "experts.5.w1" in s.name)
    others = [found.of(site.name.replace("experts.5.", f"experts.{e}.")) for e in (0, 2, 3, 4, 6, 7)]
    total = others[0]
    for other in others[1:]:
        total = total + other
    torch.testing.assert_close(importance_of(found, site), total.mean_square, rtol=ROUNDING, atol=0)
    notes = importance_notes(found)
    assert len(notes) == 3 and all("2 of 8 experts saw no token (1, 5)" in note for note in notes)


def test_a_site_of_which_nothing_is_known_is_an_error():
    found = seen_of(model(), unseen=("experts.", "o_proj"))
    for site in sites(model()):
        if "experts." in site.name or "o_proj" in site.name:
            with pytest.raises(CalibrationError, match=f"{site.name}: no token of text 0 reached it"):
                importance_of(found, site)


# ---- our file ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
def test_what_was_saved_is_read(tmp_path_factory, k, hessian, seed):
    torch.manual_seed(seed)
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    x = torch.randn(7, k)
    both = Stats.of(x, hessian)
    saved = gather(
        identify(model()), "a “text”", 7,
        {"z.weight": both, "y.weight": both, "x": Stats.of(x[:, :1], hessian)}, ["w.weight"], ["a note"],
    )  # fmt: skip
    save_statistics(saved, path)
    found = load_statistics(path)
    assert replace(found, groups={}) == replace(saved, groups={}) and set(found.groups) == {"x", "y.weight"}
    for site in saved.sites:
        mirrored = saved.of(site)
        if hessian:  # BLAS may differ by a rounding below the diagonal
            mirrored = replace(mirrored, hessian=mirrored.hessian.triu() + mirrored.hessian.triu(1).T)
        assert agree(found.of(site), mirrored)
    assert found.of("x", hessian=False).hessian is None and found.of("w.weight") is None


def test_a_hessian_of_many_panels_takes_half_its_size(tmp_path):
    path, k = tmp_path / "stats.safetensors", 600
    whole = torch.arange(k * k, dtype=torch.float32).view(k, k)
    saved = Stats(3, torch.ones(k), torch.ones(k), whole.triu() + whole.triu(1).T)
    save_statistics(gather(identify(model()), "text", 3, {"a.weight": saved}), path)
    assert agree(load_statistics(path).of("a.weight"), saved)
    assert path.stat().st_size < 4 * (k * (k + 1) // 2 + 2 * k) + 2000


def test_a_merge_of_files_can_be_saved(tmp_path):
    for seed in range(2):
        save_statistics(seen_of(model(), seed), tmp_path / f"{seed}")
    both = merge(load_statistics(tmp_path / "0"), load_statistics(tmp_path / "1"))
    save_statistics(both, tmp_path / "both")
    found, direct = (
        load_statistics(tmp_path / "both", model()),
        merge(seen_of(model(), 0), seen_of(model(), 1)),
    )
    assert all(agree(found.of(site), direct.of(site), ROUNDING) for site in direct.sites)
    query, key = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    assert found.of(query) is found.of(key) and both.of(query) is both.of(key)  # read once for both


def test_a_file_in_the_way_is_kept(tmp_path):
    path = tmp_path / "stats.safetensors"
    path.write_text("mine")
    with pytest.raises(FileError, match="exists"):
        save_statistics(seen_of(model()), path)
    assert path.read_text() == "mine"
    save_statistics(seen_of(model()), path, overwrite=True)
    assert load_statistics(path).tokens == 20


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "stats.safetensors"
    save_statistics(seen_of(model("LlamaForCausalLM")), path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(FileError):
            load_statistics(path)


def test_a_value_that_is_not_finite_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "stats.safetensors"
    save_statistics(gather(identify(model()), "text", 5, {"a.weight": Stats.of(torch.randn(5, 4))}), path)
    raw = bytearray(path.read_bytes())
    entry = read_header(path)["a.weight.hessian"]
    raw[entry.offset : entry.offset + 4] = struct.pack("<f", float("inf"))
    path.write_bytes(raw)
    with pytest.raises(CalibrationError, match=r"a\.weight: hessian has 1 of 16 values"):
        load_statistics(path).of("a.weight")


ABOUT = {
    "model": {"name": "m", "architecture": "llama", "digest": "0"}, "source": "text", "tokens": 5,
    "knows": ["mean_square"], "sites": {"a": "a"}, "unseen": [], "notes": [],
}  # fmt: skip
ROWS = [("a.count", "I64", ()), ("a.mean_square", "F32", (4,))]
LIES = {
    "no metadata": (None, ROWS, "fewbits.statistics is None"),
    "not JSON": ("{", ROWS, "not valid JSON"),
    "model without a digest": ({"model": {"name": "m"}}, ROWS, "model is"),
    "tokens negative": ({"tokens": -1}, ROWS, "tokens is '-1'"),
    "tokens true": ({"tokens": True}, ROWS, "tokens is 'True'"),
    "unknown field": ({"knows": ["mean_square", "mean"]}, ROWS, "knows is"),
    "no mean square": ({"knows": []}, ROWS, "knows is"),
    "a site without a group": ({"sites": {"a": "a", "b": "c"}}, ROWS, "site 'b' has no group 'c'"),
    "sites a list": ({"sites": ["a"]}, ROWS, "sites is"),
    "a field is missing": ({"knows": ["mean_square", "hessian"]}, ROWS, "a.hessian is missing, F32 (10,)"),
    "a triangle too short": (
        {"knows": ["mean_square", "hessian"]}, [*ROWS, ("a.hessian", "F32", (9,))], "F32 (9,), F32 (10,) is"),
    "other dtype": ({}, [ROWS[0], ("a.mean_square", "F16", (4,))], "is F16 (4,), F32 (4,) is needed"),
    "two dimensions": ({}, [ROWS[0], ("a.mean_square", "F32", (2, 2))], "a.mean_square is F32 (2, 2)"),
    "no columns": ({}, [ROWS[0], ("a.mean_square", "F32", (0,))], "a.mean_square is F32 (0,)"),
    "a stranger": ({}, [*ROWS, ("b", "F32", (1,))], "tensor 'b' belongs to no group"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_a_file_error(tmp_path, lie):
    change, rows, says = LIES[lie]
    about = change if isinstance(change, str) else json.dumps({**ABOUT, **(change or {})})
    metadata = None if change is None else {"fewbits.statistics": "1", "about": about}
    header, entries = lay_out(rows, metadata)
    path = tmp_path / "stats.safetensors"
    path.write_bytes(header + bytes(sum(entry.nbytes for entry in entries)))
    with pytest.raises(FileError) as caught:
        load_statistics(path)
    assert str(path) in str(caught.value) and says in str(caught.value)
