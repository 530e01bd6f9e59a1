"""Models compared on the same prompts: every metric's paired difference to the first model, gates, changed answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from yunque.errors import InputError
from yunque.evaluation.costs import costs_of, kinds, measured
from yunque.evaluation.evaluations import Evaluation, align
from yunque.evaluation.gates import Gate, Verdict, check_gates, judge
from yunque.evaluation.scores import in_order, score_kind
from yunque.metrics.paired import DEFAULT, Difference, Resampling, paired_differences

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCHEMA = 1
_CELL_CHARS = 110  # of a text in a printed table
_HEADER_CHARS = 16  # of a model's name above its column
_WIDE_CHARS = 110  # of a terminal that has room for all columns


@dataclass(frozen=True)
class Options:
    """How intervals are made; ``rank_by`` is the metric whose change orders the answers."""

    resampling: Resampling = DEFAULT
    rank_by: str | None = None
    same_prompts: bool = True


@dataclass(frozen=True)
class Candidate:
    """A model against the baseline: differences by metric, verdicts by gate, rows by change (largest first)."""

    evaluation: Evaluation
    differences: dict[str, Difference]
    verdicts: list[Verdict]
    rank_by: str
    changed: list[int]

    @property
    def same(self) -> list[str]:
        """Metrics that are equal on all pairs."""
        return [name for name, one in self.differences.items() if one.ties == one.num_pairs]


@dataclass(frozen=True)
class Comparison:
    """The baseline, the candidates, aligned to its rows, and what a reader should know."""

    baseline: Evaluation
    candidates: list[Candidate]
    base: Evaluation | None
    options: Options
    notes: list[str]

    @property
    def verdicts(self) -> list[tuple[Candidate, Verdict]]:
        """Of all candidates, in order."""
        return [(candidate, verdict) for candidate in self.candidates for verdict in candidate.verdicts]

    @property
    def everyone(self) -> list[Evaluation]:
        """The base, if any, the baseline and the candidates."""
        base = [self.base] if self.base else []
        return [*base, self.baseline, *(each.evaluation for each in self.candidates)]

    def not_proved(self) -> list[str]:
        """The gates that have not passed, a few words each."""
        return [
            f"{each.evaluation.name} {verdict.gate.text} ({verdict.status})"
            for each, verdict in self.verdicts
            if verdict.status != "passed"
        ]


def compare(
    baseline: Evaluation,
    candidates: Sequence[Evaluation],
    *,
    gates: Sequence[Gate] = (),
    base: Evaluation | None = None,
    options: Options | None = None,
) -> Comparison:
    """Compare each candidate with the baseline, whose rows all of them must have.

    ``base`` is the model before alignment, for gates on recovery.

    Raises:
        InputError: no candidate, other rows or prompts, no common metric, a gate that cannot be judged.
    """
    options = options or Options()
    if not candidates:
        raise InputError("compare: give at least two evaluations")
    baseline = _with_own_divergence(baseline, candidates)
    if base is not None:
        base = align(baseline, base, same_prompts=options.same_prompts)
        _check_judges(baseline, base)
    compared = [_candidate(baseline, each, gates, base, options) for each in candidates]
    notes = [note for each in (baseline, *(one.evaluation for one in compared)) for note in _notes(each)]
    notes += [note for each in compared for note in _pair_notes(baseline, each)]
    return Comparison(baseline, compared, base, options, notes)


def _candidate(
    baseline: Evaluation, candidate: Evaluation, gates: Sequence[Gate], base: Evaluation | None, options: Options
) -> Candidate:
    candidate = align(baseline, candidate, same_prompts=options.same_prompts)
    _check_judges(baseline, candidate)
    gaps = {name: candidate.scores[name] - baseline.scores[name] for name in in_order(_common(baseline, candidate))}
    gaps = {name: values for name, values in gaps.items() if not np.isnan(values).all()}
    if not gaps:
        raise InputError(f"{candidate.name} and {baseline.name} have no metric in common; evaluate both alike")
    check_gates(gates, baseline, candidate, base)
    differences = paired_differences(gaps, options.resampling)
    intervals = {name: one.interval for name, one in differences.items()}
    verdicts = [judge(gate, baseline, candidate, base, intervals, options.resampling) for gate in gates]
    rank_by = options.rank_by or next(iter(gaps))
    if rank_by not in gaps:
        raise InputError(f"--rank_by {rank_by}: there is no such metric; there are: {', '.join(gaps)}")
    size = np.nan_to_num(np.abs(gaps[rank_by]), nan=-1.0)
    other = np.array([text != theirs for text, theirs in zip(candidate.answers, baseline.answers, strict=True)])
    changed = [int(row) for row in np.argsort(-size, kind="stable") if other[row]]
    return Candidate(candidate, differences, verdicts, rank_by, changed)


def _with_own_divergence(baseline: Evaluation, candidates: Sequence[Evaluation]) -> Evaluation:
    """The baseline with a KL of 0, where it is the model that the candidates' KL was measured from."""
    own = baseline.settings["model"]
    digest = own.get("manifest_sha256")
    for candidate in candidates:
        aligned = candidate.settings.get("kl_model")
        if "kl" in baseline.scores or not aligned:
            continue
        known = digest and aligned.get("manifest_sha256")
        if (aligned["manifest_sha256"] == digest) if known else (aligned["path"] == own.get("path")):
            return replace(baseline, scores={**baseline.scores, "kl": np.zeros(len(baseline.ids))})
    return baseline


