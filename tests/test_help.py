"""Every script and every `yunque` command says with --help what it takes, asked in this process."""

import ast
import contextlib
import io
import runpy
import sys
from dataclasses import dataclass, field, fields

import generate_reference
import pytest
import typer
from documents import ROOT

from yunque import arguments
from yunque.cli import app
from yunque.serving.settings import ServerSettings

SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("bench", "compress", "recipes", "serve")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
]


def commands(command, words=()):
    """All (sub)commands as words."""
    yield words
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*words, name))


def help_of(program, argv):
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", [*argv, "--help"])
        patch.setenv("COLUMNS", "200")
        patch.chdir(ROOT)
        with pytest.raises(SystemExit) as left:
            program()
    assert not left.value.code, f"{argv}: {said.getvalue()}"
    return said.getvalue()


def written_options(path):
    """Options that a script adds itself, read from its source."""
    calls = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Call)]
    added = [node for node in calls if getattr(node.func, "attr", "") == "add_argument"]
    added = [node for node in added if "SUPPRESS" not in ast.unparse(node)]
    texts = [part.value for node in added for part in node.args if isinstance(part, ast.Constant)]
    return {text for text in texts if isinstance(text, str) and text.startswith("--")}


@pytest.fixture(scope="module")
def dataclass_options():
    return {
        script.name: {f"--{each.name}" for group in script.groups for each in fields(group) if each.init}
        for script in generate_reference.scripts()
    }


@pytest.mark.parametrize("path", SCRIPTS)
def test_scripts(path, dataclass_options):
    expected = dataclass_options.get(path, {"--help"}) | written_options(path)
    if path == "serve/server.py":
        expected = {f"--{name}" for name in ServerSettings.model_fields if name != "models"}
    shown = help_of(lambda: runpy.run_path(str(ROOT / path), run_name="__main__"), [path])
    assert {option for option in expected if option not in shown} == set()


@pytest.mark.parametrize("words", commands(typer.main.get_command(app)), ids=" ".join)
def test_commands(words, dataclass_options):
    shown = help_of(lambda: app([*words, "--help"]), ["yunque", *words])
    expected = {"evaluate": dataclass_options["yunque evaluate"], "serve": {"--port"}}.get(" ".join(words), {"--help"})
    assert {option for option in expected if option not in shown} == set()


def test_percent_signs_stand_for_themselves(capsys):
    @dataclass
    class Options:
        share: float = field(default=0.5, metadata={"help": "5 % of 10% or 20%% slower"})

    with pytest.raises(SystemExit):
        arguments.parse(Options, argv=["--help"])
    assert "5 % of 10% or 20% slower (default: 0.5)" in capsys.readouterr().out
