"""What a user waits for: help, lists and headers come without importing anything large."""

import subprocess
import sys

import pytest

import fewbits
from tests.tiny import save_tiny

LARGE = {"torch", "numpy", "gguf", "transformers", "huggingface_hub", "safetensors"}
# The name of an output -> how it is made; `inspect` reads headers, and small arrays that say what is held.
WRITTEN = {
    "native": {"to": "int4_g32"},
    "compressed": {"to": "int4_g32", "file": "compressed-tensors"},
    "gptq": {"to": "int4_g32", "file": "gptq"},
    "gptq-order": {"to": "int4_g32_actorder", "file": "gptq"},
    "awq": {"to": "int4_g32_asym", "file": "awq"},
    "mlx": {"to": "int4_g32", "file": "mlx"},
    "fp8": {"to": "fp8_e4m3_block128", "file": "fp8"},
    "bitsandbytes": {"to": "nf4_dq", "file": "bitsandbytes"},
    "bitsandbytes-int8": {"to": "int8_absmax", "file": "bitsandbytes"},
    "model.gguf": {"to": "q4_0"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of the same model in every kind of file that is inspected by its header alone."""
    folder = tmp_path_factory.mktemp("models")
    model = save_tiny("LlamaForCausalLM", folder / "float")
    for name, asked in WRITTEN.items():
        fewbits.quantize(model, folder / name, effort="fast", verify=False, **asked)
    return folder


@pytest.mark.parametrize(
    "arguments", [["--help"], ["formats"], *(["inspect", name] for name in ("float", *WRITTEN))], ids=" ".join
)
def test_what_answers_at_once_imports_nothing_large(models, arguments):
    arguments = [str(models / word) if word in ("float", *WRITTEN) else word for word in arguments]
    code = (
        "import sys; from fewbits.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print(*({LARGE!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout and done.stderr.split() == []


def test_rounding_to_nearest_does_not_import_torchs_compiler(models, tmp_path):
    """`torch.compiler.disable` imports it, and that takes as long as the rest."""
    command = ["quantize", str(models / "float"), "--to", "q4_0", "--effort", "fast", "--no-verify"]
    code = (
        "import sys; from fewbits.cli.main import main\n"
        f"main({[*command, '--out', str(tmp_path / 'x.gguf')]!r})\n"
        "print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True False"
