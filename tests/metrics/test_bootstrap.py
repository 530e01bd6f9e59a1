import json
import math
import time
import tracemalloc

import numpy as np
import pytest

from yunque.errors import InputError
from yunque.metrics.bootstrap import Interval, bootstrap, paired_bootstrap


def test_interval_of_two_values_is_known_exactly():
    # The mean of a resample of (0, 1) is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    assert bootstrap([0.0, 1.0]) == Interval(0.5, 0.0, 1.0)
    assert bootstrap([0.0, 1.0], confidence=0.4) == Interval(0.5, 0.5, 0.5)


def test_interval_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).normal(3, 2, size=2_000)
    interval = bootstrap(values)
    half_width = 1.96 * values.std() / math.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(interval.mean - half_width, abs=0.05 * half_width)
    assert interval.high == pytest.approx(interval.mean + half_width, abs=0.05 * half_width)


def test_pairs_stay_together():
    before = np.random.default_rng(2).normal(0, 100, size=50)
    shift = paired_bootstrap(before, before + 1)  # resampling the two sides apart would give a width of about 80
    assert (shift.mean, shift.low, shift.high) == pytest.approx((1, 1, 1))
    after = before + np.linspace(-1, 2, 50)
    assert paired_bootstrap(before, after, seed=3) == bootstrap(after - before, seed=3)


def test_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        interval = bootstrap(rng.normal(size=200), resamples=1_000, seed=seed)
        covered += interval.low <= 0 <= interval.high
    assert 0.92 <= covered / 300 <= 0.98


def test_same_seed_same_interval():
    values = np.random.default_rng(4).normal(size=300)
    assert bootstrap(values, seed=7) == bootstrap(values, seed=7)
    assert bootstrap(values, seed=7) != bootstrap(values, seed=8)


def test_chunks_do_not_change_the_draws(monkeypatch):
    values = np.random.default_rng(5).normal(size=40)
    whole = bootstrap(values, resamples=999)
    monkeypatch.setattr("yunque.metrics.bootstrap._CHUNK_VALUES", 1_000)
    assert bootstrap(values, resamples=999) == whole


def test_one_value_gives_no_interval():
    interval = paired_bootstrap([0.5], [0.25])
    assert interval == Interval(-0.25, -math.inf, math.inf)
    assert json.dumps(interval.as_dict(), allow_nan=False) == '{"mean": -0.25, "low": null, "high": null}'


def test_interval_as_dict():
    assert Interval(1.0, 0.5, 2.0).as_dict() == {"mean": 1.0, "low": 0.5, "high": 2.0}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([1.0, math.nan], [1.0, 1.0], "before: 1 of 2 values are not finite, first row 1: nan"),
        ([1.0, 1.0], [math.inf, 1.0], "after: 1 of 2 values are not finite, first row 0: inf"),
        ([1.0, 2.0], [1.0], "2 values before but 1 after"),
        ([], [], "before: expected one number per row and at least one row"),
        ([[1.0, 2.0]], [[1.0, 2.0]], "before: expected one number per row"),
    ],
)
def test_bad_values_are_named(before, after, message):
    with pytest.raises(InputError, match=message):
        paired_bootstrap(before, after)


@pytest.mark.parametrize("options", [{"resamples": 0}, {"confidence": 0.0}, {"confidence": 95.0}])
def test_bad_options_are_named(options):
    with pytest.raises(InputError, match=next(iter(options))):
        bootstrap([1.0, 2.0], **options)


def test_ten_thousand_resamples_of_two_thousand_pairs_are_cheap():
    before = np.random.default_rng(0).normal(size=2_000)
    tracemalloc.start()
    start_s = time.process_time()
    paired_bootstrap(before, before + 1)
    cpu_s = time.process_time() - start_s
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cpu_s < 2
    assert peak_bytes < 100e6  # all resamples at once would take 320 MB
