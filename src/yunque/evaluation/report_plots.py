"""What the report draws: metrics against costs, and the training curves of every run on the road."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from yunque.artifacts import LOG
from yunque.evaluation.charts import Point, curve, pareto
from yunque.evaluation.costs import FIRST_TOKEN, costs_of, largest_batch
from yunque.evaluation.evaluations import Evaluation, settings_value
from yunque.evaluation.scores import Score, score_kind
from yunque.metrics.paired import Resampling, mean_intervals

_QUALITY = ("rougeL", "rougeLsum", "f1", "exact_match", "bleu", "format", "sentiment")
"""The first of these that all models have stands for quality."""

# key of the log -> title; the first six that a log has are drawn
_CURVES = {
    "ppo/mean_scores": "Reward per answer",
    "objective/kl": "KL to the reference (nats per answer)",
    "objective/entropy": "Entropy (nats per answer)",
    "ppo/loss/total": "Total loss",
    "ppo/loss/policy": "Policy loss",
    "ppo/loss/value": "Value loss",
    "watch/mean_scores": "Unseen scorer",
    "loss": "Training loss",
    "eval_loss": "Held-out loss",
    "rewards/accuracies": "Pairs right (share)",
    "rewards/margins": "Reward margin",
    "accuracy": "Accuracy",
    "learning_rate": "Learning rate",
}
_MAX_CURVES = 6
_MAX_NAMES = 5  # beside the points of a chart


def cost_charts(evaluations: Sequence[Evaluation], how: Resampling) -> list[Markup]:
    """Quality, toxicity and KL against bytes and time, where at least two models have both."""
    metrics = [name for name in _QUALITY if all(name in each.scores for each in evaluations)][:1]
    metrics += [name for name in ("toxicity", "kl") if sum(name in each.scores for each in evaluations) > 1]
    costs = _costs(evaluations)
    charts = []
    for name in metrics:
        columns = [
            each.scores[name][~np.isnan(each.scores[name])] if name in each.scores else None for each in evaluations
        ]
        intervals = [None if column is None else mean_intervals(column[:, None], how)[0] for column in columns]
        for label, values in costs if name != "kl" else costs[:1]:
            points = [
                Point(each.name, value, interval, _words(each.name, score_kind(name), interval, value, label), number)
                for number, (each, value, interval) in enumerate(zip(evaluations, values, intervals, strict=True))
                if value is not None and interval is not None
            ]
            if len(points) > 1:
                charts.append(_chart(score_kind(name), label, points, numbered=bool(legend(evaluations))))
    return charts


def legend(evaluations: Sequence[Evaluation]) -> list[str]:
    """The names of the models, in the order of their numbers, where they are too many to stand beside their points."""
    return [each.name for each in evaluations] if len(evaluations) > _MAX_NAMES else []


def _chart(kind: Score, label: str, points: Sequence[Point], numbered: bool) -> Markup:
    better = "higher is better" if kind.better == "higher" else "lower is better"
    title = f"{kind.label} against {label.partition(' (')[0]}"
    rises = kind.better == "higher"
    return pareto(points, title=title, x_label=label, y_label=better, higher_is_better=rises, numbered=numbered)


def _words(name: str, kind: Score, interval: Any, value: float, label: str) -> str:
    ends = f" [{kind.show(interval.low)}, {kind.show(interval.high)}]" if math.isfinite(interval.low) else ""
    return f"{name}: {kind.label} {kind.show(interval.mean)}{ends}, {label} {value:,.4g}"


def _costs(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[float | None]]]:
    """Label and value of each model; times are those of a fresh process where all were measured so."""
    known = [costs_of(each) for each in evaluations]
    costs = [("size (MB on disk)", [_scaled(each.get("bytes"), 1e6) for each in known])]
    rate = largest_batch(evaluations)
    if rate is None:
        return [*costs, ("time per token generated (ms)", [_milliseconds(each) for each in evaluations])]
    firsts = [_scaled(each.get(FIRST_TOKEN.name), FIRST_TOKEN.scale) for each in known]
    if any(value is not None for value in firsts):
        costs.append(("latency of the first token (ms)", firsts))
    batch = rate.rpartition("_")[2]
    times = [_scaled(1.0, float(each[rate] or 0.0) * 1e-3) for each in known]
    return [*costs, (f"time per token at batch {batch} (ms)", times)]


def _scaled(value: float | None, scale: float) -> float | None:
    return value / scale if value and scale else None


def _milliseconds(evaluation: Evaluation) -> float | None:
    speed = settings_value(evaluation.settings, "speed", "tokens_per_s")
    return 1000 / speed if speed else None


def training_runs(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The curves of every ancestor whose log is here, the earliest run first."""
    runs: dict[str, dict[str, Any]] = {}
    for evaluation in evaluations:
        for path, manifest, _ in evaluation.road():
            log = Path(path) / LOG
            if path in runs or manifest is None or not log.is_file():
                continue
            charts = _curves(log)
            if charts:
                runs[path] = {"stage": manifest.stage, "path": path, "created": manifest.created, "charts": charts}
    return sorted(runs.values(), key=lambda run: run["created"])


def _curves(path: Path) -> list[Markup]:
    records: dict[float, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
            records[float(record["step"])] = records.get(float(record["step"]), {}) | record
        except (ValueError, KeyError, TypeError):
            continue  # an empty line, or half of one: the report shows what can be read
    charts: list[Markup] = []
    for key, title in _CURVES.items():
        known = [(step, record[key]) for step, record in sorted(records.items()) if _is_finite(record.get(key))]
        if len(known) > 1 and len(charts) < _MAX_CURVES:
            steps, values = (np.array(column, dtype=float) for column in zip(*known, strict=True))
            charts.append(curve(steps, values, title=title, x_label="step"))
    return charts


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
