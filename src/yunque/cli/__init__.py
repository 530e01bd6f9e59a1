"""The ``yunque`` command, one module per subcommand: each parses its arguments and calls the library."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, NoReturn

import typer

from yunque import __version__, errors
from yunque.cli import data, rehearse, scripts
from yunque.cli.compare import compare
from yunque.cli.doctor import doctor
from yunque.cli.evaluate import SETTINGS, evaluate
from yunque.cli.generate import chat, generate
from yunque.cli.matrix import matrix
from yunque.cli.plan import plan
from yunque.cli.serve import SETTINGS as SERVE_SETTINGS
from yunque.cli.serve import serve
from yunque.cli.show import show

# Typer keeps click's exceptions to itself in its newer versions; this is click's UsageError in all of them.
_UsageError = typer.BadParameter.__mro__[1]

app = typer.Typer(help="From fine-tuning through alignment to a compressed model in production.")
for _command in (show, generate, chat, plan, doctor, compare, matrix):
    app.command()(_command)
app.command(context_settings=SETTINGS)(evaluate)
app.command(context_settings=SERVE_SETTINGS)(serve)
app.command(context_settings=rehearse.CONTEXT)(rehearse.rehearse)
app.add_typer(data.app, name="data")
app.command()(scripts.init)
for _name, _script in scripts.script_commands().items():
    app.command(
        _name,
        cls=scripts.ScriptCommand,
        context_settings=scripts.SETTINGS,
        rich_help_panel="Train, compress, export",
    )(_script)


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
