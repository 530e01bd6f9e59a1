"""The report of a load test: JSON, a Markdown table and one self-contained page, in the look of the other reports."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from yunque import __version__
from yunque.evaluation.charts import curve, lines
from yunque.serving.load.client import Outcome
from yunque.serving.load.soak import Check, Sample
from yunque.serving.load.summary import Percentiles, Summary

_PAGE = Path(__file__).with_name("page")
_HEADER = (
    *("load", "offered/s", "answered/s", "tokens/s", "goodput/s", "good"),
    *("first token p50 / p90 / p99", "between pieces p50 / p99", "whole answer p50 / p90 / p99", "refused", "failed"),
)


@dataclass(frozen=True)
class LoadReport:
    """All that a load test found; ``loads`` are the numbers on the charts' axis, one of each summary."""

    url: str
    settings: Mapping[str, Any]
    axis: str
    """What ``loads`` count, such as ``requests a second``."""
    loads: Sequence[float]
    summaries: Sequence[Summary]
    outcomes: Sequence[Outcome]
    """Of the last load, drawn over time."""
    checks: Sequence[Check] = ()
    samples: Sequence[Sample] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write ``load.json``, ``load.md`` and ``load.html``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "load.json").write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")
        (folder / "load.md").write_text(self.markdown(), encoding="utf-8")
        (folder / "load.html").write_text(self.html(), encoding="utf-8")

    def as_json(self) -> dict[str, Any]:
        """Everything but the texts."""
        return {
            "url": self.url,
            "created": _now(),
            "command": _command(),
            "version": __version__,
            "machine": _machine(),
            "settings": dict(self.settings),
            "facts": dict(self.facts),
            "loads": [summary.as_json() for summary in self.summaries],
            "checks": [asdict(check) for check in self.checks],
        }

    def markdown(self) -> str:
        """A table, and the checks of a soak."""
        rows = [_HEADER, ["---"] * len(_HEADER), *(_row(summary) for summary in self.summaries)]
        text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        verdicts = [
            f"- {'passed' if check.passed else 'FAILED'}: {check.name} ({check.detail})" for check in self.checks
        ]
        facts = [f"- {name}: {value}" for name, value in self.facts.items()]
        return "\n".join([text, "", self._note(), *([""] if verdicts or facts else []), *facts, *verdicts, ""])

    def html(self) -> str:
        """The page; it asks the network for nothing and runs no script."""
        style = (_PAGE / "report.css").read_text(encoding="utf-8")
        environment = Environment(
            loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        return environment.get_template("load.html").render(
            version=__version__,
            title=f"Load test of {self.url}",
            subtitle=f"{_now()} · {self.settings['model']} · {_machine()}",
            style=Markup(style),
            style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
            verdict=_verdict(self.checks),
            checks=[asdict(check) | _status(check.passed) for check in self.checks],
            header=_HEADER,
            rows=[_row(summary) for summary in self.summaries],
            note=self._note(),
            charts=self._charts(),
            command=_command(),
            facts=[*self.settings.items(), *self.facts.items()],
        )

    def _note(self) -> str:
        lag = max((each.client_lag.p99 for each in self.summaries if each.client_lag.count), default=0.0)
        return (
            "Milliseconds, from the scheduled arrival of each request (open loop) or from its sending (closed loop). "
            f"Good: {_objectives(self.settings)}. The client sent at most {1e3 * lag:.1f} ms (p99) late."
        )

    def _charts(self) -> list[Markup]:
        charts = []
        if len(self.loads) > 1:
            for title, name in (("First token", "first_token"), ("Whole answer", "end_to_end")):
                found = [getattr(summary, name) for summary in self.summaries]
                series = {p: [1e3 * getattr(each, p) for each in found] for p in ("p50", "p90", "p99")}
                charts.append(lines(self.loads, series, title=title, x_label=self.axis, y_label="ms"))
            rates = {"tokens": [each.tokens_s for each in self.summaries]}
            charts.append(lines(self.loads, rates, title="Tokens a second", x_label=self.axis, y_label=""))
            requests = {
                name: [getattr(each, name) for each in self.summaries] for name in ("completed_rate", "goodput")
            }
            requests = {"answered": requests["completed_rate"], "good": requests["goodput"]}
            charts.append(lines(self.loads, requests, title="Requests a second", x_label=self.axis, y_label=""))
        charts += self._over_time()
        return charts

    def _over_time(self) -> list[Markup]:
        done = sorted((each for each in self.outcomes if each.ok and each.pieces_s), key=lambda each: each.scheduled_s)
        charts = []
        if len(done) > 1:
            start = done[0].scheduled_s
            seconds = np.array([each.scheduled_s - start for each in done])
            first = np.array([1e3 * (each.pieces_s[0] - each.scheduled_s) for each in done])
            title = f"First token of each request (ms), {self.summaries[-1].load}"
            charts.append(curve(seconds, first, title=title, x_label="seconds"))
        held = [(each.moment_s, each.rss_bytes) for each in self.samples if each.rss_bytes]
        if len(held) > 1:
            moments, sizes = (np.array(column, dtype=float) for column in zip(*held, strict=True))
            charts.append(curve(moments - moments[0], sizes / 1e6, title="Server's memory (MB)", x_label="seconds"))
        return charts


def _row(summary: Summary) -> list[str]:
    return [
        summary.load,
        f"{summary.offered_rate:.2f}",
        f"{summary.completed_rate:.2f}",
        f"{summary.tokens_s:.0f}",
        f"{summary.goodput:.2f}",
        f"{100 * summary.good_share:.1f} %",
        _ms(summary.first_token, "p50", "p90", "p99"),
        _ms(summary.inter_token, "p50", "p99"),
        _ms(summary.end_to_end, "p50", "p90", "p99"),
        _reasons(summary.rejected),
        _reasons(summary.failed),
    ]


def _ms(found: Percentiles, *names: str) -> str:
    return " / ".join(f"{1e3 * getattr(found, name):.0f}" for name in names) if found.count else "-"


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in counts.items()) or "0"


def _objectives(settings: Mapping[str, Any]) -> str:
    names = {"first_token_s": "first token", "inter_token_s": "mean gap between pieces", "end_to_end_s": "whole answer"}
    wanted = [f"{words} within {settings[key]:g} s" for key, words in names.items() if settings.get(key) is not None]
    return ", ".join(wanted) or "answered"


def _status(passed: bool) -> dict[str, str]:
    return {"status": "passed", "sign": "✓"} if passed else {"status": "failed", "sign": "✗"}


def _verdict(found: Sequence[Check]) -> dict[str, str] | None:
    if not found:
        return None
    broken = [check.name for check in found if not check.passed]
    return _status(not broken) | {"text": f"Not held: {', '.join(broken)}" if broken else "All checks passed"}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _machine() -> str:
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
