"""The house rules of DESIGN and STYLE that a test can hold up."""

import ast
import functools
import graphlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "yunque"
RUNNABLE = ("recipes", "compress", "serve", "bench")
FOLDERS = {".ci", "bench", "compress", "docs", "launch", "recipes", "serve", "slurm", "src", "tests"}

FLOORS = (
    *("errors", "packaged", "arguments", "provenance", "artifacts", "runtime", "serving", "metrics", "data", "models"),
    *("distributed", "rl", "compression", "export", "evaluation", "compat", "pipeline", "cli", "__main__"),
)
"""The library's rooms, lowest first: a room imports only from lower ones."""

FORBIDDEN = {"compression": "yunque.rl"}
"""What a room never imports although its floor would allow it."""

HEAVY = {"datasets", "numpy", "onnxruntime", "pandas", "torch", "transformers", "trl"}

TORCH_FREE = ("errors", "provenance", "artifacts", "runtime", "serving")
"""Rooms that run without torch and its kin, and so must everything that they import, and what that imports in turn."""

TORCH_AND_KIN = {"accelerate", "datasets", "onnx", "peft", "safetensors", "torch", "transformers", "trl"}

CODE = {".css", ".html", ".js", ".py", ".sbatch", ".sh"}

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500
MAX_SCRIPT_LINES = 250


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path, *, for_types: bool = True) -> set[str]:
    """Absolute names of the modules `path` imports anywhere, `from yunque import a` counted as `yunque.a`.

    Without `for_types`, what stands under `if TYPE_CHECKING` is left out: it never runs.
    """
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    blocks = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    hidden = set() if for_types else {inner for block in blocks for inner in ast.walk(block)}
    modules = set()
    for node in set(nodes) - hidden:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def code_files() -> list[Path]:
    """Programs in any language, and their pages."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in files if path.suffix in CODE or (path.parent.name == ".ci" and not path.suffix))


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


@functools.cache
def library() -> dict[str, set[str]]:
    """What each module of the library imports when it runs, by its dotted name; its own package is no import."""
    found = {}
    for path in python_files("src"):
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        imported = imported_modules(path, for_types=False) - {name}
        found[name] = {module for module in imported if not name.startswith(f"{module}.")}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_every_room_has_a_floor():
    assert {room_of(path) for path in python_files("src")} - {"__init__"} == set(FLOORS)


def test_the_floors_are_the_document_s():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("## Rooms")[2].partition("\n## ")[0]
    rooms = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert rooms == [room for room in FLOORS if room != "__main__"]


@pytest.mark.parametrize("path", python_files("src"), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_come_from_lower_floors(path):
    room = room_of(path)
    lower = set(FLOORS[: FLOORS.index(room)]) if room != "__init__" else set()
    modules = imported_modules(path)
    rooms = {module.split(".")[1] for module in modules if module.startswith("yunque.")} & set(FLOORS)
    assert rooms <= lower | {room}
    assert not [module for module in modules if room in FORBIDDEN and module.startswith(FORBIDDEN[room])]


def test_no_module_imports_itself_in_a_circle():
    modules = library()
    graphlib.TopologicalSorter({name: imported & modules.keys() for name, imported in modules.items()}).prepare()


def test_torch_is_out_of_reach_of_what_runs_without_it():
    modules, rooms = library(), tuple(f"yunque.{room}" for room in TORCH_FREE)
    imports = modules | {str(path): imported_modules(path) for path in python_files("serve")}
    todo = [name for name in imports if name.startswith(rooms) or name not in modules]
    reached = set()
    while todo:
        if (name := todo.pop()) not in reached:
            reached.add(name)
            todo += imports[name] & modules.keys()
            assert not TORCH_AND_KIN & {module.partition(".")[0] for module in imports[name]}, name


def test_no_script_imports_another():
    scripts = python_files(*RUNNABLE)
    names = {*RUNNABLE, *(path.stem for path in scripts)}
    for path in scripts:
        assert not names & {module.partition(".")[0] for module in imported_modules(path)}, path


def test_no_script_hides_a_library():
    # Python puts a script's folder first on the path: compress/onnx.py would be what `import onnx` finds.
    # tests/pipeline, a folder of the tests' own path, is no library: it has no file.
    specs = {path: importlib.util.find_spec(path.stem) for path in python_files(*RUNNABLE)}
    assert not [path for path, spec in specs.items() if spec is not None and spec.origin is not None]


def test_runnable_folders_are_not_packages():
    assert not [path for path in python_files(*RUNNABLE) if path.name == "__init__.py"]


@pytest.mark.parametrize("module", ["yunque", "yunque.errors", "yunque.artifacts", "yunque.cli"])
def test_import_is_cheap(module):
    code = f"import sys, {module}; print(*{HEAVY!r} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip()


@pytest.mark.parametrize("path", code_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    is_script = path.parent in (ROOT / "recipes", ROOT / "compress") and path.suffix == ".py"
    assert len(text.splitlines()) <= (MAX_SCRIPT_LINES if is_script else MAX_FILE_LINES)
    if path.suffix != ".py":
        return
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    # a recipe's main is the flow to read, from top to bottom (STYLE, rule 4)
    functions = [node for node in nodes if not (is_script and node.name == "main")]
    assert not {node.name: lines for node in functions if (lines := num_lines(node)) > MAX_FUNCTION_LINES}


def test_top_level_folders_are_the_design_s():
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    folders = {name.partition("/")[0] for name in done.stdout.splitlines() if "/" in name}
    assert folders <= FOLDERS
