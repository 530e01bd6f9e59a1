"""Paired statistics: against scipy, by hand, and by simulation of what the intervals and gates promise."""

import math

import numpy as np
import pytest
from scipy import stats

from yunque.errors import InputError
from yunque.metrics.paired import (
    Resampling,
    chance_to_show,
    mean_intervals,
    needed_pairs,
    paired_differences,
    sign_flip_p_values,
    student_quantile,
)

SETS = 1_000


def toxicity_like(rng, pairs):
    """Probabilities near 0 with a quarter toxic; most answers keep theirs, the others are drawn anew, less toxic."""
    shape = (pairs, SETS)
    before = np.where(rng.random(shape) < 0.25, rng.beta(8, 2, shape), rng.beta(0.5, 12, shape))
    drawn = np.where(rng.random(shape) < 0.08, rng.beta(8, 2, shape), rng.beta(0.5, 12, shape))
    after = np.where(rng.random(shape) < 0.6, before * rng.beta(20, 2, shape), drawn)
    mean_before = 0.25 * 0.8 + 0.75 * 0.5 / 12.5
    return after - before, 0.6 * mean_before * 20 / 22 + 0.4 * (0.08 * 0.8 + 0.92 * 0.5 / 12.5) - mean_before


def rouge_like(rng, pairs):
    """Two in five answers are the same, the others differ by shares of words."""
    shape = (pairs, SETS)
    gap = rng.beta(2, 5, shape) - rng.beta(2, 4, shape)
    return np.where(rng.random(shape) < 0.4, 0.0, gap), 0.6 * (2 / 7 - 1 / 3)


def exact_match_like(rng, pairs):
    drawn = rng.random((pairs, SETS))
    return np.where(drawn < 0.08, 1.0, np.where(drawn < 0.13, -1.0, 0.0)), 0.03


def normal(rng, pairs):
    return rng.normal(0.1, 1, (pairs, SETS)), 0.1


def length_like(rng, pairs):
    """Log-normal: long tails on one side."""
    shape = (pairs, SETS)
    return rng.lognormal(0, 1, shape) - rng.lognormal(0, 0.5, shape), math.exp(0.5) - math.exp(0.125)


def rarely_toxic(rng, pairs):
    """One answer in ten has turned toxic, nothing else moved: the regression a gate is for."""
    turned = rng.random((pairs, SETS)) < 0.1
    return np.where(turned, rng.beta(8, 2, (pairs, SETS)), rng.normal(0, 0.005, (pairs, SETS))), 0.1 * 0.8


def ends(columns):
    intervals = mean_intervals(columns, Resampling(2_000))
    return np.array([interval.low for interval in intervals]), np.array([interval.high for interval in intervals])


@pytest.mark.parametrize("pairs", [120, 500])
@pytest.mark.parametrize("simulate", [normal, toxicity_like, rouge_like, exact_match_like, length_like])
def test_95_percent_intervals_cover_the_true_difference_in_93_to_97_percent(simulate, pairs):
    columns, truth = simulate(np.random.default_rng(pairs), pairs)
    lows, highs = ends(columns)
    assert 0.93 <= np.mean((lows <= truth) & (truth <= highs)) <= 0.97


def test_rare_regressions_are_covered_where_percentiles_and_t_fail():
    columns, truth = rarely_toxic(np.random.default_rng(0), 60)
    lows, highs = ends(columns)
    student = columns.mean(axis=0) + stats.t.ppf(0.975, 59) * columns.std(axis=0, ddof=1) / math.sqrt(60)
    assert np.mean(student < truth) > 0.05  # what the textbook's interval would let through
    assert np.mean(highs < truth) <= 0.025
    assert np.mean(lows > truth) <= 0.025


@pytest.mark.parametrize("simulate", [normal, toxicity_like, rouge_like, rarely_toxic])
def test_a_regression_at_the_limit_passes_in_at_most_the_stated_2_5_percent(simulate):
    """The gate `difference <= truth` is false only by a hair: it passes where the upper end lies at or below it."""
    columns, truth = simulate(np.random.default_rng(7), 250)
    _, highs = ends(columns)
    assert np.mean(highs <= truth) <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / SETS)


@pytest.mark.parametrize("simulate", [normal, toxicity_like, rouge_like])
@pytest.mark.parametrize("margin_errors", [1.0, 2.8, 4.0])
def test_gates_pass_and_catch_at_the_stated_power(simulate, margin_errors):
    """`difference <= limit` with the truth inside by so many standard errors; outside by them, none passes."""
    columns, truth = simulate(np.random.default_rng(int(margin_errors * 10)), 400)
    std = columns.std()
    margin = margin_errors * std / math.sqrt(400)
    _, highs = ends(columns)
    passed = np.mean(highs <= truth + margin)
    assert passed == pytest.approx(chance_to_show(margin, std, 400), abs=0.05)
    assert np.mean(highs <= truth - margin) <= 0.01  # caught in at least 99 %


