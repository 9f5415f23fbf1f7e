"""docs/architecture.md lists what each module may import; this compares every import with it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

import fewbits

# SHA-256 of apache.org/licenses/LICENSE-2.0.txt, as ml_dtypes and onnx ship it
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fewbits"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
SMALL = ("registry", "qtensor", "table", "core", "formats", "model", "storage")
LARGE = ("torch", "numpy", "gguf", "transformers")
OUTSIDE = ("transformers", "llama_cpp", "huggingface_hub", "tokenizers", "sentencepiece")


def read_table() -> dict[str, tuple[set[str], set[str]]]:
    """module -> what it may import of ours, and of others; from the table with `may import` in its head."""
    _, _, text = (ROOT / "docs" / "architecture.md").read_text().partition("| module |")
    rows = text.split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {
        top_module(package.strip("`")): (set(ours.split()), set(others.split()))
        for package, _, ours, others in cells
    }


def top_module(module: str) -> str:
    """`formats/ggml.py`, `formats/` -> formats; `core.py` -> core."""
    return module.split("/")[0].removesuffix(".py")


MODULE_TABLE = read_table()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, but for what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from running(child)


def imports(module: str) -> tuple[set[str], set[str]]:
    """-> the packages of ours and the outside packages that a module imports, wherever in it."""
    ours, others = set(), set()
    for node in running(tree(PACKAGE / module)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (not node.level or node.module == "lazy"):
            names = [str(node.module)] if not node.level else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            at = [*Path(module).parent.parts][: 1 + len(Path(module).parent.parts) - node.level]
            inner = (
                [".".join([*at, node.module])]
                if node.module
                else [".".join([*at, a.name]) for a in node.names]
            )
            ours |= {name.split(".")[0] for name in inner}
        for name in names:
            top, _, rest = name.partition(".")
            if top == "fewbits":
                ours.add(rest.split(".")[0])
            else:
                others.add(top)
    compiled = {"_core"} if top_module(module) == "core" else set()
    return ours - {top_module(module)} - compiled, others - sys.stdlib_module_names - {"torch", "__future__"}


def test_every_module_has_a_package_and_every_package_a_module() -> None:
    assert {top_module(module) for module in MODULES} == set(MODULE_TABLE)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_package_may(module: str) -> None:
    ours, others = imports(module)
    allowed, outside = MODULE_TABLE[top_module(module)]
    assert ours <= allowed, f"{module} imports {ours - allowed}: see the table of docs/architecture.md"
    assert others <= outside, f"{module} imports {others - outside}: see the table of docs/architecture.md"


@pytest.mark.parametrize("package", MODULE_TABLE)
def test_a_package_uses_what_it_may_import_and_names_packages_above(package: str) -> None:
    used = [imports(module) for module in MODULES if top_module(module) == package]
    allowed, outside = MODULE_TABLE[package]
    assert allowed == set().union(*(ours for ours, _ in used))
    assert outside == set().union(*(others for _, others in used))
    assert allowed <= set(list(MODULE_TABLE)[: list(MODULE_TABLE).index(package)])


HOOKS = "runtime/hf_quantizer.py"


def test_few_modules_import_transformers() -> None:
    """Of ours: what runs in an engine's own process is that engine's."""
    ours = [module for module in MODULES if not module.startswith("engines/run_")]
    found = {m for m in ours if "transformers" in imports(m)[1]}
    assert found == {
        "adapters/conversion.py", "adapters/transformers.py", "runtime/decode.py", "runtime/load.py", HOOKS
    }  # fmt: skip


def test_importing_every_module_loads_no_outside_system() -> None:
    """Each is loaded by the first function that needs it: the package itself imports in a second or two.

    HOOKS is not tried: its classes derive from transformers' own, and none but register.py imports it."""
    tried = [module for module in MODULES if module not in (HOOKS, "transformers.py")]
    names = [f"fewbits.{module.removesuffix('.py').replace('/', '.')}" for module in tried]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = f"import sys, {', '.join(names)}; print(*[name for name in {OUTSIDE} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_formats_and_structure_load_nothing_large() -> None:
    """Listing formats and reading a header begin at once: torch alone takes a second or two to import."""
    names = [
        f"fewbits.{module.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"
        for module in MODULES
        if top_module(module) in SMALL
    ]
    code = (
        "import sys, types; package = sys.modules['fewbits'] = types.ModuleType('fewbits'); "
        f"package.__path__ = [{str(PACKAGE)!r}]; import {', '.join(names)}; "
        "from fewbits.formats import FORMATS; [f.bits_per_weight() for _, f in FORMATS.items()]; "
        f"print(*[name for name in {LARGE} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("module", [m for m in MODULES if top_module(m) not in ("cli", "engines")])
def test_only_the_command_line_prints(module: str) -> None:
    said = [
        ast.unparse(node)
        for node in ast.walk(tree(PACKAGE / module))
        if isinstance(node, (ast.Name, ast.Attribute))
    ]
    assert not {"print", "sys.stdout", "sys.stderr"} & set(said)


def test_public_names_are_listed_and_there() -> None:
    """`from fewbits import *`, what a type checker sees, and what is there are one list."""
    checked = {
        alias.asname or alias.name
        for node in ast.walk(tree(PACKAGE / "__init__.py"))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert sorted(fewbits.__all__) == sorted(checked) and all(hasattr(fewbits, n) for n in fewbits.__all__)


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import fewbits; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.split(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names == {"fewbits"}


@pytest.mark.parametrize("module", MODULES)
def test_text_is_read_and_written_in_a_named_encoding(module: str) -> None:
    """Else it is the system's, which is not UTF-8 everywhere."""
    for node in ast.walk(tree(PACKAGE / module)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        words = {word.arg for word in node.keywords}
        where = f"{module}:{node.lineno}"
        if name == "read_text":
            assert "encoding" in words or node.args, where
        if name == "write_text":
            assert "encoding" in words or len(node.args) > 1, where
        if name == "open" and isinstance(node.func, ast.Name) and node.func.id == "open":
            modes = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
            assert "encoding" in words or any("b" in str(mode) for mode in modes), where


def test_what_a_package_needs_besides_code_is_there() -> None:
    license = (ROOT / "LICENSE").read_text(encoding="utf-8")
    ours, theirs = "Copyright 2026 the fewbits authors", "Copyright [yyyy] [name of copyright owner]"
    assert ours in license and sha256(license.replace(ours, theirs).encode()).hexdigest() == APACHE
    assert (ROOT / "CHANGELOG.md").exists() and (PACKAGE / "py.typed").exists()


SOURCES = sorted(
    path
    for folder in ("fewbits", "csrc", "bench", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cc", ".toml")
    or (folder == "bench" and path.is_file() and not path.suffix)
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sizes_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    if path.suffix in (".h", ".cc", ".toml"):
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            where = f"{path.name}:{node.lineno} {node.name}"
            assert (node.end_lineno or 0) - node.lineno < 60, f"{where} is longer than 60 lines"
            names = [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
            if "triton.jit" in map(ast.unparse, node.decorator_list):
                continue
            assert len([name for name in names if name not in ("self", "cls")]) <= 7, (
                f"{where}: over 7 parameters"
            )


def test_documents_name_files_that_exist() -> None:
    """Every path in the table of new things, and every test named as a proof."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(
        r"`((?:tests|csrc|bench|files|formats|model|plan|adapters|engines|evaluation|cli|algorithms|workflow|release|runtime|train)/[\w/.]*)`",
        text,
    )
    homes = (ROOT, PACKAGE)
    missing = {
        name
        for name in named
        if not re.search(r"/(run_)?x(\.py)?$", name) and not any((h / name).exists() for h in homes)
    }
    assert len(named) > 30 and missing == set()


def test_importing_the_package_changes_nothing_outside_it() -> None:
    """Neither the environment, which other programs inherit, nor how torch's threads wait."""
    code = "import os; before = dict(os.environ); import fewbits; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
