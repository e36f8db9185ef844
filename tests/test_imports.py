"""The house keeps its order: imports go one way, names say what a file holds, files stay small."""

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "shoal"
EMPTY_WORDS = {"util", "utils", "helper", "helpers", "manager", "common", "misc"}
MOST_LINES = 450


def folders_in_order(design: str) -> list[str]:
    """The names at the left of the block under "## The folders": each imports only from those above it."""
    block = design.split("## The folders")[1].split("```")[1]
    return re.findall(r"^(\w+)/?\s", block, flags=re.MULTILINE)


ORDER = folders_in_order((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Full names of the shoal modules that a source text imports anywhere: functions and TYPE_CHECKING included."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield base
            if base == "shoal":
                yield from (f"shoal.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from (str(name.value) for name in node.args if isinstance(name, ast.Constant))


def folder_of(module: str) -> str | None:
    """ "shoal.data.idx" -> "data"; None for what is not in a folder of the list, the package itself among it."""
    parts = module.split(".")
    return parts[1] if parts[0] == "shoal" and len(parts) > 1 and parts[1] in ORDER else None


def against_the_order(source: str, module: str, is_package: bool = False) -> list[str]:
    own = folder_of(module)
    if own is None:
        return []
    found = {target: folder_of(target) for target in imported_modules(source, module, is_package)}
    return [target for target, folder in found.items() if folder and ORDER.index(folder) > ORDER.index(own)]


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_imports_go_one_way_down_the_list_in_the_design():
    wrong = {}
    for file in sources():
        found = against_the_order(file.read_text(encoding="utf-8"), module_name(file), file.name == "__init__.py")
        if found:
            wrong[module_name(file)] = found
    assert not wrong, f"these modules import from folders below their own: {wrong}"


@pytest.mark.parametrize(
    "planted",
    [
        "import shoal.cli.main",
        "from shoal.train.api import train",
        "from shoal import cli",
        "def f():\n    from shoal.train import api",
        "if TYPE_CHECKING:\n    from shoal.observe import report",
        "from ..train import api",
        "from ..train.api import train",
        "importlib.import_module('shoal.prove.api')",
    ],
)
def test_an_import_against_the_order_is_caught_wherever_it_stands(planted):
    assert against_the_order(planted, "shoal.data.source")
    assert not against_the_order(planted.replace("train", "recipe"), "shoal.cli.other")


def test_every_folder_of_the_package_is_in_the_list_of_the_design():
    here = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert here == {name for name in ORDER if name != "errors"}


def test_no_module_has_a_name_that_says_nothing():
    assert not [file for file in sources() if EMPTY_WORDS & set(file.stem.split("_"))]


def test_no_file_of_the_package_is_long():
    files = [file for file in PACKAGE.rglob("*") if file.suffix in (".py", ".js", ".css", ".html", ".toml")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert not {file: lines for file, lines in lengths.items() if lines > MOST_LINES}


@pytest.mark.parametrize(
    "program",
    [
        "import shoal",
        "import shoal.cli.main as m; assert m.main(['--help']) == 0",
        "import shoal.cli.main as m; assert m.main(['train', '--help']) == 0",
        "import shoal.cli.main as m; assert m.main(['train', '--explain']) == 0",
    ],
)
def test_the_first_second_goes_without_torch(program):
    start = time.perf_counter()
    heavy = "assert not {'torch', 'numpy', 'rich', 'transformers'} & set(sys.modules), 'something heavy was imported'"
    command = [sys.executable, "-c", f"import sys; {program}; {heavy}"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    print(f"{program!r} took {time.perf_counter() - start:.2f} s")
