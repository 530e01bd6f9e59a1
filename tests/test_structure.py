"""The house rules of DESIGN and STYLE that a test can hold up."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "yunque"
RUNNABLE = ("recipes", "compress", "serve", "bench")
FOLDERS = {".ci", "bench", "compress", "docs", "launch", "recipes", "serve", "slurm", "src", "tests"}

FLOORS = (
    *("errors", "arguments", "provenance", "artifacts", "runtime", "serving", "metrics", "data", "models"),
    *("distributed", "rl", "compression", "export", "evaluation", "compat", "pipeline", "cli", "__main__"),
)
"""The library's rooms, lowest first: a room imports only from lower ones."""

FORBIDDEN = {"runtime": {"torch", "transformers"}, "serving": {"torch", "transformers"}, "compression": {"yunque.rl"}}
"""What a room never imports although its floor would allow it."""

HEAVY = {"datasets", "numpy", "onnxruntime", "pandas", "torch", "transformers", "trl"}

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Absolute names of the modules `path` imports anywhere, `from yunque import a` counted as `yunque.a`."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_every_room_has_a_floor():
    assert {room_of(path) for path in python_files("src")} - {"__init__"} <= set(FLOORS)


@pytest.mark.parametrize("path", python_files("src"), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_come_from_lower_floors(path):
    room = room_of(path)
    lower = set(FLOORS[: FLOORS.index(room)]) if room != "__init__" else set()
    modules = imported_modules(path)
    rooms = {module.split(".")[1] for module in modules if module.startswith("yunque.")} & set(FLOORS)
    assert rooms <= lower | {room}
    forbidden = FORBIDDEN.get(room, set())
    assert not [module for module in modules if any(f"{module}.".startswith(f"{name}.") for name in forbidden)]


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


@pytest.mark.parametrize(
    "path", python_files("src", *RUNNABLE, "tests", "docs"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    if path.parent.name in (
        "recipes",
        "compress",
    ):  # a recipe's main is the flow to read, from top to bottom (STYLE, rule 4)
        functions = [function for function in functions if function.name != "main"]
    long = {node.name: lines for node in functions if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES}
    assert not long


def test_top_level_folders_are_the_design_s():
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    folders = {name.partition("/")[0] for name in done.stdout.splitlines() if "/" in name}
    assert folders <= FOLDERS
