"""Text that the model writes itself: its own distribution, no loops, no duplicates, kept and reused."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.adapters.transformers import load_model, load_tokenizer
from fewbits.calibrate import kept, sampling, tokens
from fewbits.calibrate.sampling import LOOP, NGRAM, Documents, Heads, Writing, sample, write_rows
from fewbits.calibrate.tokens import bos_of, read_tokens
from fewbits.cli.main import main
from fewbits.devices import Room
from fewbits.errors import CalibrationError
from fewbits.files.open import open_checkpoint
from fewbits.runtime.decode import Decoder
from fewbits.storage.cache import cache_folder
from tests.test_tokens import split
from tests.tiny import save_tiny


def test_the_model_writes_the_same_text_for_the_same_seed(model):
    first, again, other = (read_tokens(model, "self", 100, context=32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.windows, again.windows) and first.digest == again.digest != other.digest
    assert first.windows.shape == (4, 32) and "model itself (seed 1)" in first.source
    tokenizer = load_tokenizer(model)
    assert int(first.windows.max()) < len(tokenizer)  # the embedding has more rows
    if bos_of(tokenizer) is not None:
        assert set(first.windows[:, 0].tolist()) == {tokenizer.bos_token_id}


def test_progress_runs_to_the_end(plain):
    seen = []
    read_tokens(plain, "self", 100, context=32, progress=lambda *step: seen.append(step))
    done = [at for _, at, _ in seen]
    assert done == sorted(done) and seen[-1] == ("writing calibration text", 128, 128)


def test_sampling_with_a_cache_equals_sampling_without(plain):
    model = load_model(plain, torch.float32)
    heads = torch.arange(6).view(2, 3)
    expected = heads
    with torch.inference_mode():
        for _ in range(40):
            expected = torch.cat(
                [expected, model(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)], 1
            )
    cold = sample(Decoder(model, 43), heads, 43, torch.Generator().manual_seed(0), temperature=1e-4)
    assert torch.equal(cold, expected)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_step_of_many_rows_is_the_whole_models(architecture, dtype, tmp_path):
    """Pages, masks and grouped heads against one pass of transformers' own attention over the whole row."""
    checkpoint = open_checkpoint(save_tiny(architecture, tmp_path / "model"))
    model, plain = (load_model(checkpoint, kind) for kind in (dtype, torch.float32))
    ids = torch.randint(500, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = plain(input_ids=ids).logits
        decoder = Decoder(model, 40)
        found = [decoder(ids[:, :3]), *(decoder(ids[:, i : i + 1]) for i in range(3, 40))]
    apart = (torch.stack(found, 1).float() - expected[:, 2:]).square().mean() / expected.var()
    # bf16 keeps 8 bits: 2^-8 of each number, through two blocks
    assert float(apart.sqrt()) < (1e-5 if dtype == torch.float32 else 0.03)


def test_a_damaged_model_is_an_error(plain):
    def not_finite(**_):
        return SimpleNamespace(past_key_values=None, logits=torch.full((1, 1, 5), float("nan")))

    with pytest.raises(CalibrationError, match="not finite at token 1"):
        sample(Decoder(not_finite, 4), torch.zeros(1, 1, dtype=torch.int64), 4, torch.Generator())


def test_a_damaged_weight_is_named(plain, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(CalibrationError, match=rf"3 of \d+ values of '{name}' are not finite"):
        read_tokens(damaged(plain, name), "self", 64, context=32)


def damaged(checkpoint, name):
    def load():
        value = checkpoint.tensors[name].load().float()
        value.view(-1)[:3] = float("nan")
        return value

    return replace(
        checkpoint, tensors={**checkpoint.tensors, name: replace(checkpoint.tensors[name], load=load)}
    )


# ---- text that is kept ---------------------------------------------------------------------------


def test_text_is_written_once_and_again_for_other_weights(plain, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(plain.path, folder)
    first = read_tokens(open_checkpoint(folder), "self", 64, context=32)

    def never(*_):
        raise AssertionError("written again")

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "write_rows", never)
        again = read_tokens(open_checkpoint(folder), "self", 64, context=32)
        assert torch.equal(again.windows, first.windows) and again.digest == first.digest
        assert "reused" in again.notes[-1] and not any("reused" in note for note in first.notes)
        with pytest.raises(AssertionError, match="written again"):
            read_tokens(open_checkpoint(folder), "self", 64, context=32, seed=1)
    (weights,) = folder.glob("*.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-4:] = b"\0\0\0\x3f"  # one number of the last tensor
    weights.write_bytes(raw)
    other = read_tokens(open_checkpoint(folder), "self", 64, context=32)
    assert not any("reused" in note for note in other.notes)


def test_a_view_of_the_same_files_with_other_weights_is_another_model(plain):
    name = "model.layers.1.mlp.down_proj.weight"
    assert kept.model_digest(plain) == kept.model_digest(plain) != kept.model_digest(damaged(plain, name))


@pytest.mark.parametrize("content", [b"", b"{", b'{"rows": [[1]], "notes": [], "sha256": "00"}', b"[1]"])
def test_a_damaged_text_is_written_anew(plain, content, monkeypatch):
    first = read_tokens(plain, "self", 64, context=32)
    (path,) = (cache_folder() / "text").iterdir()
    path.write_bytes(content)
    again = read_tokens(plain, "self", 64, context=32)
    assert torch.equal(first.windows, again.windows) and not any("reused" in note for note in again.notes)
    assert json.loads(path.read_text())["rows"]


def test_a_cache_that_cannot_be_written_costs_only_time(plain, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "file" / "cache"))
    assert "cannot be kept" in read_tokens(plain, "self", 64, context=32).notes[-1]


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sampling.COPIES)
def test_a_copy_writes_where_the_model_does_not_fit(plain, kind):
    cache = sampling.writer_of(plain).cache
    weights, loading = sampling.weight_nbytes(plain, kind)
    memory = weights + max(loading, cache + sampling.WORKING)
    assert sampling.writer_of(plain, Room(left=memory)).kind == kind
    found = read_tokens(plain, "self", 64, context=32, room=Room(left=memory))
    assert found.windows.shape == (2, 32) and f"copy of the model in {kind}" in found.notes[0]
    with pytest.raises(
        CalibrationError, match=r"needs [\d.]+ GiB of memory, 0.00 GiB are free; give a text file"
    ):
        read_tokens(plain, "self", 64, context=32, room=Room(left=2**20))


def test_a_copy_is_as_near_as_its_format_allows(plain):
    """Q8_0 has 32 weights per scale, at most their largest / 127. Off by one scale if a code of 128 is cut to
    127, and by what the scale loses as f16: 127 * 2^-11 of itself."""
    name = "model.layers.0.mlp.up_proj"
    w = plain.tensors[f"{name}.weight"].load().float()
    model, _ = sampling.load_writer(plain, sampling.Writer("q8_0", 0, 0))
    copied = model.get_submodule(name).weight.decode(torch.float32)
    scale = w.view(len(w), -1, 32).abs().amax(-1, keepdim=True) / 127
    assert 0 < float(((copied - w).view(len(w), -1, 32).abs() / scale).max()) < 1.06


HEADS = st.builds(
    lambda seed: Heads([7, 8, 9], [], [5], torch.Generator().manual_seed(seed)), st.integers(0, 99)
)


@settings(max_examples=30)
@given(HEADS, st.lists(st.sampled_from([0, 0, 1, 2, 6, 10]), min_size=60, max_size=200))
def test_no_document_loops_and_none_goes_on_after_its_end(heads, drawn):
    """0, 1, 2 are words, 6 ends a document, 10 has no text; heads are of 7, 8, 9, parted by 5."""
    rows = Documents([heads.new()], heads, ends=frozenset([6]), known=10)
    written = [int(rows(torch.tensor([[token]]))) for token in drawn]
    assert 10 not in written
    for part in split(written, 5):
        for document in split(part, 6):
            words = [token for token in document if token < 3]
            ngrams = Counter(tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))
            assert max(ngrams.values(), default=0) <= LOOP
    after = [written[i + 1 : i + 3] for i, token in enumerate(written) if token == 6]
    assert all(token in (7, 8, 9) for head in after for token in head)


