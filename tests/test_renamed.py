"""Old names of options work for one version, and say what they are called now."""

import pytest

from fewbits.cli.main import main
from tests.tiny import save_tiny


def test_polish_is_distill(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny("LlamaForCausalLM", tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox " * 300)
    code = main(["quantize", str(model), "--to", "q4_0", "--polish", "5", "--tokens", "512", "--out",
                 str(tmp_path / "out.gguf"), "--calibrate", str(tmp_path / "text.txt")])  # fmt: skip
    error = capsys.readouterr().err
    assert code == 1 and "--polish is now called --distill" in error and "distill needs" in error
