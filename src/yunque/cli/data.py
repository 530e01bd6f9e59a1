"""``yunque data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from yunque import errors

app = typer.Typer(help="Look at data before training on it.")


@app.command()
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


@app.callback()
def _group() -> None:
    """Keeps ``stats`` a command of its own name while it is the only one."""
