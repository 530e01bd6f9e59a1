"""The ``yunque`` command: parses its arguments and calls the library."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from yunque import __version__, artifacts, errors

# Typer keeps click's exceptions to itself in its newer versions; this is click's UsageError in all of them.
_UsageError = typer.BadParameter.__mro__[1]

app = typer.Typer(add_completion=False, help="From fine-tuning through alignment to a compressed model in production.")
data_app = typer.Typer(help="Look at data before training on it.")
app.add_typer(data_app, name="data")


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


@data_app.command()
def stats(
    sources: Annotated[
        list[str], typer.Argument(help="Files (.jsonl, .json, .csv, .gz), folders or hub ids.", metavar="FILE...")
    ],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id of the tokenizer.")],
    field: Annotated[list[str] | None, typer.Option(help="Column to count; by default all columns of texts.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of classes, to count by.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt with columns (or {text}) in braces; give several to compare.")
    ] = None,
    limit: Annotated[list[int] | None, typer.Option(help="Lengths to cut at; by default 512, 1024 and 2048.")] = None,
    near: Annotated[
        float, typer.Option(help="Share of common 5-word shingles of near-duplicates; 0 skips them.")
    ] = 0.8,
    dataset_config: Annotated[str | None, typer.Option(help="Configuration of a hub data set.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write histograms of the lengths to this PNG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count rows, tokens, truncation, classes and duplicates of data."""
    try:
        from yunque.data import statistics
    except ImportError as error:
        raise errors.InputError(f"yunque data stats needs {error.name}; pip install 'yunque[train]'") from error
    options = statistics.StatisticsOptions(
        fields=field or (),
        label=label,
        templates=template or (),
        near_threshold=near,
        plot=plot,
        limits=limit or statistics.LIMITS,
    )
    raws = statistics.open_splits(sources, dataset_config)
    result, counts = statistics.statistics(raws, statistics.load_tokenizer(tokenizer), options)
    if plot is not None:
        statistics.plot(counts, options.limits, plot)
    print(json.dumps(statistics.as_json(result), indent=2) if as_json else statistics.describe(result))
