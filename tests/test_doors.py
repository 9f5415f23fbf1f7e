"""docs/formats.md says what the layouts say, and what it calls exact is."""

import re
from pathlib import Path

import pytest

from fewbits.cli.formats import doors, markdown
from fewbits.cli.main import main

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"


@pytest.fixture(scope="module")
def found():
    return doors()


def test_the_page_is_what_the_command_prints(found):
    part = re.search(r"<!-- fewbits formats --doors -->\n(.*?)\n<!-- /", PAGE.read_text(), re.DOTALL)
    assert part is not None and part[1].strip() == markdown(found), "run `fewbits formats --doors` again"


def test_the_classic_doors_are_open(found):
    assert found["int4_g32"]["gguf"] == "as q4_0" and found["q4_0"]["gptq"] == "as int4_g32"
    assert found["int4_g32_asym"]["gguf"] == "as q4_1?"
    assert (
        found["mxfp4"]["gguf"] == "as mxfp4_ggml" and found["mxfp4_ggml"]["compressed-tensors"] == "as mxfp4"
    )
    assert found["nf4"]["bitsandbytes"] == found["nf4"]["native"] == "itself"
    assert {"awq", "gptq_v2", "compressed-tensors", "mlx"} <= set(found["int4_g64_asym"])


def test_the_command_prints_it(capsys):
    assert main(["formats", "--doors"]) == 0
    assert capsys.readouterr().out.startswith("| format | gguf |")
