"""Bootstrap confidence intervals of means: percentile method, seeded, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from yunque.errors import InputError

_CHUNK_VALUES = 2_000_000  # resampled values held at once: 16 MB of values and as much of indices


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its confidence interval; infinite ends say that one value alone gives no interval."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """The three numbers for JSON, which knows no infinity: an unknown end is null."""
        return {
            "mean": self.mean,
            "low": self.low if math.isfinite(self.low) else None,
            "high": self.high if math.isfinite(self.high) else None,
        }

    def __str__(self) -> str:
        """As people write it: 0.612 [0.590, 0.634]."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_bootstrap(
    before: ArrayLike, after: ArrayLike, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of ``mean(after - before)``, both of shape [num_pairs], resampling whole pairs.

    Raises:
        InputError: unequal lengths, no values, a value that is not finite, a bad ``resamples`` or ``confidence``.
    """
    before, after = finite_vector(before, "before"), finite_vector(after, "after")
    if len(before) != len(after):
        raise InputError(f"paired bootstrap: {len(before)} values before but {len(after)} after; give one pair per row")
    return bootstrap(after - before, resamples=resamples, confidence=confidence, seed=seed)


def bootstrap(values: ArrayLike, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Interval of the mean of ``values``, of shape [num_values].

    Raises:
        InputError: no values, a value that is not finite, a bad ``resamples`` or ``confidence``.
    """
    values = finite_vector(values, "values")
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, not {resamples}")
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, _CHUNK_VALUES // len(values))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        indices = rng.integers(0, len(values), size=(rows, len(values)))
        means[start : start + rows] = values[indices].mean(axis=1)
    return percentile_interval(float(values.mean()), means, num_values=len(values), confidence=confidence)


def percentile_interval(
    estimate: float, resampled: np.ndarray, *, num_values: int, confidence: float = 0.95
) -> Interval:
    """Interval of ``estimate`` from its values on resamples, of shape [resamples], of ``num_values`` observations.

    Raises:
        InputError: ``confidence`` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, not {confidence}")
    if num_values == 1:  # every resample is that one value: a width of 0 would claim certainty
        return Interval(estimate, -math.inf, math.inf)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def finite_vector(values: ArrayLike, name: str) -> np.ndarray:
    """``values`` as float64 of shape [n], n >= 1.

    Raises:
        InputError: another shape, no values, or a NaN or infinity; the message starts with ``name``.
    """
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not vector.size:
        raise InputError(f"{name}: expected one number per row and at least one row, got shape {list(vector.shape)}")
    bad = np.flatnonzero(~np.isfinite(vector))
    if bad.size:
        raise InputError(
            f"{name}: {bad.size} of {vector.size} values are not finite, first row {bad[0]}: {vector[bad[0]]}"
        )
    return vector
