"""Options as they are combined, and their old names, which work for one version and say the new ones."""

import pytest

from fewbits.cli.main import main
from fewbits.errors import PlanError
from fewbits.plan.method import Method
from fewbits.workflow.options import Options
from tests.tiny import save_tiny


def test_polish_is_distill(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny("LlamaForCausalLM", tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox " * 300)
    code = main(["quantize", str(model), "--to", "q4_0", "--polish", "5", "--tokens", "512", "--out",
                 str(tmp_path / "out.gguf"), "--calibrate", str(tmp_path / "text.txt")])  # fmt: skip
    error = capsys.readouterr().err
    assert code == 1 and "--polish is now called --distill" in error
    assert "distill: 1 windows are too few" in error


def test_options_add_to_an_effort():
    from fewbits.cli.main import parser
    from fewbits.cli.options import options_of
    from fewbits.plan.method import EFFORTS, METHODS

    def method(*arguments: str):
        return options_of(parser().parse_args(["quantize", "m", "--to", "q4_0", *arguments])).chosen_method()

    assert method() == EFFORTS["good"] and method("--effort", "best") == EFFORTS["best"]
    assert method("--method", "gptq") == METHODS["gptq"] and method("--no-search") == EFFORTS["fast"]
    assert method("--effort", "best", "--awq", "--rotate").transforms == ("rotate", "awq")
    assert method("--smooth", "0.5").transform_options == {"alpha": 0.5}
    assert method("--smooth").transforms == ("smooth",) and method("--distill", "7").distill == 7
    with pytest.raises(PlanError, match="give one of them"):
        method("--effort", "fast", "--method", "gptq")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "much", "1e999"])
@pytest.mark.parametrize(
    "command",
    [
        ["quantize", "m", "--memory"],
        ["quantize", "m", "--verify-memory"],
        ["quantize", "m", "--activation-memory"],
        ["evaluate", "m", "q", "--memory"],
        ["verify", "m", "--memory"],
        ["convert", "m", "--to", "gguf", "--verify-memory"],
        ["plan", "m", "--memory"],
    ],
    ids=" ".join,
)
def test_what_is_no_amount_of_memory_is_wrong_usage(
    command, value, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command[:-1], f"{command[-1]}={value}"])
    assert ended.value.code == 2 and f"{value!r} is not an amount of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["int8_channel", "--activations", "int9"], "unknown activation scheme 'int9'; known: fp8_dynamic"),
        (
            ["int4_g32", "--method", "ecsq"],
            "ecsq takes integers of 8 bits with one scale a row, not int4_g32",
        ),
        (
            ["q4_k_m", "--method", "ecsq"],
            "ecsq takes a format of integers, int8_channel, not the mixture q4_k_m",
        ),
        (["int8_channel", "--method", "ecsq", "--sparsity", "0.5"], "leave sparsity out"),
        (["int4_g32", "--prune", "wanda"], "prune wanda needs a sparsity, such as 0.5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, capsys, more, said) -> None:
    model = save_tiny("LlamaForCausalLM", tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox " * 300)
    run = ["--calibrate", str(tmp_path / "text.txt"), "--tokens", "512", "--out", str(tmp_path / "out")]
    assert main(["quantize", str(model), *run, "--to", *more]) == 1
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_an_adapter_for_packed_weights_takes_no_option_of_quantizing(tmp_path, capsys) -> None:
    run = ["train", str(tmp_path), "--lora", "4", "--calibrate", "a.txt", "--sparsity", "0.5", "--awq"]
    assert main(run) == 1
    assert "--awq, --sparsity: how a float model is quantized before" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["convert", "model", "out.gguf"], ["verify", "model"]], ids=" ".join)
def test_a_device_that_is_not_there_is_refused_first(tmp_path, monkeypatch, capsys, command) -> None:
    save_tiny("LlamaForCausalLM", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--device", "nonsense"]) == 1
    assert "device 'nonsense': torch knows no such device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("training", "fault"),
    [({"loss": "huber"}, "loss is 'huber'; known: kl"), ({"rate": 1.0}, "training has no setting 'rate'")],
)
def test_settings_of_a_method_made_in_python_are_checked_like_options(training, fault):
    method = Method("gptq", sequential=True, train=3, train_options=training)
    for given in (Options(to="q4_0", method=method), Options(to="q4_0", train=3, training=training)):
        with pytest.raises(PlanError, match=fault):
            given.chosen_method()
