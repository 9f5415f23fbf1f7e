"""What a user waits for: help, lists and headers come without importing anything large."""

import subprocess
import sys

import pytest

from tests.tiny import save_tiny


@pytest.mark.parametrize(
    ("arguments", "kept_out"),
    [
        (["--help"], {"torch", "numpy", "gguf", "transformers", "huggingface_hub", "safetensors"}),
        (["inspect", "MODEL"], {"torch", "numpy", "gguf", "transformers", "huggingface_hub"}),
        (["formats"], {"torch", "transformers", "huggingface_hub"}),
    ],
)
def test_what_answers_at_once_imports_nothing_large(tmp_path, arguments, kept_out):
    model = save_tiny("LlamaForCausalLM", tmp_path / "m")
    arguments = [str(model) if word == "MODEL" else word for word in arguments]
    code = (
        "import sys; from fewbits.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print(*({kept_out!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout and done.stderr.split() == []