def _common(first: Evaluation, second: Evaluation) -> set[str]:
    return {name for name in first.scores if name in second.scores}


def _notes(evaluation: Evaluation) -> list[str]:
    notes = [f"{evaluation.name}: {note}" for note in evaluation.settings.get("notes") or ()]
    empty = sum(not answer.strip() for answer in evaluation.answers)
    if empty:
        notes.append(f"{evaluation.name}: {empty:,} of {len(evaluation.answers):,} answers are empty")
    if evaluation.changed_since():
        notes.append(f"{evaluation.name}: the model folder has changed since it was evaluated; evaluate it again")
    return notes


def _decoding(evaluation: Evaluation) -> dict[str, Any]:
    return {name: value for name, value in (evaluation.settings.get("decoding") or {}).items() if name != "batch_size"}


def _check_judges(first: Evaluation, second: Evaluation) -> None:
    _check_aligned(first, second)
    judges = [each.settings.get("toxicity_model") or {} for each in (first, second)]
    if "toxicity" not in _common(first, second) or not all(judges):
        return
    known = all(judge.get("manifest_sha256") for judge in judges)
    one, other = ((judge.get("manifest_sha256" if known else "path"), judge.get("label")) for judge in judges)
    if one != other:
        names = (f"{judge.get('path')} (label {judge.get('label')})" for judge in judges)
        raise InputError(
            f"{second.name} and {first.name} were judged by different classifiers, {' and '.join(names)}; evaluate both"
            " with the same --toxicity_model_name_or_path and --toxicity_label"
        )


def _check_aligned(first: Evaluation, second: Evaluation) -> None:
    """The KL of both must be from the same model, be that the baseline itself."""
    if "kl" not in _common(first, second):
        return
    models = [each.settings.get("kl_model") or first.settings["model"] for each in (first, second)]
    known = all(model.get("manifest_sha256") for model in models)
    one, other = (model.get("manifest_sha256" if known else "path") for model in models)
    if one != other:
        names = " and ".join(str(model.get("path")) for model in models)
        raise InputError(
            f"{second.name} and {first.name} have their KL from different models, {names}; evaluate both with the same"
            " --kl_model_name_or_path"
        )


