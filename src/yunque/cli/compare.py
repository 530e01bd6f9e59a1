"""``yunque compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from yunque import errors

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
        import rich.console

        from yunque.evaluation import comparison, error_types, evaluations, gates, writing
        from yunque.metrics import paired
    except ImportError as error:
        raise errors.InputError(f"yunque compare needs {error.name}; pip install 'yunque[train]'") from error
    for path in (html, json_file, error_file):
        if path is not None:
            writing.check_writable(path)
    limits = [gates.parse_gate(text) for text in gate or ()]
    if len(folders) < 2:
        raise errors.InputError("compare: give at least two evaluations, the first to compare the others with")
    opened = evaluations.open_evaluations([*folders, *([base] if base else [])])
    models, before = (opened[:-1], opened[-1]) if base else (opened, None)
    baseline, *candidates = models
    options = comparison.Options(paired.Resampling(resamples, confidence, seed), rank_by, not different_prompts)
    result = comparison.compare(baseline, candidates, gates=limits, base=before, options=options)
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH_CHARS
    comparison.print_comparison(console, result, rows)
    if json_file is not None:
        writing.write_whole(json_file, json.dumps(comparison.as_json(result), indent=2, ensure_ascii=False) + "\n")
    if error_file is not None:
        writing.write_whole(error_file, error_types.error_table({each.name: each for each in models}))
    if html is not None:
        from yunque.evaluation import report

        writing.write_whole(html, report.render([result]))
        print(f"Report: {html}")
    unproved = result.not_proved()
    if unproved:
        raise errors.CheckFailed(f"{len(unproved)} of {len(result.verdicts)} gates not proved: {', '.join(unproved)}")
