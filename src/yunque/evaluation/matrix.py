"""Experiment matrix: axes of a YAML expanded to evaluations, the finished ones skipped, compared in one report."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from yunque.artifacts import MANIFEST, sha256_bytes, sha256_file
from yunque.errors import InputError, Stopped
from yunque.evaluation.comparison import Comparison, Options, compare
from yunque.evaluation.error_types import ErrorRules
from yunque.evaluation.evaluations import EVALUATION, Evaluation, NoAnswers, read_evaluation
from yunque.evaluation.gates import Gate, parse_gate
from yunque.evaluation.scores import in_order, score_kind

# axis -> option of yunque evaluate that a plain text on it sets
AXES = {"model": "model_name_or_path", "prompt": "prompt_template", "context": "dataset_name", "decoding": None}
_KEYS = ("axes", "evaluate", "baseline", "base", "gates", "errors")
_OWN = ("output_dir", "resume", "overwrite_output_dir", "config")
"""Options of an evaluation that the matrix sets itself."""

_RUNS = "runs"


@dataclass(frozen=True)
class Run:
    """One evaluation: its value on each axis, its options, and the folder named by the hash of all it depends on."""

    values: dict[str, str]
    options: dict[str, Any]
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether its evaluation is there."""
        return (self.folder / EVALUATION).is_file()

    def name(self, axes: Sequence[str]) -> str:
        """Its values on ``axes``."""
        return " ".join(self.values[axis] for axis in axes)


@dataclass(frozen=True)
class Matrix:
    """The runs in order, the axes that have more than one value, and how runs are compared."""

    runs: list[Run]
    varied: list[str]
    baseline: dict[str, str]
    base: dict[str, str] | None
    gates: list[Gate]
    rules: ErrorRules


def read_matrix(path: Path, output_dir: Path) -> Matrix:
    """Read and expand the YAML file.

    Raises:
        InputError: unreadable, unknown keys or axes, options given twice, a value that is on no axis.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("axes"), dict):
        raise InputError(f"{path}: give a mapping with axes: {', '.join(AXES)}")
    _refuse_unknown(path, "key", content, _KEYS)
    _refuse_unknown(path, "axis", content["axes"], tuple(AXES))
    axes = {name: _axis(path, name, content["axes"][name]) for name in AXES if name in content["axes"]}
    if "model" not in axes:
        raise InputError(f"{path}: axes: give at least the axis model")
    common = content.get("evaluate") or {}
    _check_options(path, "evaluate", common)
    varied = [name for name, values in axes.items() if len(values) > 1]
    runs = []
    for names in itertools.product(*axes.values()):
        values = dict(zip(axes, names, strict=True))
        options = _merged(path, common, {axis: axes[axis][name] for axis, name in values.items()})
        runs.append(Run(values, options, output_dir / _RUNS / _folder_name(values, varied, options)))
    return Matrix(
        runs,
        varied,
        _selection(path, "baseline", content.get("baseline") or {}, axes),
        None if content.get("base") is None else _selection(path, "base", content["base"], axes),
        [parse_gate(str(text)) for text in content.get("gates") or ()],
        _rules(path, content.get("errors") or {}),
    )


def run_matrix(matrix: Matrix, evaluate: Callable[[Run], None], say: Callable[[str], None]) -> None:
    """Evaluate what is not finished, by ``evaluate``, in order.

    Raises:
        InputError: what a run says, with the run's name before it; the finished ones are kept.
        Stopped: a signal came during a run.
    """
    for number, run in enumerate(matrix.runs, 1):
        name = label(matrix, run)
        state = "finished before" if run.finished else "evaluating"
        say(f"run {number} of {len(matrix.runs)}: {name}: {state}")
        if run.finished:
            continue
        try:
            evaluate(run)
        except Stopped as error:
            raise Stopped(f"{name}: {error}; the same command goes on") from error
        except InputError as error:
            raise InputError(f"run {name}: {error}") from error


def label(matrix: Matrix, run: Run) -> str:
    """The run's values on the axes that vary, or its model."""
    return run.name(matrix.varied) or run.values["model"]


def evaluations_of(matrix: Matrix) -> tuple[dict[str, Evaluation], list[str]]:
    """The evaluations by the labels of their runs, and a line for each run that answered nothing."""
    found: dict[str, Evaluation] = {}
    silent = []
    for run in matrix.runs:
        name = label(matrix, run)
        try:
            found[name] = read_evaluation(run.folder, name)
        except NoAnswers as error:
            silent.append(f"run {name} is left out: {error}")
    return found, silent


def compare_runs(matrix: Matrix, evaluations: Mapping[str, Evaluation], options: Options) -> dict[str, Comparison]:
    """One comparison per context with at least two runs, by the context's name: all its runs against its baseline.

    Raises:
        InputError: as ``compare``; the baseline or the base answered nothing.
    """
    by_context: dict[str, list[Run]] = {}
    for run in matrix.runs:
        by_context.setdefault(run.values.get("context", ""), []).append(run)
    options = replace(options, same_prompts="prompt" not in matrix.varied)
    comparisons = {}
    for context, runs in by_context.items():
        first = label(matrix, _pick(runs, matrix.baseline))
        base = None if matrix.base is None else label(matrix, _pick(runs, matrix.base))
        for key, name in (("baseline", first), ("base", base)):
            if name is not None and name not in evaluations:
                raise InputError(f"{key}: run {name} answered nothing; choose another {key}")
        names = [label(matrix, run) for run in runs]
        others = [evaluations[name] for name in names if name not in (first, base) and name in evaluations]
        if others:
            before = None if base is None else evaluations[base]
            found = compare(evaluations[first], others, gates=matrix.gates, base=before, options=options)
            comparisons[context] = found
    return comparisons


