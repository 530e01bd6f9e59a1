"""The ``yunque`` command: parses its arguments and calls the library."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from yunque import __version__, artifacts, errors

# Typer keeps click's exceptions to itself in its newer versions; this is click's UsageError in all of them.
_UsageError = typer.BadParameter.__mro__[1]

app = typer.Typer(add_completion=False, help="From fine-tuning through alignment to a compressed model in production.")


def main() -> NoReturn:
    """Run the command line and leave with the project's exit codes."""
    errors.run(_run)


def _run() -> None:
    try:
        app(standalone_mode=False)
    except typer.Abort:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, _UsageError):
            raise errors.InputError(f"{str(error).rstrip('.')}; see yunque --help") from error
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"yunque {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="A model folder written by yunque.", metavar="FOLDER")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Recheck the hashes of all files.")] = False,
) -> None:
    """Print what a model folder is and the chain of its parents."""
    problems = artifacts.verify(folder) if verify else None
    print(artifacts.to_json(folder, problems) if as_json else artifacts.describe(folder))
    if problems:
        raise errors.CheckFailed(f"{folder}: {'; '.join(problems)}")
    if verify and not as_json:
        print("  verified          all files are as they were saved")