def test_a_loop_is_cut_where_the_ngram_comes_for_the_third_time():
    heads = Heads([7], [], [5], torch.Generator())
    rows = Documents([[7, 7]], heads, frozenset(), 10)
    written = [int(rows(torch.tensor([[1]]))) for _ in range(NGRAM + LOOP + 2)]
    assert written == [1] * (NGRAM + LOOP - 1) + [5, 7, 7] and rows.loops == 1


def test_rows_written_twice_are_dropped_and_it_ends(plain, monkeypatch):
    def same(model, heads, length, *_):
        return torch.arange(length).expand(len(heads), -1)

    monkeypatch.setattr(sampling, "sample", same)
    rows, notes = write_rows(plain, load_tokenizer(plain), None, Writing(128, 32, sampling.writer_of(plain)))
    assert rows == [list(range(32))]
    assert "rows of 32 tokens dropped as duplicates" in notes[0]
    found = read_tokens(plain, "self", 128, context=32)
    assert found.windows.shape == (1, 32) and "holds 32 tokens, 128 were requested" in found.notes[-1]


def test_heads_are_ordinary_tokens(model):
    tokenizer = load_tokenizer(model)
    heads = sampling._heads(model, tokenizer, bos_of(tokenizer), torch.Generator().manual_seed(0))
    assert len(heads.pool) > 50
    for token in heads.pool:
        assert token not in tokenizer.all_special_ids
        text = tokenizer.decode([token])
        assert "\ufffd" not in text and token in tokenizer(text, add_special_tokens=False).input_ids


def test_a_damaged_model_is_never_rounded_instead(plain, tmp_path, capsys):
    """What is asked is the default: there a model that cannot be run is rounded to nearest."""
    folder = tmp_path / "copy"
    shutil.copytree(plain.path, folder)
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\xc0\x7f")  # NaN in f32 and in bf16
    arguments = [
        "quantize",
        str(folder),
        "--to",
        "q4_0",
        "--out",
        str(tmp_path / "out.gguf"),
        "--tokens",
        "64",
    ]
    assert main([*arguments, "--context", "32"]) == 1
    assert "not finite at token" in capsys.readouterr().err and not (tmp_path / "out.gguf").exists()
