"""What a run of traffic measured: percentiles, rates, goodput, and what was refused or failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from yunque.serving.load.client import Outcome
from yunque.serving.load.traffic import Window


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """A request is good when its whole answer came within all of these; None asks nothing."""

    first_token_s: float | None = 1.0
    inter_token_s: float | None = 0.2
    """Mean seconds between two pieces of one answer."""
    end_to_end_s: float | None = None


@dataclass(frozen=True)
class Percentiles:
    """Of some seconds; NaN of none."""

    p50: float
    p90: float
    p99: float
    mean: float
    max: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Linear between the two nearest values."""
        if not values:
            nothing = float("nan")
            return cls(nothing, nothing, nothing, nothing, nothing, 0)
        p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
        return cls(p50, p90, p99, float(np.mean(values)), float(max(values)), len(values))


@dataclass(frozen=True)
class Summary:
    """One run; times in seconds from the scheduled arrival, rates per second of the measured window."""

    load: str
    """Such as ``rate 4`` or ``16 clients``."""
    offered_rate: float
    """Requests scheduled a second."""
    completed_rate: float
    """Requests answered a second, whenever they were scheduled."""
    goodput: float
    """Requests a second that met all objectives."""
    good_share: float
    tokens_s: float
    first_token: Percentiles
    inter_token: Percentiles
    end_to_end: Percentiles
    client_lag: Percentiles
    """Seconds that this client sent later than scheduled: its own fault, and part of the other times."""
    requests: int
    completed: int
    rejected: dict[str, int]
    failed: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """Plain values; a percentile of nothing is None."""
        values = asdict(self)
        for name in ("first_token", "inter_token", "end_to_end", "client_lag"):
            values[name] = {key: None if value != value else value for key, value in values[name].items()}
        return values


def summarize(load: str, outcomes: Sequence[Outcome], window: Window, objectives: Objectives) -> Summary:
    """Of the requests scheduled in the window; tokens by when they came, whichever request they are of."""
    inside = [each for each in outcomes if window.holds(each.scheduled_s)]
    done = [each for each in inside if each.ok]
    seconds = window.end_s - window.start_s
    good = sum(_is_good(each, objectives) for each in done)
    return Summary(
        load=load,
        offered_rate=len(inside) / seconds,
        completed_rate=sum(each.ok and window.holds(each.end_s) for each in outcomes) / seconds,
        goodput=good / seconds,
        good_share=good / len(inside) if inside else float("nan"),
        tokens_s=sum(tokens_within(each, window) for each in outcomes) / seconds,
        first_token=Percentiles.of([each.pieces_s[0] - each.scheduled_s for each in done if each.pieces_s]),
        inter_token=Percentiles.of([gap for each in done for gap in np.diff(each.pieces_s).tolist()]),
        end_to_end=Percentiles.of([each.end_s - each.scheduled_s for each in done]),
        client_lag=Percentiles.of([each.sent_s - each.scheduled_s for each in inside]),
        requests=len(inside),
        completed=len(done),
        rejected=_counted(each.rejected for each in inside),
        failed=_counted(each.failed for each in inside),
    )


def tokens_within(outcome: Outcome, window: Window) -> float:
    """A request's tokens that came in the window, when each of its pieces stands for as many."""
    pieces = sum(window.holds(moment) for moment in outcome.pieces_s)
    return pieces * outcome.tokens / len(outcome.pieces_s) if outcome.tokens and pieces else float(pieces)


def _is_good(outcome: Outcome, objectives: Objectives) -> bool:
    moments = outcome.pieces_s or [outcome.end_s]  # of an empty answer
    first, last = moments[0], moments[-1]
    gap = (last - first) / max(1, len(moments) - 1)
    pairs = (
        (first - outcome.scheduled_s, objectives.first_token_s),
        (gap, objectives.inter_token_s),
        (outcome.end_s - outcome.scheduled_s, objectives.end_to_end_s),
    )
    return all(limit is None or value <= limit for value, limit in pairs)


def _counted(reasons: Any) -> dict[str, int]:
    return dict(Counter(reason for reason in reasons if reason).most_common())
