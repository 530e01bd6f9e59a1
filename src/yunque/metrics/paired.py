"""Paired differences of many metrics at once: intervals, permutation p-values, win rates, effect sizes, sample sizes.

All columns share the same resamples, whose counts are one matrix: means and variances of all of them are two products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from yunque.errors import InputError
from yunque.metrics.bootstrap import Interval

POWER = 0.8
"""Chance with which the needed number of pairs would show a difference of the size that was observed."""

_BLOCK_VALUES = 4_000_000  # counts of resampled pairs held at once: 32 MB while drawn, 16 MB as weights
_BLOCK_COLUMNS = 64  # columns whose resampled means are held at once
_MOST_STUDENTS = 2.0  # where two pairs differ at all, resamples may have any spread; counts of events need this much
_CELLS = 100_001  # of the numerical integral behind the quantile of Student's t


@dataclass(frozen=True)
class Resampling:
    """How intervals and p-values are made.

    Raises:
        InputError: too few resamples, a confidence that is none.
    """

    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Check both."""
        if self.resamples < 100:
            raise InputError(f"resamples must be at least 100, not {self.resamples}")
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"confidence must be at least 0.5 and below 1, not {self.confidence}")


DEFAULT = Resampling()


@dataclass(frozen=True)
class Difference:
    """What pairs say of one metric: of ``differences``, candidate less baseline, of shape [num_pairs].

    ``wins`` counts positive differences, ``win_rate`` is the share of pairs won, a tie counting half.
    ``effect_size`` is Cohen's d of pairs, mean / standard deviation; None where all differences are equal.
    ``needed_pairs`` is None where the interval excludes 0, or where no number of pairs would make it do so.
    """

    num_pairs: int
    interval: Interval
    std: float
    p_value: float
    wins: int
    ties: int
    losses: int
    win_rate: Interval
    effect_size: float | None
    needed_pairs: int | None


def paired_differences(differences: Mapping[str, np.ndarray], how: Resampling = DEFAULT) -> dict[str, Difference]:
    """Compare the pairs of each metric; NaN marks a pair that lacks the metric (a prompt without a reference).

    Raises:
        InputError: a column with no pair, an infinite value.
    """
    found: dict[str, Difference] = {}
    for names, values in _by_valid_pairs(differences):
        columns = np.concatenate([values, (np.sign(values) + 1) / 2], axis=1)
        intervals = mean_intervals(columns, how)
        p_values = sign_flip_p_values(values, flips=how.resamples, seed=how.seed)
        for number, name in enumerate(names):
            column, interval = values[:, number], intervals[number]
            std = float(column.std(ddof=1)) if len(column) > 1 else math.nan
            found[name] = Difference(
                num_pairs=len(column),
                interval=interval,
                std=std,
                p_value=float(p_values[number]),
                wins=int((column > 0).sum()),
                ties=int((column == 0).sum()),
                losses=int((column < 0).sum()),
                win_rate=intervals[len(names) + number],
                effect_size=interval.mean / std if std > 0 else None,
                needed_pairs=None
                if interval.low > 0 or interval.high < 0
                else needed_pairs(interval.mean, std, how.confidence),
            )
    return {name: found[name] for name in differences}


def mean_intervals(columns: np.ndarray, how: Resampling = DEFAULT) -> list[Interval]:
    """Intervals of the means of ``columns``, of shape [num_pairs, num_columns], resampling whole rows.

    The outer ends of two intervals: the studentised bootstrap, mean - q(t*) s / sqrt(n) (Efron and Tibshirani 1993,
    section 12.5), which follows skewed scores, and Student's t, which holds where few pairs differ at all and
    resamples lose them; a studentised end is at most twice as far as Student's. docs/compare.md has the coverage.
    Equal values give an interval of width 0.

    Raises:
        InputError: no rows, values that are not finite.
    """
    columns = _finite_columns(columns)
    num_pairs, means = len(columns), columns.mean(axis=0)
    if num_pairs == 1:
        return [Interval(float(mean), -math.inf, math.inf) for mean in means]
    std = columns.std(axis=0)
    scale = np.where(std > 1e-12 * np.maximum(1, np.abs(means)), std, 0.0)  # rounding is no spread
    centred = np.divide(columns - means, scale, out=np.zeros_like(columns), where=scale > 0).astype(np.float32)
    tail = (1 - how.confidence) / 2
    quantiles = np.empty((2, columns.shape[1]))
    for start in range(0, columns.shape[1], _BLOCK_COLUMNS):
        part = slice(start, start + _BLOCK_COLUMNS)
        statistics = _studentised_means(centred[:, part], how)
        # "nearest" keeps resamples without any spread, whose statistic is infinite, from making the others NaN
        quantiles[:, part] = np.quantile(statistics, [tail, 1 - tail], axis=0, method="nearest")
    student = student_quantile(1 - tail, num_pairs - 1) * math.sqrt(num_pairs / (num_pairs - 1))
    quantiles = np.clip(quantiles, -_MOST_STUDENTS * student, _MOST_STUDENTS * student)
    error = scale / math.sqrt(num_pairs)
    lows = means - np.maximum(quantiles[1], student) * error
    highs = means - np.minimum(quantiles[0], -student) * error
    return [Interval(float(mean), float(low), float(high)) for mean, low, high in zip(means, lows, highs, strict=True)]


