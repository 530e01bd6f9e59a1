"""Accuracy and macro-F1 of a classifier with intervals, and its accuracy per group of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from yunque.errors import InputError
from yunque.metrics.bootstrap import Interval, percentile_interval


@dataclass(frozen=True)
class ClassificationScores:
    """Scores in 0..1 of ``num_rows`` rows; macro-F1 is the mean over the labels seen or predicted."""

    accuracy: Interval
    macro_f1: Interval
    num_rows: int

    def as_dict(self) -> dict[str, Any]:
        """The scores for JSON."""
        return {
            "accuracy": self.accuracy.as_dict(),
            "macro_f1": self.macro_f1.as_dict(),
            "num_rows": self.num_rows,
        }


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracy in 0..1 on the ``num_rows`` rows of a group."""

    accuracy: float
    num_rows: int


def classification_scores(
    labels: ArrayLike, predictions: ArrayLike, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> ClassificationScores:
    """Accuracy and macro-F1 of ``predictions`` for ``labels``, both of shape [num_rows], with bootstrap intervals.

    Raises:
        InputError: unequal lengths, no rows, a bad ``resamples`` or ``confidence``.
    """
    from sklearn.metrics import accuracy_score, f1_score

    truth, predicted = _same_rows(labels=labels, predictions=predictions)
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, not {resamples}")
    num_rows = len(truth)
    confusion = _confusion(truth, predicted)
    # Drawing rows with replacement is drawing the cells of their confusion matrix from a multinomial: much cheaper.
    draws = np.random.default_rng(seed).multinomial(num_rows, confusion.ravel() / num_rows, size=resamples)
    draws = draws.reshape(resamples, *confusion.shape)
    accuracies = np.trace(draws, axis1=1, axis2=2) / num_rows
    accuracy, macro_f1 = accuracy_score(truth, predicted), f1_score(truth, predicted, average="macro", zero_division=0)
    return ClassificationScores(
        accuracy=percentile_interval(float(accuracy), accuracies, num_values=num_rows, confidence=confidence),
        macro_f1=percentile_interval(float(macro_f1), _macro_f1(draws), num_values=num_rows, confidence=confidence),
        num_rows=num_rows,
    )


def accuracy_by_group(labels: ArrayLike, predictions: ArrayLike, groups: ArrayLike) -> dict[str, GroupAccuracy]:
    """Accuracy on the rows of each group, sorted by name; ``groups`` names the group of each row (HateCheck's tests).

    Raises:
        InputError: unequal lengths or no rows.
    """
    truth, predicted, names = _same_rows(labels=labels, predictions=predictions, groups=groups)
    correct = truth == predicted
    return {
        str(name): GroupAccuracy(accuracy=float(correct[names == name].mean()), num_rows=int((names == name).sum()))
        for name in np.unique(names)
    }


def _confusion(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Number of rows per pair of labels, of shape [true, predicted], over the labels seen or predicted."""
    labels, codes = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    cells = codes[: len(truth)] * len(labels) + codes[len(truth) :]
    return np.bincount(cells, minlength=len(labels) ** 2).reshape(len(labels), len(labels))


def _macro_f1(confusions: np.ndarray) -> np.ndarray:
    """Macro-F1, of shape [n], of confusion matrices [n, true, predicted], over the labels each of them holds."""
    hits = np.diagonal(confusions, axis1=1, axis2=2)
    totals = confusions.sum(axis=1) + confusions.sum(axis=2)  # 2 hits + false positives + false negatives
    f1 = 2 * hits / np.maximum(totals, 1)
    return f1.sum(axis=1) / (totals > 0).sum(axis=1)


def _same_rows(**columns: ArrayLike) -> list[np.ndarray]:
    arrays = [np.asarray(column) for column in columns.values()]
    if len({array.shape for array in arrays}) > 1 or arrays[0].ndim != 1 or not arrays[0].size:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in zip(columns, arrays, strict=True))
        raise InputError(f"expected the same number of rows, at least one, in each of: {shapes}")
    return arrays
