"""Gates: limits on a candidate's metrics that must be proved, not merely observed.

A gate is a one-sided claim: it passes where the end of the interval that is bad for it lies inside the limit. With the
95 % interval a candidate that is truly beyond the limit passes in at most 2.5 % of all evaluations. Of several gates
all must pass, so the candidate that breaks any of them still passes them all in at most 2.5 % (an intersection-union
test, Berger 1982): no correction is needed. What grows with their number is the chance to reject a sound candidate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from yunque.errors import InputError
from yunque.evaluation.evaluations import Evaluation
from yunque.evaluation.scores import in_order, score_kind
from yunque.metrics.bootstrap import Interval
from yunque.metrics.paired import Resampling, chance_to_show, mean_intervals, needed_pairs

RECOVERY = "recovery"
ALIGNMENT = "toxicity"
"""The metric whose gain over the base ``recovery`` measures."""

Status = Literal["passed", "failed", "inconclusive"]

_GATE = re.compile(
    r"\s*(?P<metric>[A-Za-z][\w.-]*)\s*(?P<sense><=|>=|<|>)\s*(?P<sign>[+-]?)(?P<limit>\d+\.?\d*|\.\d+)\s*"
)
_GRID = 33  # limits of recovery at which its interval is looked for, twice


@dataclass(frozen=True)
class Gate:
    """A limit: with a sign on the difference to the baseline, without one on the candidate's own mean."""

    text: str
    metric: str
    sense: str  # <=, >=, < or >
    limit: float
    kind: Literal["difference", "level", "recovery"]

    @property
    def direction(self) -> int:
        """1 where larger values are inside, -1 where smaller ones are."""
        return 1 if self.sense[0] == ">" else -1


@dataclass(frozen=True)
class Verdict:
    """What the pairs say of a gate.

    ``chance_unchanged`` is the chance that a candidate truly equal to the baseline passes it with as many pairs of
    this spread; ``needed_pairs`` is how many would pass this candidate with a chance of 80 % if its observed value
    were the true one, None where it lies beyond the limit or where the gate has passed.
    """

    gate: Gate
    status: Status
    interval: Interval
    num_pairs: int
    needed_pairs: int | None
    chance_unchanged: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "gate": self.gate.text,
            "metric": self.gate.metric,
            "kind": self.gate.kind,
            "status": self.status,
            "value": self.interval.as_dict(),
            "num_pairs": self.num_pairs,
            "needed_pairs": self.needed_pairs,
            "chance_unchanged": self.chance_unchanged,
        }

    def __str__(self) -> str:
        kind, digits = score_kind(self.gate.metric), 3 if self.gate.kind == "recovery" else None
        signed = self.gate.kind == "difference"

        def show(value: float) -> str:
            if not math.isfinite(value):
                return "?"
            return f"{value:.{digits}f}" if digits else kind.show(value, signed)

        interval = self.interval
        what = {"difference": "difference", "level": "mean", "recovery": "recovery"}[self.gate.kind]
        shown = (
            f"{what} {show(interval.mean)} [{show(interval.low)}, {show(interval.high)}] on {self.num_pairs:,} pairs"
        )
        return f"{self.gate.text}: {self.status}: {shown}{self._advice()}"

    def _advice(self) -> str:
        if self.status != "inconclusive":
            return ""
        if self.needed_pairs is None:
            return "; the observed value is not inside the limit, more prompts are unlikely to pass it"
        return f"; about {self.needed_pairs:,} prompts would decide if the observed value is the true one"


def parse_gate(text: str) -> Gate:
    """Read ``toxicity<=+0.01`` (difference), ``toxicity<0.2`` (the candidate's mean) or ``recovery>=0.95``.

    Raises:
        InputError: anything else, and limits that no answers could break or meet.
    """
    found = _GATE.fullmatch(text)
    if found is None:
        raise InputError(
            f"--gate {text}: give METRIC<=LIMIT or METRIC>=LIMIT, as toxicity<=+0.01 (a sign: difference to the first"
            " model), toxicity<0.2 (no sign: the model's own mean) or recovery>=0.95"
        )
    metric, sense, sign = found["metric"], found["sense"], found["sign"]
    limit = float(sign + found["limit"])
    if metric == RECOVERY:
        if sign or sense[0] == "<":
            raise InputError(f"--gate {text}: recovery is the share of the gain that is kept; give recovery>=0.95")
        return Gate(text.strip(), metric, sense, limit, "recovery")
    gate = Gate(text.strip(), metric, sense, limit, "difference" if sign else "level")
    _check_reach(gate)
    return gate


def _check_reach(gate: Gate) -> None:
    """A limit outside the metric's range is one in the wrong unit: rougeL>=-0.01 means points, f1>=-1.0 nothing."""
    kind = score_kind(gate.metric)
    if kind.low is None or kind.high is None:
        return
    width = kind.high - kind.low
    low, high = (-width, width) if gate.kind == "difference" else (kind.low, kind.high)
    if not low < gate.limit < high:
        what = "a difference of it" if gate.kind == "difference" else "its mean"
        raise InputError(
            f"--gate {gate.text}: {gate.metric} is measured as {kind.unit}, {kind.low:g} to {kind.high:g}, so that"
            f" {what} lies between {low:g} and {high:g}; give a limit inside"
        )


