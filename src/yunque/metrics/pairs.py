"""How often a reward model prefers the answer that people preferred, and how far its probabilities can be believed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from yunque.errors import InputError
from yunque.metrics.bootstrap import Interval, bootstrap, finite_vector, paired_bootstrap


@dataclass(frozen=True)
class PairScores:
    """Shares in 0..1 of ``num_pairs`` pairs; a tie is half right.

    ``longer_accuracy`` is what choosing the longer answer would score and ``above_longer`` how far the model is above
    it; ``accuracy_longer`` and ``accuracy_shorter`` are the model's where the chosen answer is the longer one or the
    shorter one (None where there is no such pair).
    """

    accuracy: Interval
    longer_accuracy: Interval
    above_longer: Interval
    accuracy_longer: float | None
    accuracy_shorter: float | None
    mean_difference: float
    num_ties: int
    num_pairs: int

    def as_dict(self) -> dict[str, Any]:
        """The scores for JSON."""
        intervals = {name: value.as_dict() for name, value in vars(self).items() if isinstance(value, Interval)}
        return {**asdict(self), **intervals}


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs whose confidence lies in ``[low, high)``: their number, mean confidence and accuracy (None if empty)."""

    low: float
    high: float
    num_pairs: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error in 0..0.5, and the bins it is the mean of."""

    expected_error: float
    bins: list[ReliabilityBin]

    def as_dict(self) -> dict[str, Any]:
        """The numbers for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table for the user, empty bins left out."""
        lines = ["confidence   pairs  mean confidence  accuracy"]
        lines += [
            f"{part.low:.2f}-{part.high:.2f}  {part.num_pairs:>7,}  {part.confidence:>15.3f}  {part.accuracy:>8.3f}"
            for part in self.bins
            if part.num_pairs
        ]
        return "\n".join([*lines, f"expected calibration error {self.expected_error:.3f}"])


def pair_scores(
    chosen: ArrayLike,
    rejected: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairScores:
    """Pair accuracy of the rewards ``chosen`` and ``rejected``, with bootstrap intervals over pairs; all of shape [n].

    The lengths, in any unit, are the answers'.

    Raises:
        InputError: unequal numbers of pairs, none, a reward that is not finite.
    """
    difference = _difference(chosen, rejected)
    longer_by = _difference(chosen_lengths, rejected_lengths)
    if len(difference) != len(longer_by):
        raise InputError(f"pair scores: {len(difference)} rewards but {len(longer_by)} lengths; give one per pair")
    right, longer = _wins(difference), _wins(longer_by)
    options: dict[str, Any] = {"resamples": resamples, "confidence": confidence, "seed": seed}
    return PairScores(
        accuracy=bootstrap(right, **options),
        longer_accuracy=bootstrap(longer, **options),
        above_longer=paired_bootstrap(longer, right, **options),
        accuracy_longer=_mean(right[longer_by > 0]),
        accuracy_shorter=_mean(right[longer_by < 0]),
        mean_difference=float(difference.mean()),
        num_ties=int((difference == 0).sum()),
        num_pairs=len(difference),
    )


def bradley_terry_loss(chosen: ArrayLike, rejected: ArrayLike, margin: ArrayLike | None = None) -> float:
    """Mean of -log sigmoid(r_chosen - r_rejected - margin), in nats; all of shape [n] (Bradley and Terry 1952).

    Raises:
        InputError: as ``pair_scores``.
    """
    difference = _difference(chosen, rejected)
    if margin is not None:
        difference = _difference(difference, margin)
    return float(np.logaddexp(0.0, -difference).mean())


def pair_calibration(chosen: ArrayLike, rejected: ArrayLike, *, num_bins: int = 10) -> Calibration:
    """Reliability of p = sigmoid(r_chosen - r_rejected) in ``num_bins`` bins of equal width.

    ECE = sum_b n_b / n * |accuracy_b - confidence_b| (Guo et al. 2017, arXiv 1706.04599). Every pair has the same
    outcome (chosen won), so confidence is max(p, 1 - p), in 0.5..1, that the answer the model prefers is the chosen
    one: the same as counting each pair in both orders. Few pairs a bin push the error up by chance.

    Raises:
        InputError: as ``pair_scores``; fewer than one bin.
    """
    if num_bins < 1:
        raise InputError(f"num_bins: {num_bins} is no number of bins; give 1 or more")
    difference = _difference(chosen, rejected)
    right = _wins(difference)
    confidence = 1.0 / (1.0 + np.exp(-np.abs(difference)))
    edges = np.linspace(0.5, 1.0, num_bins + 1)
    numbers = np.clip(np.digitize(confidence, edges) - 1, 0, num_bins - 1)
    bins, error = [], 0.0
    for number in range(num_bins):
        inside = numbers == number
        mean_confidence, accuracy = _mean(confidence[inside]), _mean(right[inside])
        if mean_confidence is not None and accuracy is not None:
            error += inside.mean() * abs(accuracy - mean_confidence)
        bins.append(
            ReliabilityBin(float(edges[number]), float(edges[number + 1]), int(inside.sum()), mean_confidence, accuracy)
        )
    return Calibration(float(error), bins)


def _difference(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    minuend, subtrahend = finite_vector(first, "first of the pairs"), finite_vector(second, "second of the pairs")
    if len(minuend) != len(subtrahend):
        raise InputError(f"pair scores: {len(minuend)} values against {len(subtrahend)}; give one of each per pair")
    return minuend - subtrahend


def _wins(difference: np.ndarray) -> np.ndarray:
    """1 where the first is more, 0.5 at a tie, 0 else."""
    return (np.sign(difference) + 1) / 2


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
