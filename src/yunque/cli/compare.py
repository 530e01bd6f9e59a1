"""``yunque compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yunque import errors

if TYPE_CHECKING:
    from yunque.evaluation.comparison import Comparison

_FILE_WIDTH_CHARS = 130  # of tables where there is no terminal to fit


def compare(
    folders: Annotated[
        list[str],
        typer.Argument(
            help="Evaluations (or model folders with one in FOLDER/evaluation); the first is what the others are"
            " compared with. NAME=FOLDER names it.",
            metavar="FOLDER...",
        ),
    ],
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help="Limit that must be proved: toxicity<=+0.01 (a sign: difference to the first), toxicity<0.2 (no sign:"
            " the model's own mean), recovery>=0.95. Give several; exit 1 unless all are.",
            metavar="EXPR",
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Evaluation of the model before alignment, for recovery.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report, one self-contained page.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers.")] = None,
    error_file: Annotated[
        Path | None, typer.Option("--errors", help="Write what is wrong with single answers, as CSV.")
    ] = None,
    rank_by: Annotated[str | None, typer.Option("--rank_by", help="Metric whose change orders the answers.")] = None,
    rows: Annotated[int, typer.Option(help="Changed answers to print.")] = 5,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap and of the permutation test.")] = 10_000,
    confidence: Annotated[float, typer.Option(help="Of the intervals, two-sided.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the resamples.")] = 0,
    different_prompts: Annotated[
        bool, typer.Option("--different_prompts", help="Pair by id alone, as when comparing prompt templates.")
    ] = False,
) -> None:
    """Compare models on the same prompts, with intervals, gates and a report."""
    try:
        from yunque.evaluation import comparison, evaluations, gates
        from yunque.metrics import paired
    except ImportError as error:
        raise errors.InputError(f"yunque compare needs {error.name}; pip install 'yunque[train]'") from error
    _check_files(html, json_file, error_file)
    limits = [gates.parse_gate(text) for text in gate or ()]
    options = comparison.Options(paired.Resampling(resamples, confidence, seed), rank_by, not different_prompts)
    if len(folders) < 2:
        raise errors.InputError("compare: give at least two evaluations, the first to compare the others with")
    opened = evaluations.open_evaluations([*folders, *([base] if base else [])])
    models, before = (opened[:-1], opened[-1]) if base else (opened, None)
    result = comparison.compare(models[0], models[1:], gates=limits, base=before, options=options)
    show(result, rows)
    _write(result, html, json_file, error_file)
    unproved = result.not_proved()
    if unproved:
        raise errors.CheckFailed(f"{len(unproved)} of {len(result.verdicts)} gates not proved: {', '.join(unproved)}")


def show(result: Comparison, rows: int) -> None:
    """Print a comparison as wide as the terminal, or wide enough for all columns where there is none."""
    from rich.console import Console

    from yunque.evaluation.comparison import print_comparison

    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH_CHARS
    print_comparison(console, result, rows)


def _check_files(*paths: Path | None) -> None:
    from yunque.evaluation.writing import check_writable

    for path in paths:
        if path is not None:
            check_writable(path)


def _write(result: Comparison, html: Path | None, json_file: Path | None, error_file: Path | None) -> None:
    from yunque.evaluation import comparison, error_types, report, writing

    if json_file is not None:
        writing.write_whole(json_file, json.dumps(comparison.as_json(result), indent=2, ensure_ascii=False) + "\n")
    if error_file is not None:
        models = [result.baseline, *(each.evaluation for each in result.candidates)]
        writing.write_whole(error_file, error_types.error_table({each.name: each for each in models}))
    if html is not None:
        writing.write_whole(html, report.render([result]))
        print(f"Report: {html}")