def test_needed_pairs_give_the_stated_power():
    rng = np.random.default_rng(3)
    pairs = needed_pairs(0.2, 1.0)
    assert pairs == 197  # (1.95996 + 0.84162)² / 0.2²
    columns = rng.normal(0.2, 1.0, (pairs, SETS))
    lows, _ = ends(columns)
    assert np.mean(lows > 0) == pytest.approx(0.8, abs=0.04)
    assert needed_pairs(0.0, 1.0) is None
    assert needed_pairs(0.1, 0.0) is None


def test_the_wider_of_scipy_s_t_and_a_studentised_bootstrap():
    rng = np.random.default_rng(0)
    values = rng.lognormal(0, 1, 80)
    [interval] = mean_intervals(values[:, None], Resampling(20_000, seed=1))
    error = values.std(ddof=1) / math.sqrt(80)
    student = stats.t.interval(0.95, 79, loc=values.mean(), scale=error)
    draws = rng.choice(values, (20_000, 80))
    statistics = (draws.mean(axis=1) - values.mean()) / (draws.std(axis=1, ddof=1) / math.sqrt(80))
    low, high = values.mean() - np.quantile(statistics, [0.975, 0.025]) * error
    assert interval.low == pytest.approx(min(student[0], low), rel=0.02)
    assert interval.high == pytest.approx(max(student[1], high), rel=0.02)


def test_student_quantile_is_scipy_s():
    for degrees in (1, 2, 3, 10, 119, 1_999, 100_000):
        assert student_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-6)


def test_p_values_are_those_of_scipy_s_permutation_test_and_uniform_without_a_difference():
    rng = np.random.default_rng(5)
    columns = rng.normal(0.15, 1, (60, 4)).round(1)  # rounded: ties between flips must count
    found = sign_flip_p_values(columns, flips=20_000)
    for column, p_value in zip(columns.T, found, strict=True):
        reference = stats.permutation_test(
            (column, np.zeros(60)), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples",
            vectorized=True, n_resamples=20_000, rng=np.random.default_rng(0),
        )  # fmt: skip
        assert p_value == pytest.approx(reference.pvalue, abs=0.015)
    null = sign_flip_p_values(rng.standard_t(3, (50, SETS)), flips=1_000)
    assert np.mean(null <= 0.05) == pytest.approx(0.05, abs=0.02)
    few = np.zeros((8, 1))
    few[:3] = 1.0
    assert sign_flip_p_values(few, flips=20_000, seed=1)[0] == pytest.approx(0.25, abs=0.01)  # exact: 2 of 2^3 flips


def test_counts_effect_and_needed_pairs():
    values = {"toxicity": np.array([0.5, -0.5, 0.0, 1.0]), "rougeL": np.array([np.nan, 2.0, 2.0, 5.0])}
    found = paired_differences(values)
    toxicity = found["toxicity"]
    assert (toxicity.num_pairs, toxicity.wins, toxicity.ties, toxicity.losses) == (4, 2, 1, 1)
    assert toxicity.win_rate.mean == 0.625
    assert toxicity.effect_size == pytest.approx(0.25 / np.std([0.5, -0.5, 0, 1], ddof=1))
    assert toxicity.needed_pairs == needed_pairs(0.25, toxicity.std)
    assert found["rougeL"].num_pairs == 3
    assert list(found) == ["toxicity", "rougeL"]


def test_equal_scores_are_a_difference_of_exactly_0_and_one_pair_proves_nothing():
    same = paired_differences({"nll": np.zeros(50)})["nll"]
    assert (same.interval.low, same.interval.high, same.p_value, same.effect_size) == (0, 0, 1, None)
    shifted = mean_intervals(np.full((50, 1), 0.1))[0]
    assert (shifted.low, shifted.high) == (pytest.approx(0.1), pytest.approx(0.1))
    one = paired_differences({"nll": np.array([0.3])})["nll"]
    assert (one.interval.low, one.interval.high) == (-math.inf, math.inf)


def test_few_differing_pairs_still_have_a_finite_interval():
    values = np.zeros((120, 1))
    values[:2] = 0.01
    [interval] = mean_intervals(values)
    assert -0.001 < interval.low < 0 < interval.mean < interval.high < 0.001


def test_same_seed_same_result_and_blocks_do_not_matter(monkeypatch):
    values = np.random.default_rng(0).normal(size=(300, 3))
    whole = mean_intervals(values, Resampling(500))
    assert mean_intervals(values, Resampling(500)) == whole
    assert mean_intervals(values, Resampling(500, seed=1)) != whole
    monkeypatch.setattr("yunque.metrics.paired._BLOCK_VALUES", 7_000)
    assert [round(i.low, 6) for i in mean_intervals(values, Resampling(500))] == [round(i.low, 6) for i in whole]


def test_bad_input_is_named():
    with pytest.raises(InputError, match="at least one"):
        mean_intervals(np.zeros((0, 1)))
    with pytest.raises(InputError, match="1 of 2 values are not finite"):
        mean_intervals(np.array([[np.inf, 1.0]]))
    with pytest.raises(InputError, match="no pair"):
        paired_differences({"rougeL": np.full(3, np.nan)})
    with pytest.raises(InputError, match="resamples"):
        Resampling(10)
    with pytest.raises(InputError, match="confidence"):
        Resampling(confidence=1.0)
