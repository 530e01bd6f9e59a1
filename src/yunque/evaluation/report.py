"""The report: one self-contained HTML page of one or several comparisons, that asks the network for nothing.

Answers, prompts and names are text that others wrote: the template escapes all of it, the data block holds no "<",
and the page's own policy lets no script run but the one whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from yunque import __version__
from yunque.artifacts import Ancestor
from yunque.evaluation.before_after import common_start
from yunque.evaluation.charts import interval_bar
from yunque.evaluation.comparison import Candidate, Comparison, better_wins, show_interval
from yunque.evaluation.evaluations import Evaluation, settings_value
from yunque.evaluation.gates import Verdict
from yunque.evaluation.report_plots import cost_charts, legend, training_runs
from yunque.evaluation.scores import score_kind
from yunque.evaluation.variants import variants_table
from yunque.metrics.bootstrap import Interval
from yunque.metrics.paired import Difference

_PAGE = Path(__file__).with_name("page")
_SIGNS = {"passed": "✓", "failed": "✗", "inconclusive": "?"}
_NONE = "-"
_MAX_FACTS = 8  # of a step on the road


def render(
    comparisons: Sequence[Comparison],
    *,
    title: str | None = None,
    names: Sequence[str] = (),
    overview: Mapping[str, Any] | None = None,
) -> str:
    """The page of at least one comparison; ``names`` tells several apart, ``overview`` is a table of them."""
    first = comparisons[0]
    names = list(names) or [_default_name(each) for each in comparisons]
    evaluations = _unique(each for comparison in comparisons for each in comparison.everyone)
    style, script = ((_PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    how = first.options.resampling
    rows = len(first.baseline.ids)
    page = environment.get_template("report.html").render(
        version=__version__,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        title=title or _default_name(first),
        subtitle=f"{_data(first.baseline)}, {rows:,} prompts, {len(evaluations)} models",
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        overview=overview,
        verdict=_verdict(comparisons),
        has_gates=any(each.verdicts for each in comparisons),
        percent=f"{how.confidence * 100:g} %",
        one_sided=f"{(1 - how.confidence) * 50:.3g} %",
        resamples=f"{how.resamples:,}",
        gates=[_gate(each.evaluation.name, verdict) for one in comparisons for each, verdict in one.verdicts],
        tables=[_table(one, each) for one in comparisons for each in one.candidates],
        notes=list(dict.fromkeys(note for each in comparisons for note in each.notes)),
        variants=[table for table in (variants_table(each) for each in comparisons) if table],
        charts=[each for each in map(_charts, comparisons) if each["charts"]],
        roads=[_road(each) for each in _unique_models(evaluations)],
        curves=training_runs(evaluations),
        commands=[_reproduction(each) for each in evaluations],
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        answers=Markup(_data_block([_answers(*each) for each in zip(comparisons, names, strict=True)])),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be written


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _default_name(comparison: Comparison) -> str:
    return f"{', '.join(each.evaluation.name for each in comparison.candidates)} against {comparison.baseline.name}"


def _unique(evaluations: Any) -> list[Evaluation]:
    return list({each.folder: each for each in evaluations}.values())


def _unique_models(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    return list({each.model_path: each for each in evaluations}.values())


def _verdict(comparisons: Sequence[Comparison]) -> dict[str, str]:
    verdicts = [verdict for each in comparisons for _, verdict in each.verdicts]
    passed = sum(verdict.status == "passed" for verdict in verdicts)
    if not verdicts:
        return {"status": "", "sign": "", "text": "No gates were set"}
    if passed == len(verdicts):
        text = f"All {passed} gates passed" if passed > 1 else "The gate passed"
        return {"status": "passed", "sign": _SIGNS["passed"], "text": text}
    failed = sum(verdict.status == "failed" for verdict in verdicts)
    parts = [f"{passed} of {len(verdicts)} gates passed", f"{failed} failed" if failed else ""]
    open_ones = len(verdicts) - passed - failed
    parts.append(f"{open_ones} inconclusive" if open_ones else "")
    status = "failed" if failed else "inconclusive"
    return {"status": status, "sign": _SIGNS[status], "text": ", ".join(part for part in parts if part)}


def _gate(model: str, verdict: Verdict) -> dict[str, Any]:
    gate, interval, chance = verdict.gate, verdict.interval, verdict.chance_unchanged
    kind = score_kind(gate.metric)

    def show(value: float) -> str:
        return "?" if not math.isfinite(value) else kind.show(value, sign=gate.kind == "difference")

    return {
        "text": gate.text,
        "model": model,
        "status": verdict.status,
        "sign": _SIGNS[verdict.status],
        "kind": gate.kind,
        "value": show(interval.mean),
        "interval": f"{show(interval.low)} to {show(interval.high)}",
        "pairs": f"{verdict.num_pairs:,}",
        "needed": _NONE if verdict.needed_pairs is None else f"about {verdict.needed_pairs:,}",
        "chance": _NONE if chance is None else f"{chance:.0%}".replace("%", " %"),
    }


def _table(comparison: Comparison, candidate: Candidate) -> dict[str, Any]:
    baseline, ours, same = comparison.baseline, candidate.evaluation, candidate.same
    return {
        "baseline": baseline.name,
        "candidate": ours.name,
        "where": f"{_data(baseline)}, {len(ours.ids):,} prompts",
        "rows": [_row(name, one, baseline, ours) for name, one in candidate.differences.items() if name not in same],
        "same": ", ".join(score_kind(name).label.lower() for name in same),
    }


def _row(name: str, one: Difference, baseline: Evaluation, ours: Evaluation) -> dict[str, Any]:
    kind = score_kind(name)
    valid = ~np.isnan(ours.scores[name] - baseline.scores[name])
    reading, tone, sign = read_difference(name, one.interval)
    reach = max(abs(end) if math.isfinite(end) else 0.0 for end in (one.interval.low, one.interval.high))
    difference = show_interval(name, one)
    words = f"{kind.label}: difference {difference}, {reading}"
    return {
        "label": kind.label,
        "unit": kind.unit + {"lower": ", lower is better", "higher": ", higher is better", None: ""}[kind.better],
        "before": kind.show(float(baseline.scores[name][valid].mean())),
        "after": kind.show(float(ours.scores[name][valid].mean())),
        "difference": difference,
        "bar": interval_bar(one.interval, reach * 1.1, reading.partition(" ")[0] if tone or sign else "unclear", words),
        "reading": reading,
        "tone": tone,
        "sign": sign,
        "p": f"{one.p_value:.4f}",
        "wins": " / ".join(f"{count:,}" for count in better_wins(name, one)),
        "effect": _NONE if one.effect_size is None else f"{one.effect_size:+.2f}",
        "needed": _NONE if one.needed_pairs is None else f"{one.needed_pairs:,}",
    }


def read_difference(name: str, interval: Interval) -> tuple[str, str, str]:
    """What an interval says in words, its tone (good, bad or neither) and its sign."""
    if interval.low <= 0 <= interval.high:
        same = interval.low == interval.high == 0
        return ("equal" if same else "unclear"), "", ""
    rises = interval.mean > 0
    sign, better = "▲" if rises else "▼", score_kind(name).better
    if better is None:
        return "changed", "", sign
    good = rises == (better == "higher")
    return ("better", "good", sign) if good else ("worse", "bad", sign)


def _charts(comparison: Comparison) -> dict[str, Any]:
    everyone = comparison.everyone
    return {"legend": legend(everyone), "charts": cost_charts(everyone, comparison.options.resampling)}


def _data(evaluation: Evaluation) -> str:
    data = evaluation.settings.get("data")
    first = data[0] if isinstance(data, list) and data else data
    parts = [settings_value(first or {}, key) for key in ("name", "split")]
    return " ".join(Path(str(part)).name for part in parts if part) or "unnamed data"


def _road(evaluation: Evaluation) -> dict[str, Any]:
    """The chain of first parents, which the weights came from; other parents (a reward model) stand at their child."""
    ancestors = {str(Path(each.path).resolve()) if each.manifest else each.path: each for each in evaluation.road()}
    step: Ancestor | None = list(ancestors.values())[-1]
    steps: list[dict[str, Any]] = []
    while step is not None and len(steps) < len(ancestors):
        parents = [parent["path"] for parent in step.manifest.parents] if step.manifest else []
        steps.append(_step(step, [ancestors[path] for path in parents[1:] if path in ancestors]))
        step = ancestors.get(parents[0]) if parents else None
    size = evaluation.settings["model"].get("bytes")
    return {"name": evaluation.name, "bytes": f"{size:,.0f} bytes" if size else "", "steps": steps[::-1]}


def _step(ancestor: Ancestor, helpers: Sequence[Ancestor]) -> dict[str, Any]:
    path, manifest, problem = ancestor
    if manifest is None:
        return {"stage": "base", "created": "", "path": path, "problem": problem, "facts": []}
    facts = [
        (Path(str(row.get("name"))).name, f"{row.get('split') or ''} {row.get('rows') or 0:,} rows")
        for row in manifest.data
    ]
    facts += [(f"{each.manifest.stage if each.manifest else 'other'} model", Path(each.path).name) for each in helpers]
    facts += [(name, _number(value)) for name, value in manifest.metrics.items() if _is_number(value)][:_MAX_FACTS]
    facts += [("seed", str(manifest.seed))] if manifest.seed is not None else []
    facts += [("commit", manifest.git_commit[:12])] if manifest.git_commit else []
    facts.append(("bytes", f"{sum(file['bytes'] for file in manifest.files.values()):,}"))
    created = manifest.created.replace("T", " ")[:16]
    return {"stage": manifest.stage, "created": created, "path": path, "problem": problem, "facts": facts}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _reproduction(evaluation: Evaluation) -> dict[str, Any]:
    settings = evaluation.settings
    facts: list[tuple[str, str]] = [("evaluated", str(settings.get("created") or "")[:16].replace("T", " "))]
    digest = settings["model"].get("manifest_sha256")
    facts += [("manifest", digest)] if digest else []
    for name in ("data", "decoding", "speed", "versions"):
        facts += _flat(settings.get(name), name)
    return {"name": evaluation.name, "command": settings.get("command"), "facts": facts}


def _flat(value: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [(name, ", ".join(f"{key} {_short(item)}" for key, item in value.items() if item is not None))]
    if isinstance(value, list):
        return [pair for item in value for pair in _flat(item, name)]
    return [] if value is None else [(name, str(value))]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _answers(comparison: Comparison, name: str) -> dict[str, Any]:
    everyone = [comparison.baseline, *(each.evaluation for each in comparison.candidates)]
    metrics = [
        metric for metric in comparison.candidates[0].differences if all(metric in one.scores for one in everyone)
    ]
    metrics = metrics or list(comparison.candidates[0].differences)
    digits = {metric: score_kind(metric).digits for metric in metrics}
    template_chars = common_start(comparison.baseline.prompts)
    return {
        "name": name,
        "models": [each.name for each in everyone],
        "rank_by": comparison.candidates[0].rank_by,
        "metrics": [{"name": m, "label": score_kind(m).label, "digits": digits[m]} for m in metrics],
        "rows": [
            {
                "id": key,
                "prompt": comparison.baseline.prompts[row][template_chars:],
                "references": comparison.baseline.references[row],
                "answers": [each.answers[row] for each in everyone],
                "scores": {m: [_value(each, m, row, digits[m] + 1) for each in everyone] for m in metrics},
            }
            for row, key in enumerate(comparison.baseline.ids)
        ],
    }


def _value(evaluation: Evaluation, metric: str, row: int, digits: int) -> float | None:
    value = evaluation.scores[metric][row] if metric in evaluation.scores else math.nan
    return None if math.isnan(value) else round(float(value), digits)


def _data_block(value: Any) -> str:
    """JSON that holds no "<": it can neither end its script element nor begin another."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