def _pair_notes(baseline: Evaluation, candidate: Candidate) -> list[str]:
    ours, notes = candidate.evaluation, []
    for name in in_order(set(baseline.scores) ^ set(ours.scores)):
        has = baseline.name if name in baseline.scores else ours.name
        notes.append(f"{name} was measured of {has} only and is left out of {baseline.name} against {ours.name}")
    for name in candidate.differences:
        lost = np.count_nonzero(np.isnan(ours.scores[name]) != np.isnan(baseline.scores[name]))
        if lost:
            notes.append(f"{name}: {lost:,} rows that only one of {baseline.name} and {ours.name} has are left out")
    if _decoding(baseline) != _decoding(ours):
        notes.append(f"{ours.name} was decoded with other settings than {baseline.name}: the differences hold both")
    if not candidate.changed:
        notes.append(f"{ours.name} gave the same answers as {baseline.name} to all {len(ours.ids):,} prompts")
    return notes


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison for a machine; unknown ends of intervals are null."""
    how = comparison.options.resampling
    return {
        "schema": SCHEMA,
        "passed": not comparison.not_proved() if comparison.verdicts else None,
        "settings": {"resamples": how.resamples, "confidence": how.confidence, "seed": how.seed},
        "num_pairs": len(comparison.baseline.ids),
        "baseline": _model_json(comparison.baseline),
        "base": _model_json(comparison.base) if comparison.base else None,
        "candidates": [_candidate_json(comparison.baseline, each) for each in comparison.candidates],
        "notes": comparison.notes,
    }


def _model_json(evaluation: Evaluation) -> dict[str, Any]:
    means = {name: float(np.nanmean(evaluation.scores[name])) for name in in_order(set(evaluation.scores))}
    return {
        "name": evaluation.name,
        "evaluation": str(evaluation.folder),
        "model": evaluation.settings["model"],
        "means": means,
        "speed": evaluation.settings.get("speed"),
        "costs": costs_of(evaluation),
    }


def _candidate_json(baseline: Evaluation, candidate: Candidate) -> dict[str, Any]:
    ours = candidate.evaluation
    metrics = {}
    for name, one in candidate.differences.items():
        valid = ~np.isnan(ours.scores[name] - baseline.scores[name])
        metrics[name] = {
            "unit": score_kind(name).unit,
            "better": score_kind(name).better,
            "num_pairs": one.num_pairs,
            "baseline": float(baseline.scores[name][valid].mean()),
            "candidate": float(ours.scores[name][valid].mean()),
            "difference": one.interval.as_dict(),
            "std": one.std if math.isfinite(one.std) else None,
            "p_value": one.p_value,
            "wins": one.wins,
            "ties": one.ties,
            "losses": one.losses,
            "win_rate": one.win_rate.as_dict(),
            "effect_size": one.effect_size,
            "needed_pairs": one.needed_pairs,
        }
    gates = [verdict.as_dict() for verdict in candidate.verdicts]
    return {**_model_json(ours), "metrics": metrics, "gates": gates, "changed_answers": len(candidate.changed)}


def better_wins(name: str, one: Difference) -> tuple[int, int, int]:
    """Pairs won, tied and lost by the candidate, where lower scores may be the better ones."""
    if score_kind(name).better == "lower":
        return one.losses, one.ties, one.wins
    return one.wins, one.ties, one.losses


def print_comparison(console: Console, comparison: Comparison, rows: int = 5) -> None:
    """Print a table per candidate, its ``rows`` most changed answers, its gates, and the notes."""
    from rich.text import Text

    if measured(comparison.everyone):
        console.print(_costs_table(comparison))
    for candidate in comparison.candidates:
        console.print(_metrics_table(comparison, candidate, short=console.width < _WIDE_CHARS))
        if rows > 0 and candidate.changed:
            console.print(_changed_table(comparison.baseline, candidate, rows))
        for verdict in candidate.verdicts:
            console.print(Text(f"gate {verdict}"), soft_wrap=True)
    for note in comparison.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def _metrics_table(comparison: Comparison, candidate: Candidate, short: bool) -> Table:
    """The metrics that differ on any pair; a ``short`` table leaves out p-values, wins and effect sizes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    baseline, ours = comparison.baseline, candidate.evaluation
    confidence = f"{comparison.options.resampling.confidence * 100:g} %"
    same = candidate.same
    table = Table(
        title=f"{ours.name} against {baseline.name}: {len(ours.ids):,} pairs",
        caption=f"Equal on all pairs: {', '.join(same)}" if same else None,
        box=box.SIMPLE_HEAD,
    )
    table.add_column("Metric", no_wrap=True)
    headers = [_tail(baseline.name), _tail(ours.name), f"Difference [{confidence}]", "Needed"]
    headers += [] if short else ["p", "Won/tied/lost", "Effect"]
    for header in headers:
        table.add_column(Text(header), justify="right", no_wrap=True)
    for name in candidate.differences:
        if name not in same:
            table.add_row(*map(Text, _table_row(name, baseline, candidate)[: len(headers) + 1]))
    return table