def sign_flip_p_values(columns: np.ndarray, *, flips: int = 10_000, seed: int = 0) -> np.ndarray:
    """Two-sided p-values, of shape [num_columns], that the differences are as likely negative as positive.

    (1 + flips at least as far from 0 as the observed sum) / (1 + flips): the observed one counts, so p is never 0
    (Phipson and Smyth 2010).
    """
    columns = _finite_columns(columns)
    scaled = (columns / np.maximum(np.abs(columns).max(axis=0), 1e-300)).astype(np.float32)
    observed = np.abs(scaled.sum(axis=0, dtype=np.float64)) - 1e-5 * np.sqrt(len(columns))  # rounding makes no tie less
    extreme = np.zeros(columns.shape[1], dtype=np.int64)
    rng = np.random.default_rng(seed)
    width = -(-len(columns) // 8)
    for rows in _blocks(flips, len(columns)):
        bits = np.unpackbits(np.frombuffer(rng.bytes(rows * width), np.uint8).reshape(rows, width), axis=1)
        # a sum with signs is twice the sum of the kept values less the sum of all
        sums = 2 * (bits[:, : len(columns)].astype(np.float32) @ scaled) - scaled.sum(axis=0)
        extreme += (np.abs(sums) >= observed).sum(axis=0)
    return (1 + extreme) / (1 + flips)


def needed_pairs(margin: float, std: float, confidence: float = 0.95) -> int | None:
    """Pairs whose interval would exclude 0 with a chance of 80 % if ``margin`` and ``std`` were the true values.

    n = ((z_confidence + z_power) std / margin)²; None where there is no margin or no spread.
    """
    if not (math.isfinite(std) and std > 0 and margin):
        return None
    z = normal_quantile((1 + confidence) / 2) + normal_quantile(POWER)
    return max(2, math.ceil((z * std / margin) ** 2))


def chance_to_show(margin: float, std: float, num_pairs: int, confidence: float = 0.95) -> float | None:
    """Chance that the lower end of the interval of a mean lies above 0 when its true value is ``margin``.

    The normal approximation, Phi(margin sqrt(n) / std - z); None where there is no spread to judge by.
    """
    if not (math.isfinite(std) and std > 0):
        return None
    return NormalDist().cdf(margin * math.sqrt(num_pairs) / std - normal_quantile((1 + confidence) / 2))


def normal_quantile(probability: float) -> float:
    """Quantile of the standard normal distribution."""
    return NormalDist().inv_cdf(probability)


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t with ``degrees`` of freedom, by integrating its density over arctan(t / sqrt(degrees)).

    With that substitution the density is proportional to cos(angle)^(degrees - 1) on a bounded range.
    """
    reach = min(math.pi / 2, 40 / math.sqrt(degrees))  # beyond it nothing is left of a high power of the cosine
    angles = np.linspace(-reach, reach, _CELLS)
    density = np.maximum(np.cos(angles), 0.0) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(float(np.interp(probability, below / below[-1], angles)))


def _studentised_means(centred: np.ndarray, how: Resampling) -> np.ndarray:
    """t* = mean* sqrt(n) / s* of each resample, of shape [resamples, num_columns]; infinite where s* is 0."""
    num_pairs, num_columns = centred.shape
    both = np.concatenate([centred, centred * centred], axis=1)
    statistics = np.empty((how.resamples, num_columns))
    rng = np.random.default_rng(how.seed)
    start = 0
    for rows in _blocks(how.resamples, num_pairs):
        drawn = rng.integers(0, num_pairs, size=(rows, num_pairs))
        drawn += np.arange(rows)[:, None] * num_pairs
        counts = np.bincount(drawn.ravel(), minlength=rows * num_pairs).reshape(rows, num_pairs)
        moments = (counts.astype(np.float32) @ both).astype(np.float64) / num_pairs
        means, variances = moments[:, :num_columns], moments[:, num_columns:] - moments[:, :num_columns] ** 2
        error = np.sqrt(np.maximum(variances, 0) / num_pairs)
        flat = variances < 1e-6
        statistics[start : start + rows] = np.where(
            flat, np.where(np.abs(means) < 1e-6, 0.0, np.copysign(np.inf, means)), means / np.where(flat, 1.0, error)
        )
        start += rows
    return statistics


def _blocks(total: int, num_pairs: int) -> Iterator[int]:
    rows = max(1, _BLOCK_VALUES // num_pairs)
    for start in range(0, total, rows):
        yield min(rows, total - start)


def _by_valid_pairs(differences: Mapping[str, np.ndarray]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Metrics that the same pairs have, with their values on those pairs, of shape [num_pairs, num_metrics]."""
    groups: dict[bytes, list[str]] = {}
    for name, values in differences.items():
        groups.setdefault(np.isnan(values).tobytes(), []).append(name)
    for names in groups.values():
        valid = ~np.isnan(differences[names[0]])
        if not valid.any():
            raise InputError(f"{names[0]}: no pair has it; leave it out")
        yield names, np.stack([differences[name][valid] for name in names], axis=1)


def _finite_columns(columns: np.ndarray) -> np.ndarray:
    columns = np.asarray(columns, dtype=np.float64)
    if columns.ndim != 2 or not columns.size:
        raise InputError(f"expected one row per pair and at least one, got shape {list(columns.shape)}")
    if not np.isfinite(columns).all():
        raise InputError(f"{np.count_nonzero(~np.isfinite(columns))} of {columns.size} values are not finite")
    return columns