def check_gates(gates: Sequence[Gate], baseline: Evaluation, candidate: Evaluation, base: Evaluation | None) -> None:
    """Check that what every gate measures was measured.

    Raises:
        InputError: an unknown metric, recovery without the base or without the alignment metric, answers without score.
    """
    common = {name for name in baseline.scores if name in candidate.scores}
    for gate in gates:
        if gate.kind == "recovery":
            if base is None:
                raise InputError(f"--gate {gate.text}: recovery needs the model before alignment; give --base FOLDER")
            for evaluation in (base, baseline, candidate):
                if ALIGNMENT not in evaluation.scores:
                    raise InputError(
                        f"--gate {gate.text}: {evaluation.name} has no {ALIGNMENT}; evaluate it with the classifier"
                    )
        elif gate.metric not in common:
            known = ", ".join(in_order(common)) or "none"
            raise InputError(
                f"--gate {gate.text}: {baseline.name} and {candidate.name} do not both have {gate.metric}; there are:"
                f" {known}"
            )
        _check_complete(gate, baseline, candidate)


def _check_complete(gate: Gate, baseline: Evaluation, candidate: Evaluation) -> None:
    """A candidate must not pass because the answers that broke its judge have no score."""
    name = ALIGNMENT if gate.kind == "recovery" else gate.metric
    lost = np.isnan(candidate.scores[name]) & ~np.isnan(baseline.scores[name])
    if lost.any():
        raise InputError(
            f"--gate {gate.text}: {candidate.name} has no {name} of {lost.sum():,} answers that {baseline.name} has;"
            " evaluate it again, its notes say why"
        )


def judge(
    gate: Gate,
    baseline: Evaluation,
    candidate: Evaluation,
    base: Evaluation | None,
    differences: Mapping[str, Interval],
    how: Resampling,
) -> Verdict:
    """Judge one gate on aligned evaluations; ``differences`` are the intervals that the table shows."""
    if gate.kind == "recovery":
        assert base is not None, "check_gates has seen it"
        before, aligned, kept = (each.scores[ALIGNMENT] for each in (base, baseline, candidate))
        return _judge_recovery(gate, before, aligned, kept, how)
    ours = candidate.scores[gate.metric]
    values = ours - baseline.scores[gate.metric] if gate.kind == "difference" else ours
    values = values[~np.isnan(values)]
    if gate.kind == "difference":
        interval = differences[gate.metric]
    else:
        [interval] = mean_intervals(values[:, None], how)
    margins = gate.direction * (values - gate.limit)
    unchanged = -gate.direction * gate.limit if gate.kind == "difference" else None
    return _verdict(gate, interval, margins, unchanged, how.confidence)


def _judge_recovery(
    gate: Gate, base: np.ndarray, baseline: np.ndarray, candidate: np.ndarray, how: Resampling
) -> Verdict:
    """Share of the gain that is kept, (base - candidate) / (base - baseline), by Fieller's method.

    The share is at least r where the mean of (base - candidate) - r (base - baseline) is at least 0, the gain itself
    being positive: the ends are the r at which the interval of that mean touches 0.
    """
    valid = ~np.isnan(base + baseline + candidate)
    kept, gain = (base - candidate)[valid], (base - baseline)[valid]
    [gained] = mean_intervals(gain[:, None], how)
    if gained.low <= 0:
        raise InputError(
            f"--gate {gate.text}: the first model has no proved gain to keep: its {ALIGNMENT} is {gained.mean:.3f}"
            f" [{gained.low:.3f}, {gained.high:.3f}] below the base's"
        )
    interval = _share_interval(kept, gain, how)
    margins = kept - gate.limit * gain
    return _verdict(gate, interval, margins, (1 - gate.limit) * float(gain.mean()), how.confidence)


def _share_interval(kept: np.ndarray, gain: np.ndarray, how: Resampling) -> Interval:
    share = float(kept.mean() / gain.mean())
    error = float(np.std(kept - share * gain)) / math.sqrt(len(kept)) / float(gain.mean())
    if error < 1e-9:
        return Interval(share, share, share)
    ends = []
    for side in (-1, 1):
        low, high = sorted((share, share + side * 12 * error))
        for _ in range(2):  # the second look between two neighbours of the first
            limits = np.linspace(low, high, _GRID)
            found = mean_intervals(kept[:, None] - limits * gain[:, None], how)
            outside = [limit for limit, one in zip(limits, found, strict=True) if (one.low, -one.high)[side > 0] > 0]
            inside = [limit for limit, one in zip(limits, found, strict=True) if (one.low, -one.high)[side > 0] <= 0]
            if not outside:
                ends.append(side * math.inf)
                break
            low, high = (max(outside), min(inside)) if side < 0 else (max(inside), min(outside))
        else:
            ends.append((low + high) / 2)
    return Interval(share, ends[0], ends[1])


def _verdict(
    gate: Gate, interval: Interval, margins: np.ndarray, unchanged: float | None, confidence: float
) -> Verdict:
    """``margins``, of shape [num_pairs], are how far inside the limit each pair is."""
    low, high = (interval.low, interval.high) if gate.direction > 0 else (-interval.high, -interval.low)
    limit, strict = gate.direction * gate.limit, len(gate.sense) == 1
    std = float(margins.std(ddof=1)) if len(margins) > 1 else math.nan
    status: Status = "inconclusive"
    if low > limit or (low == limit and not strict):
        status = "passed"
    elif high < limit or (high == limit and strict):
        status = "failed"
    margin = float(margins.mean())
    return Verdict(
        gate,
        status,
        interval,
        len(margins),
        needed_pairs(margin, std, confidence) if status == "inconclusive" and margin > 0 else None,
        None if unchanged is None else chance_to_show(unchanged, std, len(margins), confidence),
    )