def _pick(runs: Sequence[Run], wanted: Mapping[str, str]) -> Run:
    """The first of the runs of a context with the wanted values."""
    axes = {axis: value for axis, value in wanted.items() if axis != "context"}
    return next(run for run in runs if axes.items() <= run.values.items())


def overview(matrix: Matrix, evaluations: Mapping[str, Evaluation], metrics: int = 8) -> dict[str, Any]:
    """A table: each run's values on the ``axes`` that vary (their number) and its first metrics; header and rows."""
    names = in_order(set.intersection(*(set(each.scores) for each in evaluations.values())))[:metrics]
    axes = matrix.varied or ["model"]
    rows = []
    for run in matrix.runs:
        evaluation = evaluations.get(label(matrix, run))
        means = [_mean(evaluation, name) if evaluation else "-" for name in names]
        rows.append([*(run.values[axis] for axis in axes), *means])
    header = [*axes, *(score_kind(name).label for name in names)]
    return {"axes": len(axes), "header": header, "rows": rows}


def _mean(evaluation: Evaluation, name: str) -> str:
    return score_kind(name).show(float(np.nanmean(evaluation.scores[name])))


# --- reading ----------------------------------------------------------------------------------------------------------


def _refuse_unknown(path: Path, what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        raise InputError(f"{path}: unknown {what} {', '.join(unknown)}; there are: {', '.join(known)}")


def _axis(path: Path, axis: str, given: Any) -> dict[str, dict[str, Any]]:
    """The axis' values as options of an evaluation, by name."""
    named = {_short(value): value for value in given} if isinstance(given, list) else given
    if not isinstance(named, dict) or not named or (isinstance(given, list) and len(named) < len(given)):
        raise InputError(f"{path}: axes: {axis}: give names with values, or a list of different values")
    options = {}
    for name, value in named.items():
        if isinstance(value, str) and AXES[axis]:
            value = {AXES[axis]: value}
        if not isinstance(value, dict):
            plain = f"a text for {AXES[axis]}, or " if AXES[axis] else ""
            raise InputError(f"{path}: axes: {axis}: {name}: give {plain}a mapping of evaluate's options")
        _check_options(path, f"axes: {axis}: {name}", value)
        options[str(name)] = value
    return options


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in value.items())
    return Path(str(value)).name or str(value)


def _check_options(path: Path, where: str, options: Any) -> None:
    if not isinstance(options, dict):
        raise InputError(f"{path}: {where}: give a mapping of evaluate's options")
    own = [name for name in options if name in _OWN]
    if own:
        raise InputError(f"{path}: {where}: {own[0]} is set by the matrix itself; leave it out")


def _merged(path: Path, common: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    merged, source = dict(common), dict.fromkeys(common, "evaluate")
    for axis, options in parts.items():
        for name, value in options.items():
            if name in merged:
                raise InputError(f"{path}: {name} is given by {source[name]} and by axis {axis}; give it once")
            merged[name], source[name] = value, f"axis {axis}"
    return merged


def _selection(path: Path, key: str, given: Any, axes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    given = {"model": given} if isinstance(given, str) else given
    if not isinstance(given, dict):
        raise InputError(f"{path}: {key}: give a model's name, or axis: name")
    for axis, name in given.items():
        if name not in axes.get(axis, {}):
            raise InputError(f"{path}: {key}: {name} is not on axis {axis}; there are: {', '.join(axes.get(axis, {}))}")
    return {str(axis): str(name) for axis, name in given.items()}


def _rules(path: Path, given: Any) -> ErrorRules:
    if not isinstance(given, dict):
        raise InputError(f"{path}: errors: give limits by metric")
    _refuse_unknown(path, "key of errors", given, [each.name for each in fields(ErrorRules)])
    return ErrorRules(**given)


# --- identity ---------------------------------------------------------------------------------------------------------


def _folder_name(values: Mapping[str, str], varied: Sequence[str], options: Mapping[str, Any]) -> str:
    label = "-".join(values[axis] for axis in varied) or values["model"]
    safe = "".join(char if char.isalnum() or char in "._" else "-" for char in label)[:60]
    return f"{safe}-{_digest(options)[:12]}"


def _digest(options: Mapping[str, Any]) -> str:
    """Hash of the options and of the files they name: a model saved anew or data that changed is another run."""
    files = {name: _content(value) for name, value in options.items() if isinstance(value, str)}
    resolved = {"options": dict(options), "files": {name: value for name, value in files.items() if value}}
    return sha256_bytes(json.dumps(resolved, sort_keys=True, default=str).encode())


def _content(name: str) -> str | None:
    """What tells the file or folder from another under the same name: a manifest, a hash, or names, sizes, times."""
    try:
        path = Path(name)
        if path.is_file():
            return sha256_file(path)
        if not path.is_dir():
            return None
    except OSError:  # a prompt template is no path: too long, or with a zero byte
        return None
    if (path / MANIFEST).is_file():
        return sha256_file(path / MANIFEST)
    stats = [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in sorted(path.iterdir())]
    return sha256_bytes(json.dumps(stats).encode())
