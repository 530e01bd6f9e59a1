"""What a scheme does to one layer, or a plan to all: to the task, to the policy, to the scores of its own answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from yunque.compression.probing import (
    Pass,
    Probe,
    effective_share,
    expected_changes,
    first_order_changes,
)
from yunque.compression.schemes import LayerScheme
from yunque.compression.substitution import Rounding, Target, quantized
from yunque.metrics.ranks import spearman
from yunque.models.adapter import TokenIds

Scores = Mapping[str, np.ndarray]
"""Of some answers, by metric, each [number of answers]."""
ScoreAnswers = Callable[[Sequence[int], Sequence[TokenIds]], Scores]
"""Numbers of prompts and an answer to each -> their scores."""
Answer = Callable[[Sequence[int]], Sequence[TokenIds]]
"""Numbers of prompts -> greedy answers of the model as it is now."""


@dataclass(frozen=True)
class Change:
    """A mean over prompts and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True)
class Damage:
    """What became worse, or better, against the unchanged model.

    ``nll``: of the references, nats per token. ``kl``: of the changed from the unchanged policy, nats per answer.
    ``expected``: of each score of sampled answers, by importance weights, ``first_order`` likewise, to first order;
    ``effective_share`` of the answers stands behind ``expected``. ``changed``: share of greedy answers that are others
    now. ``greedy``: of each score of greedy answers, given anew where they changed.
    """

    num_bytes: int
    nll: Change | None
    kl: Change
    expected: dict[str, Change]
    first_order: dict[str, Change]
    effective_share: float
    changed: float
    greedy: dict[str, Change]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Damage:
        """What ``as_dict`` gave."""
        values = dict(content)
        for name in ("nll", "kl"):
            values[name] = values[name] and Change(**values[name])
        for name in ("expected", "first_order", "greedy"):
            values[name] = {metric: Change(**change) for metric, change in values[name].items()}
        return cls(**values)


class Meter:
    """Measures the damage of schemes on the model behind ``probe``.

    ``sampled_scores`` are of the probe's sampled answers, [P, K] each, ``greedy_scores`` of the greedy ones, [P].
    """

    def __init__(
        self,
        probe: Probe,
        rounding: Rounding,
        num_bytes: Callable[[str, LayerScheme], int],
        *,
        score: ScoreAnswers,
        answer: Answer,
    ) -> None:
        self.probe, self.rounding, self.num_bytes = probe, rounding, num_bytes
        self.score, self.answer = score, answer
        texts = probe.texts
        count = len(texts.prompts)
        owners = [row for row in range(count) for _ in texts.sampled[row]]
        drawn = score(owners, [answer for answers in texts.sampled for answer in answers])
        self.sampled_scores = {name: values.reshape(count, -1) for name, values in drawn.items()}
        self.greedy_scores = score(range(count), texts.greedy)

    def damage(self, layers: Mapping[Target, LayerScheme]) -> Damage:
        """Measure the damage of ``layers`` in these schemes, together."""
        with quantized(self.probe.model, layers, self.rounding):
            after = self.probe()
            changed = np.flatnonzero(~after.kept)
            greedy = self._greedy(changed)
        before = self.probe.unchanged
        log_ratios = after.logprobs - before.logprobs
        return Damage(
            num_bytes=sum(self.num_bytes(target.name, scheme) for target, scheme in layers.items()),
            nll=_nll(before, after, self.probe.texts.references),
            kl=_change(after.kl[~np.isnan(after.kl)]),
            expected={name: _change(expected_changes(log_ratios, of)) for name, of in self.sampled_scores.items()},
            first_order={
                name: _change(first_order_changes(log_ratios, of)) for name, of in self.sampled_scores.items()
            },
            effective_share=effective_share(log_ratios),
            changed=len(changed) / len(after.kept),
            greedy={name: _change(values) for name, values in greedy.items()},
        )

    def _greedy(self, changed: np.ndarray) -> dict[str, np.ndarray]:
        """Differences [P] of the greedy answers' scores; the answers that stay need not be given again."""
        differences = {name: np.zeros(len(values)) for name, values in self.greedy_scores.items()}
        if len(changed):
            rows = changed.tolist()
            for name, values in self.score(rows, self.answer(rows)).items():
                differences[name][changed] = values - self.greedy_scores[name][changed]
        return differences


@dataclass(frozen=True)
class Measured:
    """The damage of one layer in one scheme, the others unchanged."""

    layer: str
    scheme: str
    damage: Damage


def measure(
    meter: Meter,
    layers: Mapping[str, tuple[Target, Mapping[str, LayerScheme]]],
    *,
    done: Iterable[Measured] = (),
    save: Callable[[Measured], None],
) -> Iterator[Measured]:
    """Measure every layer in every scheme of its own that is not ``done``; each goes to ``save`` when it is there."""
    known = {(one.layer, one.scheme): one for one in done}
    for name, (target, schemes) in layers.items():
        for scheme, parts in schemes.items():
            one = known.get((name, scheme))
            if one is None:
                one = Measured(name, scheme, meter.damage({target: parts}))
                save(one)
            yield one


def agreement(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's rank correlation of predicted and measured damages; None where either has no differences."""
    return spearman(predicted, measured) if len(predicted) > 1 else None


def _nll(before: Pass, after: Pass, references: Sequence[TokenIds]) -> Change | None:
    counts = np.array([len(reference) for reference in references])
    known = counts > 0
    if not known.any():
        return None
    return _change((after.nats - before.nats)[known] / counts[known])


def _change(values: np.ndarray) -> Change:
    if len(values) < 2:
        return Change(float(values.mean()) if len(values) else math.nan, math.inf)
    return Change(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))
