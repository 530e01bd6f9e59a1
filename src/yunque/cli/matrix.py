"""``yunque matrix``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yunque import errors

if TYPE_CHECKING:
    from yunque.evaluation.matrix import Matrix, Run


def matrix(
    file: Annotated[Path, typer.Argument(help="YAML with axes, evaluate, gates (docs/compare.md).", metavar="FILE")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder of the runs, the report and errors.csv.")],
    resamples: Annotated[int, typer.Option(help="Of the bootstrap and of the permutation test.")] = 10_000,
    confidence: Annotated[float, typer.Option(help="Of the intervals, two-sided.")] = 0.95,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Check and list the runs; evaluate nothing.")] = False,
) -> None:
    """Evaluate every combination of models, prompts, contexts and decoding, but the finished ones, and compare."""
    try:
        from yunque.evaluation import comparison
        from yunque.evaluation import matrix as matrices
        from yunque.metrics import paired
    except ImportError as error:
        raise errors.InputError(f"yunque matrix needs {error.name}; pip install 'yunque[train]'") from error
    found = matrices.read_matrix(file, output_dir)
    how = paired.Resampling(resamples, confidence)
    arguments = {run.folder: _parse(file, run) for run in found.runs}
    is_main = os.environ.get("RANK", "0") == "0"  # all ranks of a launch evaluate, one reports

    def say(line: str) -> None:
        if is_main:
            print(line, flush=True)

    if dry_run:
        for run in found.runs:
            state = "finished" if run.finished else "to do"
            say(f"{matrices.label(found, run)}: {state}: {run.folder}")
        return

    def evaluate(run: Run) -> None:
        from yunque.evaluation.evaluate import evaluate as run_evaluation

        groups, argv = arguments[run.folder]
        run_evaluation(*groups, argv=argv)

    matrices.run_matrix(found, evaluate, say)
    if is_main:
        _report(found, output_dir, comparison.Options(how))


def _parse(file: Path, run: Run) -> tuple[tuple[Any, ...], list[str]]:
    """The run's options through evaluate's own parser, so that every combination is checked before the first starts."""
    from yunque.arguments import parse
    from yunque.evaluation import arguments
    from yunque.evaluation.settings import expand

    argv = []
    given = {name: value for name, value in run.options.items() if value is not None}
    for name, value in {**given, "output_dir": run.folder, "resume": True}.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    groups = (
        arguments.EvaluatedModelArguments,
        arguments.HeldOutArguments,
        arguments.DecodingArguments,
        arguments.EvaluationArguments,
    )
    label = " ".join(run.values.values())
    try:
        parsed = parse(*groups, argv=argv)
        if len(expand(parsed[2])) > 1:
            raise errors.InputError("several decoding settings in one run; give each its own name on axis decoding")
    except errors.InputError as error:
        raise errors.InputError(f"{file}: run {label}: {error}") from error
    return parsed, argv


def _report(found: Matrix, output_dir: Path, options: Any) -> None:
    from yunque.cli.compare import show
    from yunque.evaluation import comparison, error_types, report, writing
    from yunque.evaluation import matrix as matrices

    evaluations, silent = matrices.evaluations_of(found)
    writing.write_whole(output_dir / "errors.csv", error_types.error_table(evaluations, found.rules))
    results = matrices.compare_runs(found, evaluations, options)
    numbers: dict[str, Any] = {
        "runs": [{"values": run.values, "folder": str(run.folder), "options": run.options} for run in found.runs],
        "errors": error_types.count_errors(list(evaluations.values()), found.rules),
        "comparisons": {},
    }
    for context, result in results.items():
        show(result, rows=0)
        numbers["comparisons"][context] = comparison.as_json(result)
    text = json.dumps(numbers, indent=2, ensure_ascii=False, default=str) + "\n"
    writing.write_whole(output_dir / "comparison.json", text)
    for line in silent:
        print(line)
    print(f"Errors: {output_dir / 'errors.csv'}")
    if not results:
        print("No context has two runs: there is nothing to compare")
        return
    page = report.render(
        list(results.values()),
        title="Experiment matrix",
        names=[name or "all" for name in results],
        overview=matrices.overview(found, evaluations),
    )
    writing.write_whole(output_dir / "report.html", page)
    print(f"Report: {output_dir / 'report.html'}")
    verdicts = [verdict for result in results.values() for verdict in result.verdicts]
    unproved = [line for result in results.values() for line in result.not_proved()]
    if unproved:
        raise errors.CheckFailed(f"{len(unproved)} of {len(verdicts)} gates not proved: {', '.join(unproved)}")
