"""llama.cpp's own converter: a Hugging Face directory -> a float GGUF of each architecture that it knows.

$FEWBITS_CACHE/converter/bin/python     its environment, by `make converter`; or FEWBITS_CONVERTER=PYTHON
$FEWBITS_CACHE/converter/llama.cpp      convert_hf_to_gguf.py, conversion/, gguf-py/
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import ModelError
from ..storage.cache import cache_folder

SCRIPT = Path(__file__).with_name("run_converter.py")
INSTALL = "`make converter` installs llama.cpp's own converter, which knows many more"
_ROW = re.compile(r'^    "(\w+)": "\w+",', re.MULTILINE)


def interpreter() -> Path:
    """The Python of its environment; it need not exist."""
    return Path(os.environ.get("FEWBITS_CONVERTER") or cache_folder() / "converter" / "bin" / "python")


def _folder() -> Path:
    return interpreter().parent.parent / "llama.cpp"


def converted_architectures() -> frozenset[str]:
    """The architectures of language models that it converts; none where it is not installed."""
    table = _folder() / "conversion" / "__init__.py"
    if not (interpreter().exists() and table.is_file()):
        return frozenset()
    text, _, _ = table.read_text(encoding="utf-8").partition("MMPROJ_MODEL_MAP")
    return frozenset(_ROW.findall(text))


def check_converts(config: Mapping[str, Any]) -> None:
    """ModelError for an architecture that neither we nor the installed converter write."""
    known, names = converted_architectures(), config.get("architectures") or []
    if any(name in known for name in names):
        return
    name = ", ".join(names) or "(config.json names no architecture)"
    fault = (
        f"llama.cpp's converter does not know it either; its {len(known)} architectures: "
        f"{interpreter()} {_folder() / 'convert_hf_to_gguf.py'} --print-supported-models"
        if known
        else INSTALL
    )
    raise ModelError(
        f"{name}: GGUF export does not know this architecture; {fault}. The native directory holds any "
        "architecture: write that instead (--file native)"
    )


def ran(command: Sequence[str], folder: Path) -> tuple[int, str]:
    """Run the converter's Python in `folder`, offline -> its exit code and what it wrote to stderr."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    variables.pop("PYTHONPATH", None)
    done = subprocess.run(command, check=False, capture_output=True, env=variables, cwd=folder)
    return done.returncode, done.stderr.decode(errors="replace")


def convert_float(model: Path, config: dict[str, Any], out: Path, dtype: str, pre: str | None) -> None:
    """The directory `model` -> the GGUF file `out`, weights in `dtype` (f32, f16 or bf16).

    config: what it reads for config.json. pre: of its tokenizer, where the converter does not know it.
    ModelError with the converter's last line.
    """
    partial = out.with_name(out.name + ".partial")
    with TemporaryDirectory(dir=out.parent, prefix="model-") as name:
        folder = Path(name).resolve() / model.resolve().name
        folder.mkdir()
        for path in model.iterdir():
            (folder / path.name).symlink_to(path.resolve())
        (folder / "config.json").unlink(missing_ok=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        options = ["--outtype", dtype, "--outfile", str(partial.resolve()), str(folder)]
        command = [str(interpreter()), str(SCRIPT), str(_folder().resolve()), pre or "", *options]
        code, said = ran(command, out.parent)
    if code or not partial.exists():
        partial.unlink(missing_ok=True)
        lines = [line for line in said.splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if not line.startswith(" ")), "no output")
        raise ModelError(
            f"{model}: llama.cpp's converter fails: {last}. The native directory holds any architecture: "
            "write that instead (--file native)"
        )
    partial.rename(out)
