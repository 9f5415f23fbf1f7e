"""What `fewbits plan` says of vLLM's formats is what vLLM's own reader of configs says (`make vllm`).

The reader answers in its own process, once for all: config.json of every format in every file type, as the
layouts write it, and the arrays' names.
"""

import json
import subprocess

import pytest

from fewbits.dtypes import BF16
from fewbits.engines import ENGINES, SCRIPTS
from fewbits.errors import FormatError, PlanError
from fewbits.files.open import FILE_TYPES
from fewbits.formats import FORMATS
from fewbits.preflight.engines import Seen, verdicts
from fewbits.release.verify import verify
from fewbits.workflow.request import Request
from fewbits.workflow.run import run as quantize
from tests.tiny import save_tiny

PYTHON = ENGINES["vLLM"].interpreter()
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed: `make vllm`"),
]
FILES = ("gptq", "gptq_v2", "awq", "compressed-tensors", "fp8")
NAMES = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
SHAPE = (256, 256)
PLANES = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")
ASK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import parse_vllm
found = {}
for name, (config, keys) in json.load(sys.stdin).items():
    try:
        found[name] = [True, parse_vllm.reading(config, keys)]
    except (ValueError, NotImplementedError) as error:
        found[name] = [False, str(error)]
print(json.dumps(found))
"""


def configs():
    found = {}
    for file in FILES:
        for name in FORMATS:
            layout = FILE_TYPES.get(file)
            if layout.refusal(FORMATS.get(name)) is not None:
                continue
            try:
                keys = [a.key for n in NAMES for a in layout.arrays(n, FORMATS.get(name), SHAPE)]
                said = layout.settings(
                    dict.fromkeys(NAMES, (FORMATS.get(name), SHAPE)), {"model_type": "llama"}, {}
                )
            except (FormatError, PlanError):
                continue
            found[f"{file} {name}"] = said["config.json"]["quantization_config"], keys
    return found


@pytest.fixture(scope="module")
def read():
    asked = {
        case: (
            config,
            [key for key in keys if key.split(".")[-1] in PLANES],
        )
        for case, (config, keys) in configs().items()
    }
    done = subprocess.run(
        [PYTHON, "-c", ASK, str(SCRIPTS)], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", configs())
def test_the_plan_says_what_the_reader_says(read, case):
    file, name = case.split()
    output = Seen(
        file=file, engines=FILE_TYPES.get(file).engines, method=FILE_TYPES.get(file).method,
        config={"model_type": "llama"}, gguf="llama", kinds=frozenset({FORMATS.get(name), BF16}),
    )  # fmt: skip
    verdict = next(row for row in verdicts(output, {"vllm": "0.33.0"}) if row.engine == "vLLM")
    taken, why = read[case]
    assert (verdict.loads is None) == taken, why


def test_verify_tells_what_takes_the_weights(tmp_path):
    source = save_tiny("LlamaForCausalLM", tmp_path / "m")
    for file, kind, said in (
        ("compressed-tensors", "int4_g32", "CompressedTensorsWNA16 for 8 layers"),
        ("compressed-tensors", "fp8_e4m3_channel", "CompressedTensorsW8A16Fp8 for 8 layers"),
        ("gptq", "int4_g32", "AutoGPTQConfig of uint4b8, group size 32"),
        ("awq", "int4_g32", "AutoAWQConfig of uint4, group size 32"),
    ):
        quantize(source, tmp_path / f"{file}{kind}", Request(to=kind, file=file))
        outcome = verify(tmp_path / f"{file}{kind}", engine="vllm")
        assert (outcome.verdict, outcome.reason) == ("read", said)
    quantize(source, tmp_path / "int3", Request(to="int3_g64", file="gptq"))
    outcome = verify(tmp_path / "int3", engine="vllm")
    assert outcome.verdict == "refused" and "bits=3" in outcome.line()
