"""The table of a report on compressed variants: costs, quality, alignment and gates of every model in one row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from yunque.evaluation.comparison import Candidate, Comparison
from yunque.evaluation.costs import Cost, costs_of, kinds, measured
from yunque.evaluation.evaluations import Evaluation
from yunque.evaluation.gates import Verdict
from yunque.evaluation.scores import score_kind
from yunque.metrics.paired import Resampling, mean_intervals

_METRICS = {"rougeL": "ROUGE-L", "toxicity": "Toxicity", "kl": "KL"}
_SIGNS = {"passed": "✓", "failed": "✗", "inconclusive": "?"}


def variants_table(comparison: Comparison) -> dict[str, Any] | None:
    """Header and rows, the base and the baseline first; None where no model was measured in a process of its own."""
    everyone = comparison.everyone
    if not measured(everyone):
        return None
    costs = kinds(everyone)
    metrics = [name for name in _METRICS if any(name in each.scores for each in everyone)]
    header = [(cost.label, cost.unit) for cost in costs]
    header += [(_METRICS[name], score_kind(name).unit.partition(" of ")[0]) for name in metrics]
    found = {each.evaluation.name: each for each in comparison.candidates}
    rows = [_row(comparison, each, found.get(each.name), costs, metrics) for each in everyone]
    _mark_best(rows, costs)
    return {
        "header": header,
        "rows": rows,
        "baseline": comparison.baseline.name,
        "has_gates": bool(comparison.verdicts),
    }


def _row(
    comparison: Comparison, evaluation: Evaluation, candidate: Candidate | None, costs: list[Cost], metrics: list[str]
) -> dict[str, Any]:
    known, first = costs_of(evaluation), costs_of(comparison.baseline)
    cells = []
    for cost in costs:
        value, reference = known.get(cost.name), first.get(cost.name)
        share = f"{value / reference:.0%}".replace("%", " %") if value and reference and candidate else ""
        cells.append({"value": value, "shown": cost.show(value), "note": share, "best": False})
    cells += [_metric_cell(evaluation, name, comparison.options.resampling) for name in metrics]
    role = "candidate" if candidate else "baseline" if evaluation is comparison.baseline else "base"
    return {
        "name": evaluation.name,
        "role": {"baseline": "aligned", "base": "before alignment"}.get(role, ""),
        "cells": cells,
        "gates": [_gate(verdict) for verdict in candidate.verdicts] if candidate else [],
    }


def _metric_cell(evaluation: Evaluation, name: str, how: Resampling) -> dict[str, Any]:
    kind, values = score_kind(name), evaluation.scores.get(name)
    if values is None:
        return {"value": None, "shown": "-", "note": "", "best": False}
    interval = mean_intervals(values[~np.isnan(values)][:, None], how)[0]
    ends = [kind.show(end) if math.isfinite(end) else "?" for end in (interval.low, interval.high)]
    note = "" if interval.low == interval.high else f"{ends[0]} to {ends[1]}"
    return {"value": None, "shown": kind.show(interval.mean), "note": note, "best": False}


def _gate(verdict: Verdict) -> dict[str, str]:
    name = verdict.gate.metric if verdict.gate.kind != "recovery" else "recovery"
    return {"name": name, "text": verdict.gate.text, "status": verdict.status, "sign": _SIGNS[verdict.status]}


def _mark_best(rows: list[dict[str, Any]], costs: list[Cost]) -> None:
    """The cheapest of each column, where models differ."""
    for column, cost in enumerate(costs):
        cells = [row["cells"][column] for row in rows if row["cells"][column]["value"] is not None]
        if len({cell["shown"] for cell in cells}) < 2:
            continue
        pick = max if cost.name.startswith("tokens_per_s") else min
        pick(cells, key=lambda cell: cell["value"])["best"] = True
