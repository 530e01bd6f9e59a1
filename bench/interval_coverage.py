"""Simulate how often 95 % intervals of paired differences cover the truth: `python bench/interval_coverage.py`.

Of each distribution of differences: the share of simulated evaluations whose interval covers the true mean, and in
brackets how often the truth lies above its upper end (2.5 % wanted), for Student's t, the percentile bootstrap and the
interval of `yunque compare`. With the truth exactly at a gate's limit, that second number is how often the gate passes.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from yunque.metrics.paired import Resampling, mean_intervals, student_quantile


def simulate(name: str, rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Differences of shape [pairs, sets] and their true mean."""
    share = rng.random(shape)
    if name == "normal":
        return rng.normal(0.1, 1, shape), 0.1
    if name == "toxicity-like, a detoxified model":
        before = np.where(share < 0.25, rng.beta(8, 2, shape), rng.beta(0.5, 12, shape))
        drawn = np.where(rng.random(shape) < 0.08, rng.beta(8, 2, shape), rng.beta(0.5, 12, shape))
        after = np.where(rng.random(shape) < 0.6, before * rng.beta(20, 2, shape), drawn)
        mean = 0.25 * 0.8 + 0.75 * 0.04
        return after - before, 0.6 * mean * 20 / 22 + 0.4 * (0.08 * 0.8 + 0.92 * 0.04) - mean
    if name.startswith("one answer in"):
        turned = 0.1 if "ten" in name else 0.04
        return np.where(share < turned, rng.beta(8, 2, shape), rng.normal(0, 0.005, shape)), turned * 0.8
    if name.startswith("exact match"):
        up, down = (0.08, 0.05) if "13 %" in name else (0.03, 0.01)
        return np.where(share < up, 1.0, np.where(share < up + down, -1.0, 0.0)), up - down
    if name == "ROUGE-like, 40 % equal":
        return np.where(share < 0.4, 0.0, rng.beta(2, 5, shape) - rng.beta(2, 4, shape)), 0.6 * (2 / 7 - 1 / 3)
    return rng.lognormal(0, 1, shape) - rng.lognormal(0, 0.5, shape), math.exp(0.5) - math.exp(0.125)


NAMES = (
    *("normal", "toxicity-like, a detoxified model", "one answer in ten turned toxic", "one answer in 25 turned toxic"),
    *("exact match, 13 % differ", "exact match, 4 % differ", "ROUGE-like, 40 % equal", "log-normal"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--sets", type=int, default=4_000)
    parser.add_argument("--resamples", type=int, default=2_000)
    options = parser.parse_args()
    print(f"| differences, {options.pairs} pairs | Student's t | percentile | ours |\n|---|---|---|---|")
    for number, name in enumerate(NAMES):
        columns, truth = simulate(name, np.random.default_rng(number), (options.pairs, options.sets))
        half = student_quantile(0.975, options.pairs - 1) * columns.std(axis=0, ddof=1) / math.sqrt(options.pairs)
        means = columns.mean(axis=0)
        ours = mean_intervals(columns, Resampling(options.resamples))
        found = {
            "t": (means - half, means + half),
            "percentile": percentiles(columns, options.resamples),
            "ours": (np.array([each.low for each in ours]), np.array([each.high for each in ours])),
        }
        cells = [
            f"{100 * np.mean((low <= truth) & (truth <= high)):.1f} ({100 * np.mean(high < truth):.1f})"
            for low, high in found.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def percentiles(columns: np.ndarray, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(columns), size=(resamples, len(columns))) + np.arange(resamples)[:, None] * len(columns)
    counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(resamples, len(columns))
    low, high = np.quantile(
        counts.astype(np.float32) @ columns.astype(np.float32) / len(columns), [0.025, 0.975], axis=0
    )
    return low, high


if __name__ == "__main__":
    main()
