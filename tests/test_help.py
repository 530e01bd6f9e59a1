"""The help text of every script and command."""

import runpy
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from yunque.cli import app

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("recipes", "compress", "serve", "bench")
    for path in (ROOT / folder).rglob("*.py")
)


def commands(command, names=()):
    """Names of ``command`` and of all below it."""
    yield names
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*names, name))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_prints_its_options(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    printed = capsys.readouterr()
    assert stopped.value.code in (0, None), printed.err
    assert "--help" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize("names", commands(typer.main.get_command(app)), ids=" ".join)
def test_a_command_prints_its_options(names, capsys):
    result = CliRunner().invoke(app, [*names, "--help"])
    assert result.exit_code == 0, result.output
    assert "--help" in result.output + capsys.readouterr().out
