"""docs/formats.md says what the layouts say, and what it calls exact is."""

import json
import re
from pathlib import Path

import pytest

from fewbits.cli.formats import markdown, support, support_of, verified
from fewbits.cli.main import main
from fewbits.engines import ENGINES
from fewbits.files.open import FILE_TYPES
from fewbits.formats import FORMATS

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"


ROWS = json.loads((PAGE.parent / "format_support.json").read_text())["rows"]


@pytest.fixture(scope="module")
def found():
    return support()


def test_the_page_is_what_the_command_prints(found):
    part = re.search(r"<!-- fewbits formats --support -->\n(.*?)\n<!-- /", PAGE.read_text(), re.DOTALL)
    assert part is not None and part[1].strip() == markdown(found), "run `fewbits formats --support` again"


def test_the_classic_conversions_are_lossless(found):
    assert found["int4_g32"]["gguf"] == "as q4_0" and found["q4_0"]["gptq"] == "as int4_g32"
    assert found["int4_g32_asym"]["gguf"] == "as q4_1?"
    assert (
        found["mxfp4"]["gguf"] == "as mxfp4_ggml" and found["mxfp4_ggml"]["compressed-tensors"] == "as mxfp4"
    )
    assert found["nf4"]["bitsandbytes"] == found["nf4"]["native"] == "yes"
    assert {"awq", "gptq_v2", "compressed-tensors", "mlx"} <= set(found["int4_g64_asym"])


def test_the_command_prints_it(capsys):
    assert main(["formats", "--support"]) == 0
    assert capsys.readouterr().out.startswith("| format | gguf |")


def test_the_page_shows_what_the_bench_recorded():
    part = re.search(r"<!-- bench/format_support -->\n(.*?)\n<!-- /", PAGE.read_text(), re.DOTALL)
    assert part is not None and part[1].strip() == verified(ROWS), "run `bench/format_support --record` again"


def test_no_recorded_row_is_red_and_each_is_carried(found):
    """A format that a file type lost, or a file type that is new, needs a run of bench/format_support."""
    assert {row["verdict"] for row in ROWS} <= {"same", "read", "refused"}
    rows = [
        row for row in ROWS if row["verdict"] == "same" and "activations rounded" not in str(row["reason"])
    ]
    wide = [
        row["row"]
        for row in rows
        if row["kl"] >= ENGINES[row["engine"]].tolerance_for({row["file"], row["format"]})
    ]
    assert not wide
    assert all(row["reason"] for row in ROWS if row["verdict"] == "refused")
    # The demo model has no rows in whole blocks of fp8: tests/files/test_fp8.py tries that one.
    assert {row["file"] for row in ROWS} == set(FILE_TYPES) - {"huggingface", "fp8"}
    ways = {row["format"]: found.get(row["format"]) or support_of(FORMATS.get(row["format"])) for row in ROWS}
    assert all(row["file"] in ways[row["format"]] for row in ROWS)
