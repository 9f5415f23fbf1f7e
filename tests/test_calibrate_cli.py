"""`fewbits calibrate` as a user types it, and what `quantize` makes of its three kinds of files."""

import gc
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from fewbits.adapters.transformers import load_model
from fewbits.calibrate.imatrix import open_statistics
from fewbits.calibrate.statistics import Statistics, merge
from fewbits.calibrate.stats import Stats
from fewbits.calibrate.tokens import read_tokens
from fewbits.cli.main import main
from fewbits.files.open import open_checkpoint
from fewbits.release.receipt import Receipt
from fewbits.workflow.blockwise import Streaming
from fewbits.workflow.blockwise.collect import collect
from tests.statistics_cases import agree
from tests.tiny import CORPUS, change_weights, save_tiny

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
TEXT = ("--calibrate", "text.txt", "--tokens", 128, "--context", 32)
KINDS = ("s.safetensors", "s.gguf", "s.dat")
Q, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("LlamaForCausalLM", tmp_path_factory.mktemp("models") / "tiny", **SMALL)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """Every token goes to expert 0 or 1 of 4: a score and its negative; the others' are a thousandth."""
    at = tmp_path_factory.mktemp("models") / "experts"
    save_tiny("MixtralForCausalLM", at, num_local_experts=4, num_experts_per_tok=1, **SMALL)

    def narrow(router: torch.Tensor) -> torch.Tensor:
        return torch.stack([router[0], -router[0], 1e-3 * router[0], -1e-3 * router[0]])

    names = [f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(2)]
    return change_weights(at, dict.fromkeys(names, narrow))


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """-> (exit code, stdout, stderr) of a command run in a directory with text.txt."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(CORPUS, encoding="utf-8")

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def saved(path: str, model: Path) -> Statistics:
    return open_statistics(Path(path), open_checkpoint(model))


def receipt(out: str) -> Receipt:
    return Receipt.from_json(out)


# what is written


def test_statistics_are_those_of_the_model_run_whole(model, run):
    """Against hooks on transformers' own model: the inputs are the same but for the order of f32 sums."""
    assert run("calibrate", model, *TEXT, "--compute", "f32", "--out", "s.safetensors")[0] == 0
    found = saved("s.safetensors", model)
    assert found.tokens == 128 and found.knows == {"absmax", "mean_square", "hessian"}
    whole = load_model(open_checkpoint(model))
    inputs: dict[str, torch.Tensor] = {}
    for name in (Q, DOWN):
        whole.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, given, name=name: inputs.__setitem__(name, given[0])
        )
    with torch.no_grad():
        whole(read_tokens(open_checkpoint(model), "text.txt", 128, 32).windows)
    for name, x in inputs.items():
        x = x.reshape(-1, x.shape[-1])
        stats = found.of(name)
        assert stats is not None and stats.count == 128
        # An input is off by some 100 roundings of 2^-24 through two blocks, its square by twice that.
        wanted = x.T @ x / 128
        assert torch.allclose(stats.hessian, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_says_the_same_mean_squares(model, run, name):
    assert run("calibrate", model, *TEXT, "--out", "full.safetensors")[0] == 0
    code, out, err = run("calibrate", model, *TEXT, "--no-hessian", "--out", name)
    assert (code, err) == (0, "") and f"wrote {name}" in out and "self_attn.k_proj" in out
    full, found = saved("full.safetensors", model), saved(name, model)
    assert "hessian" in full.knows and "hessian" not in found.knows
    assert set(found.sites) == set(full.sites) and len(found.sites) == 14
    for site in found.sites:
        # sums in another order: 128 terms, and a .dat file multiplies and divides by its chunks
        assert torch.allclose(found.of(site).mean_square, full.of(site).mean_square, rtol=130 * 2**-24)
    assert not [path for path in Path().iterdir() if path.name.endswith((".parts", ".tmp"))]


def test_a_scratch_file_and_one_sequence_at_a_time_change_nothing(model, run):
    for name, more in (("a", ()), ("b", ("--activation-memory", 0, "--scratch", "."))):
        assert run("calibrate", model, *TEXT, "--out", f"{name}.safetensors", *more)[0] == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_no_hessian_stays_in_memory(model, run, tmp_path):
    tokens = read_tokens(open_checkpoint(model), "text.txt", 128, 32)
    (tmp_path / "parts").mkdir()
    found = collect(open_checkpoint(model), tokens, Streaming(), tmp_path / "parts")
    gc.collect()
    held = [o for o in gc.get_objects() if type(o) is Stats and o.hessian is not None]
    assert len(found.groups) == 8 and not held
    assert found.of(Q).hessian is not None


def test_a_summary_as_json(experts, run):
    code, out, _ = run("calibrate", experts, *TEXT, "--out", "s.safetensors", "--json")
    told = json.loads(out)
    assert code == 0 and told["tokens"] == 128 and told["nbytes"] == Path("s.safetensors").stat().st_size
    rows = {row["place"].removeprefix("model.layers.*."): row for row in told["inputs"]}
    k = rows["self_attn.k_proj"]
    assert (k["columns"], k["groups"], k["tokens"], k["needed"], k["short"]) == (64, 2, 128, 256, 2)
    unseen = [f"model.layers.{i}.block_sparse_moe.experts.{e}.w{j}.weight"
              for i in range(2) for e in (2, 3) for j in (1, 2, 3)]  # fmt: skip
    assert told["unseen"] == unseen == list(saved("s.safetensors", experts).unseen)


def test_merged_statistics_are_those_of_both(model, run):
    other = ("--calibrate", "other.txt", "--tokens", 64, "--context", 32)
    Path("other.txt").write_text(CORPUS[300:], encoding="utf-8")
    assert run("calibrate", model, *other, "--out", "other.safetensors")[0] == 0
    assert run("calibrate", model, *TEXT, "--out", "one.safetensors")[0] == 0
    code, out, _ = run("calibrate", model, *TEXT, "--merge", "other.safetensors", "--out", "two.safetensors")
    assert code == 0 and "192 tokens" in out
    wanted = merge(saved("one.safetensors", model), saved("other.safetensors", model))
    found = saved("two.safetensors", model)
    assert found.tokens == 192 and all(agree(found.of(site), wanted.of(site)) for site in wanted.sites)


# what is refused


def test_what_cannot_be_written_is_refused_before_the_model_is_run(model, run, monkeypatch):
    def never(*_given, **_options):
        raise AssertionError("the work began")

    monkeypatch.setattr("fewbits.cli.calibrate.collect", never)
    Path("there.gguf").write_text("in the way")
    Path("d.gguf").mkdir()
    for out, fault in [
        ("x.bin", "unknown suffix; use .safetensors, .gguf, .dat"),
        ("there.gguf", "exists; choose another output or pass --overwrite"),
        ("d.gguf", "is a directory"),
        ("there.gguf/x.dat", "this directory cannot be made"),
    ]:
        code, printed, err = run("calibrate", model, *TEXT, "--out", out)
        assert (code, printed) == (1, "") and fault in err, out
    assert Path("there.gguf").read_text() == "in the way"


def test_an_output_is_replaced_when_asked(model, run):
    Path("s.dat").write_text("in the way")
    assert run("calibrate", model, *TEXT, "--out", "s.dat", "--overwrite")[0] == 0
    assert saved("s.dat", model).tokens > 0


def test_too_little_disk_for_the_hessians_is_told_before_the_start(model, run, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        "fewbits.workflow.blockwise.collect.shutil.disk_usage", lambda path: usage(9, 9, 1000)
    )
    code, _, err = run("calibrate", model, *TEXT, "--out", "s.safetensors")
    # twice the triangles of 2 blocks with 3 inputs of 64 columns and one of 96
    needed = 2 * 2 * 4 * (3 * 64 * 65 // 2 + 96 * 97 // 2)
    assert code == 1 and f"8 inputs need {needed} bytes of disk, 1000 are free" in err
    assert not Path("s.safetensors").exists()


def test_too_few_tokens_are_an_error_when_asked(model, run):
    code, _, err = run("calibrate", model, *TEXT, "--strict-calibration", "--out", "s.safetensors")
    assert code == 1 and "128 tokens seen, 384 are needed (and too few at 7 other inputs)" in err
    assert not Path("s.safetensors").exists()


def test_activations_that_are_not_finite_name_the_block(model, run, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    change_weights(broken, {Q: lambda w: w.fill_(float("nan"))})
    code, _, err = run("calibrate", broken, *TEXT, "--out", "s.safetensors")
    assert code == 1 and "model.layers.1" in err and "NaN or infinite" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "text.txt"]


# what quantize makes of it


@pytest.mark.parametrize("name", KINDS)
def test_weighted_takes_each_kind(model, run, name):
    assert run("calibrate", model, *TEXT, "--out", name)[0] == 0
    quantize = ("quantize", model, "--to", "q4_0", "--json", "--out")
    code, out, _ = run(*quantize, "w.gguf", "--method", "weighted", "--calibrate", name)
    assert code == 0
    rows = {row.name: row for row in receipt(out).tensors}
    assert {rows[Q].algorithm, rows[DOWN].algorithm} == {"weighted"} and rows[Q].tokens
    assert rows["model.embed_tokens.weight"].algorithm == "rtn"
    assert receipt(out).calibration["source"] == "text.txt"
    assert run(*quantize, "r.gguf", "--effort", "fast")[0] == 0
    found, stats = open_checkpoint(Path("w.gguf")), saved(name, model)
    plain, source = open_checkpoint(Path("r.gguf")), open_checkpoint(model)
    for site in (Q, DOWN):  # the error that it weighs is no larger than plain rounding's
        lost = [float(((c.tensors[site].load().decode() - source.tensors[site].load().float()).square()
                       @ stats.of(site).mean_square).sum()) for c in (found, plain)]  # fmt: skip
        assert 0 < lost[0] < lost[1]


def test_gptq_takes_hessians_in_one_pass(model, run):
    assert run("calibrate", model, *TEXT, "--out", "s.safetensors")[0] == 0
    for how in (("--method", "gptq"), ("--effort", "good"), ()):
        code, out, _ = run("quantize", model, "--to", "q4_0", "--json", "--overwrite", "--out", "g.gguf",
                           *how, "--calibrate", "s.safetensors")  # fmt: skip
        told = receipt(out)
        rows = {row.name: row for row in told.tensors}
        assert code == 0 and rows[Q].algorithm == rows[DOWN].algorithm == "gptq" and rows[Q].tokens == 128
        assert any(note.startswith("saved statistics: ") for note in told.notes)
        assert "sequential" not in told.method and "gptaq" not in told.method
    assert run("quantize", model, "--to", "q4_0", "--effort", "fast", "--out", "r.gguf")[0] == 0
    source, stats = open_checkpoint(model), saved("s.safetensors", model)
    for site in (Q, DOWN):
        w = source.tensors[site].load().float()
        errors = [open_checkpoint(Path(f"{f}.gguf")).tensors[site].load().decode() - w for f in "gr"]
        ours, plain = (float(((e @ stats.of(site).hessian) * e).sum()) for e in errors)
        assert ours < plain


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        (("--method", "gptq", "--calibrate", "s.gguf"), "has no Hessian, which gptq needs"),
        (("--effort", "best", "--calibrate", "s.gguf"), "saved statistics are not enough"),
        (("--method", "weighted", "--awq", "--calibrate", "s.gguf"), "saved statistics are not enough"),
        (
            ("--method", "weighted", "--rotate", "--calibrate", "s.gguf"),
            "rotate changes the inputs of weights",
        ),
    ],
)
def test_what_saved_statistics_cannot_do_is_said(model, run, how, fault):
    assert run("calibrate", model, *TEXT, "--out", "s.gguf")[0] == 0
    code, _, err = run("quantize", model, "--to", "q4_0", "--out", "m.gguf", *how)
    assert code == 1 and fault in err
    assert not Path("m.gguf").exists()


@pytest.mark.parametrize("method", ["weighted", "gptq"])
def test_experts_that_saw_nothing_are_quantized_and_noted(experts, run, method):
    assert run("calibrate", experts, *TEXT, "--out", "s.safetensors")[0] == 0
    unseen = saved("s.safetensors", experts).unseen
    code, out, _ = run("quantize", experts, "--to", "int4_g32", "--method", method, "--out", "n", "--json",
                       "--calibrate", "s.safetensors")  # fmt: skip
    told = receipt(out)
    rows = {row.name: row for row in told.tensors}
    assert code == 0 and unseen
    if method == "weighted":
        assert all((rows[name].algorithm, rows[name].tokens) == ("weighted", 0) for name in unseen)
        assert any("experts saw no token" in note for note in told.notes)
    else:
        assert all(rows[name].algorithm == "rtn" for name in unseen)
        assert any(note.startswith("unseen: ") and "rounded to nearest" in note for note in told.notes)
