"""Every command as a user types it: results on stdout, all else on stderr, and exit codes with a meaning."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fewbits.cli.main import COMMANDS, main
from fewbits.errors import PlanError
from fewbits.files.open import open_checkpoint
from fewbits.release.receipt import Receipt
from fewbits.release.verify import Outcome
from tests.tiny import CORPUS, save_tiny

NAMES = list(COMMANDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Rows of 64 and 320, which no block of 256 divides, beside rows of 256."""
    at = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny("LlamaForCausalLM", at, intermediate_size=320, num_hidden_layers=1)


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory) -> Path:
    at = tmp_path_factory.mktemp("quantized") / "tiny-Q8_0.gguf"
    assert main(["quantize", str(model), "--to", "q8_0", "--effort", "fast", "--out", str(at), "--json"]) == 0
    return at


MISSING = Outcome("an engine", "not checked", reason="it is not installed (pip install it)")


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """-> (exit code, stdout, stderr) of a command run in an empty directory. No engine is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fewbits.workflow.quantize.verify", lambda *given, **named: MISSING)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse leaves this way
            code = exit.code if isinstance(exit.code, int) else 2
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


# quantize


def test_quantize_prints_the_receipt_and_writes_it(model, run):
    code, out, err = run("quantize", model, "--to", "q8_0", "--effort", "fast", "--json")
    assert (code, without_need(err)) == (0, f"fewbits: {MISSING.line()}\n")
    receipt = Receipt.from_json(out)
    assert receipt.target == "tiny-Q8_0.gguf"
    assert Path("tiny-Q8_0.gguf.receipt.json").read_text() == out.rstrip("\n") + "\n"
    assert Path("tiny-Q8_0.gguf").stat().st_size == receipt.outputs[0].nbytes


def test_quantize_prints_a_table(model, run):
    code, out, err = run("quantize", model, "--to", "int4_g32", "--no-search", "--threads", 1)
    assert (code, without_need(err)) == (0, f"fewbits: {MISSING.line()}\n")
    assert "int4_g32" in out and "bits per weight" in out and out.endswith("wrote tiny-int4_g32\n")
    assert open_checkpoint(Path("tiny-int4_g32")).file_type.name == "native"
    assert {
        row.options["search"] for row in receipt("tiny-int4_g32/receipt.json").tensors if row.options
    } == {False}


def without_need(err: str) -> str:
    """What stands on stderr besides the memory that a command says it will need."""
    lines = err.splitlines(keepends=True)
    return "".join(line for line in lines if not re.match(r"fewbits \w+: needs [\d.]+ GiB", line))


def receipt(path: str) -> Receipt:
    return Receipt.from_json(Path(path).read_text())


@pytest.mark.parametrize(
    ("arguments", "out"),
    [
        (["--to", "q4_0"], "tiny-Q4_0.gguf"),
        (["--to", "Q4_0", "--file", "native"], "tiny-Q4_0"),
        (["--to", "nf4"], "tiny-nf4"),
        (["--rule", "*.up_proj=q8_0", "--file", "gguf"], "tiny-PLAN.gguf"),
        (["--rule", "*.up_proj=q8_0", "--out", "deep/er/x.gguf"], "deep/er/x.gguf"),
        (["--to", "q4_0", "--out", "without-suffix", "--file", "gguf"], "without-suffix"),
    ],
)
def test_where_the_output_goes(model, run, arguments, out):
    assert run("quantize", model, "--effort", "fast", *arguments)[0] == 0
    assert Path(out).exists()
    open_checkpoint(Path(out))


def test_rules_of_the_command_line_come_before_those_of_the_plan(model, run):
    Path("plan.toml").write_text(
        '[[rule]]\nmatch = "*.up_proj"\nformat = "q4_0"\n[[rule]]\nmatch = "*.gate_proj"\nformat = "q5_1"\n'
    )
    arguments = [
        "--to",
        "q8_0",
        "--rule",
        "*.up_proj=q6_k",
        "--plan",
        "plan.toml",
        "--rule",
        "lm_head=f16",
        "--json",
    ]
    code, out, _ = run("quantize", model, "--effort", "fast", *arguments)
    assert code == 1, "the plan's rule for up_proj decides nothing any more, which is said"
    Path("plan.toml").write_text('[[rule]]\nmatch = "*.mlp.*"\nformat = "q5_1"\n')
    code, out, _ = run("quantize", model, "--effort", "fast", *arguments)
    found = {row.name.rsplit(".", 2)[-2]: row.format for row in Receipt.from_json(out).tensors}
    assert code == 0
    assert found | {"up_proj": "q6_k", "gate_proj": "q5_1", "lm_head": "f16", "q_proj": "q8_0"} == found


# Exit codes and messages


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--to", "q8_0", "--rule", "*.down_proj=q4_k"], 3),  # falls back to q5_0: not what the rule says
        (["--to", "q8_0", "--rule", "blk.*.ffn_down=q4_k"], 3),
        (["--to", "q4_k_m"], 0),  # the mixture's own fall-back
        (["--to", "q4_k_m", "--strict"], 3),
        (["--to", "q8_0", "--strict"], 0),
        (["--to", "q4_k_m", "--strict", "--rule", "*.down_proj=q5_0"], 0),
    ],
)
def test_exit_code_3_is_for_what_was_asked_and_not_done(model, run, arguments, code):
    got, out, err = run("quantize", model, "--effort", "fast", *arguments, "--out", "m.gguf", "--json")
    assert got == code
    changed = Receipt.from_json(out).changed()
    assert ("fallback type" in err) == bool(changed)
    assert (code == 0) or all("is not a multiple of" in row.reason for row in changed)


def test_a_rule_for_experts_that_falls_back_is_told(run, tmp_path):
    """One tensor of the file, several of the model: the rule names the model's."""
    save_tiny("MixtralForCausalLM", tmp_path / "moe", intermediate_size=320, num_hidden_layers=1)
    code, _, err = run(
        "quantize",
        "moe",
        "--to",
        "q8_0",
        "--rule",
        "*.experts.*.w2=q4_k",
        "--out",
        "m.gguf",
        "--effort",
        "fast",
    )
    assert code == 3
    assert "1 of 13 tensors got a fallback type (1 of them named by a rule)" in err