def _costs_table(comparison: Comparison) -> Table:
    """A row per model: what it costs, and how many of its gates passed."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    everyone = comparison.everyone
    costs = kinds(everyone)
    verdicts = {each.evaluation.name: each.verdicts for each in comparison.candidates}
    table = Table(title="Costs, each model in a fresh process", box=box.SIMPLE_HEAD)
    table.add_column("Model", overflow="fold")
    for cost in costs:
        table.add_column(f"{cost.label}\n{cost.unit}", justify="right", no_wrap=True)
    table.add_column("Gates\npassed", justify="right", no_wrap=True)
    for each in everyone:
        known, judged = costs_of(each), verdicts.get(each.name)
        passed = sum(verdict.status == "passed" for verdict in judged or ())
        gates = f"{passed}/{len(judged)}" if judged else "-"
        table.add_row(Text(each.name), *(cost.show(known.get(cost.name)) for cost in costs), gates)
    return table


def _tail(name: str) -> str:
    return name if len(name) <= _HEADER_CHARS else f"…{name[1 - _HEADER_CHARS :]}"


def _table_row(name: str, baseline: Evaluation, candidate: Candidate) -> list[str]:
    kind, one = score_kind(name), candidate.differences[name]
    valid = ~np.isnan(candidate.evaluation.scores[name] - baseline.scores[name])
    return [
        kind.label + {"lower": " ↓", "higher": " ↑", None: ""}[kind.better],
        kind.show(float(baseline.scores[name][valid].mean())),
        kind.show(float(candidate.evaluation.scores[name][valid].mean())),
        show_interval(name, one),
        "-" if one.needed_pairs is None else f"{one.needed_pairs:,}",
        f"{one.p_value:.4f}",
        "/".join(map(str, better_wins(name, one))),
        "-" if one.effect_size is None else f"{one.effect_size:+.2f}",
    ]


def show_interval(name: str, one: Difference) -> str:
    """+0.012 [-0.003, +0.027]."""
    kind, interval = score_kind(name), one.interval
    ends = (kind.show(end, sign=True) if math.isfinite(end) else "?" for end in (interval.low, interval.high))
    return f"{kind.show(interval.mean, sign=True)} [{', '.join(ends)}]"


def _changed_table(baseline: Evaluation, candidate: Candidate, rows: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    kind, ours = score_kind(candidate.rank_by), candidate.evaluation
    title = f"The most changed of {len(candidate.changed):,} changed answers, by {kind.label.lower()}"
    table = Table(title=title, box=box.SIMPLE_HEAD, leading=1)
    for header in ("Id", "Prompt", baseline.name, ours.name):
        table.add_column(Text(header), ratio=None if header == "Id" else 1, overflow="fold")
    table.add_column(Text(kind.label), justify="right", no_wrap=True)
    for row in candidate.changed[:rows]:
        texts = (ours.ids[row], _shorten(ours.prompts[row], end=True), baseline.answers[row], ours.answers[row])
        values = (each.scores[candidate.rank_by][row] for each in (baseline, ours))
        shown = "\n→ ".join("-" if math.isnan(value) else kind.show(value) for value in values)
        table.add_row(*(Text(_shorten(text)) for text in texts), shown)  # Text: brackets in it are not markup
    return table


def _shorten(text: str, end: bool = False) -> str:
    """``text`` on one line, without control characters, cut with an ellipsis; ``end`` keeps a prompt's last words."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if len(line) <= _CELL_CHARS:
        return line
    return f"…{line[1 - _CELL_CHARS :].lstrip()}" if end else f"{line[: _CELL_CHARS - 1].rstrip()}…"