ERRORS = {
    "no such model": (["inspect", "none/at/all"], "none/at/all"),
    "no such file": (["inspect", "none.gguf"], "none.gguf: no such file"),
    "no model": (["inspect", "{here}"], "has no config.json"),
    "type": (["quantize", "{model}", "--to", "q4_k_x"], "did you mean q4_k_"),
    "nothing asked": (["quantize", "{model}"], "--to TYPE"),
    "rule": (["quantize", "{model}", "--rule", "x"], "PATTERN="),
    "rule hits nothing": (["quantize", "{model}", "--to", "q8_0", "--rule", "*.x=q8_0"], "matches no tensor"),
    "no such plan": (["quantize", "{model}", "--plan", "none.toml"], "none.toml: the plan cannot be read"),
    "plan no TOML": (["quantize", "{model}", "--plan", "{model}/config.json"], "not TOML"),
    "output in the way": (
        ["quantize", "{model}", "--to", "q8_0", "--out", "{quantized}"],
        "exists; choose another",
    ),
    "output under a file": (
        ["quantize", "{model}", "--to", "q8_0", "--out", "{quantized}/x.gguf"],
        "cannot be made",
    ),
    "output of no format": (["convert", "{model}", "{model}"], "is the input itself"),
    "already quantized": (["quantize", "{quantized}", "--to", "q4_0", "--out", "x.gguf"], "--requantize"),
    "text": (["evaluate", "{model}", "{quantized}", "--text", "none.txt"], "none.txt: cannot be read"),
    "text not UTF-8": (["evaluate", "{model}", "{quantized}", "--text", "{quantized}"], "is not UTF-8"),
    "text too short": (
        ["evaluate", "{model}", "{quantized}", "--text", "{model}/tokenizer_config.json"],
        "tokens",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_message_on_stderr_and_exit_code_1(model, quantized, run, case):
    arguments, says = ERRORS[case]
    places = {"model": str(model), "quantized": str(quantized), "here": "."}
    arguments = [argument.format(**places) for argument in arguments]
    before = quantized.read_bytes()
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    err = without_need(err)
    assert says in err and err.startswith(f"fewbits {arguments[0]}: error: ")
    assert "Traceback" not in err
    assert list(Path(".").iterdir()) == [] and quantized.read_bytes() == before


def test_debug_shows_where_an_error_comes_from(model):
    with pytest.raises(PlanError, match="no format is given"):
        main(["quantize", str(model), "--debug"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["none"],
        ["quantize"],
        ["quantize", "m", "--none"],
        ["convert", "m"],
        ["evaluate", "a", "b"],
        ["formats", "--threads", "0"],
        ["quantize", "m", "--to"],
        ["quantize", "m", "--file", "zip"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "usage: fewbits" in err


@pytest.mark.parametrize("name", NAMES)
def test_every_command_shows_examples(run, name):
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert f"examples:\n  fewbits {name.replace('_', '-')}" in out
    assert "examples:" in run("--help")[1] and name in run("--help")[1]


@pytest.mark.parametrize("way", [("--method", "gptq"), ("--method", "hqq"), ("--effort", "good")])
def test_no_search_is_refused_where_it_would_do_nothing(model, run, way):
    for command in ("quantize", "plan"):
        text = ("--tokens", 64, "--context", 32)
        code, out, err = run(command, model, "--to", "q4_0", "--no-search", *way, *text)
        assert (code, out) == (1, "") and f"{'hqq' if 'hqq' in way else 'gptq'} always searches" in err


def test_a_rule_that_needs_a_text_gets_it_under_a_method_that_needs_none(model, run):
    rule = ("--effort", "fast", "--rule", "*.up_proj=weighted:q4_0", "--tokens", 64, "--context", 32)
    code, out, _ = run("quantize", model, "--to", "q4_0", *rule, "--no-verify", "--out", "w", "--json")
    assert code == 0 and {row.algorithm for row in Receipt.from_json(out).tensors} >= {"rtn", "weighted"}


# The other commands


def test_convert(quantized, run):
    code, out, err = run("convert", quantized, "native")
    assert (code, err) == (0, f"fewbits: {MISSING.line()}\n") and out.endswith("wrote native\n")
    code, out, err = run("convert", "native", "again.gguf", "--json")
    assert (code, err) == (0, f"fewbits: {MISSING.line()}\n") and Receipt.from_json(
        out
    ).target == "again.gguf"
    assert Path("again.gguf").read_bytes() == quantized.read_bytes()
    assert run("convert", "native", "again.gguf")[0] == 1
    assert run("convert", "native", "again.gguf", "--overwrite")[0] == 0


@pytest.mark.parametrize("which", ["model", "quantized", "native"])
def test_inspect(model, quantized, run, which):
    run("quantize", model, "--to", "int4_g32", "--out", "native", "--effort", "fast")
    path = {"model": model, "quantized": quantized, "native": Path("native")}[which]
    code, out, err = run("inspect", path, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    tensors = open_checkpoint(path).tensors
    assert found["kind"] == open_checkpoint(path).file_type.name
    assert len(found["tensors"]) == len(tensors)
    assert found["nbytes"] == sum(t.nbytes for t in tensors.values())
    assert {t["type"] for t in found["tensors"]} == {t.dtype for t in tensors.values()} == set(found["types"])
    code, text, err = run("inspect", path)
    assert (code, err) == (0, "")
    assert all(tensor["name"] in text for tensor in found["tensors"])
    brief = run("inspect", path, "--no-tensors")[1]
    assert (
        found["tensors"][3]["name"] not in brief
        and f"{found['bits_per_weight']:.3f} bits per weight" in brief
    )


def test_inspect_of_a_split_model_without_its_weights_is_an_error(model, run):
    Path("m").mkdir()
    Path("m/config.json").write_text((model / "config.json").read_text())
    code, out, err = run("inspect", "m")
    assert (code, out) == (1, "") and "m:" in err


@pytest.mark.parametrize("text", [True, False])
def test_evaluate(model, quantized, run, text):
    Path("text.txt").write_text(CORPUS * 3, encoding="utf-8")
    source = ["--text", "text.txt"] if text else ["--sample", 128, "--seed", 1]
    options = ["--context", 32, "--windows", 4, "--prompts", 1]
    code, out, err = run("evaluate", model, quantized, *source, *options, "--json")
    assert (code, without_need(err)) == (0, "")
    found = json.loads(out)
    assert [row["name"] for row in found["quantized_models"]] == [quantized.name]
    assert 0 < found["quantized_models"][0]["fidelity"]["kl"][0] < 0.1
    assert found["tokens_scored"] == 4 * 15  # positions 16 to 30 of 32: each predicts the next
    code, out, err = run("evaluate", model, quantized, *source, *options, "--show")
    assert (code, without_need(err)) == (0, "") and quantized.name in out


def test_formats(run):
    code, out, err = run("formats", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    bits = {row["format"]: row["bits_per_weight"] for row in found["formats"]}
    assert bits | {"q4_k": 4.5, "q8_0": 8.5, "mxfp4": 4.25, "f16": 16.0} == bits
    assert {"q4_k_m", "iq4_xs"} <= {row["file_type"] for row in found["file_types"]}
    code, text, err = run("formats")
    assert (code, err) == (0, "") and all(name in text for name in bits)


def test_every_file_type_listed_can_be_had(model, run):
    """The model has no experts, so that mxfp4_moe is q8_0 throughout."""
    for row in json.loads(run("formats", "--json")[1])["file_types"]:
        code, out, _ = run(
            "quantize",
            model,
            "--to",
            row["file_type"],
            "--effort",
            "fast",
            "--out",
            "m.gguf",
            "--overwrite",
            "--json",
        )
        assert code == 0
        formats = {r.format.removesuffix("_ggml") for r in Receipt.from_json(out).tensors}
        assert row["default"] in formats or row["file_type"] == "mxfp4_moe"


def test_progress_is_on_stderr_only(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert (
        main(
            [
                "quantize",
                str(model),
                "--to",
                "q8_0",
                "--no-search",
                "--out",
                str(tmp_path / "m.gguf"),
                "--json",
            ]
        )
        == 0
    )
    out = capsys.readouterr()
    assert Receipt.from_json(out.out)
    assert "quantize:" in out.err and "B/s" in out.err


def test_the_module_runs_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fewbits", "inspect", "none.gguf"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    code = f"{sys.executable} -m fewbits formats | true"
    done = subprocess.run(code, shell=True, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stderr == ""
