import json

import numpy as np
import pytest

from yunque.rl.config import RewardArguments
from yunque.rl.score_scaling import ScoreScaler


def scaler_of(**options):
    return ScoreScaler(RewardArguments(**options))


def batches(count=5, size=7, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(3.0 + step, 2.0, size).tolist() for step in range(count)]


def test_without_options_scores_are_left_alone():
    scaler = scaler_of()
    assert scaler([3.0, -4.0]) == [3.0, -4.0]
    assert scaler.state()["count"] == 0


@pytest.mark.parametrize("norm", [False, True])
def test_scores_are_scaled_by_the_moments_of_all_scores_seen_so_far(norm):
    scaler, seen = scaler_of(use_score_scaling=True, use_score_norm=norm), []
    for batch in batches():
        seen += batch
        shift = np.mean(seen) if norm else 0.0
        assert scaler(batch) == pytest.approx((np.array(batch) - shift) / np.std(seen, ddof=1))
    assert scaler.mean == pytest.approx(np.mean(seen))
    assert scaler.std == pytest.approx(np.std(seen, ddof=1))


def test_moments_survive_a_large_mean():
    scaler = scaler_of(use_score_scaling=True)
    values = 1e6 + np.random.default_rng(0).normal(size=1000)
    for batch in np.split(values, 100):
        scaler(batch)
    assert scaler.std == pytest.approx(np.std(values, ddof=1), rel=1e-6)


def test_clipping_comes_after_scaling_and_works_alone():
    assert scaler_of(score_clip=2.0)([1.0, 5.0, -5.0]) == [1.0, 2.0, -2.0]
    clipped = scaler_of(use_score_scaling=True, use_score_norm=True, score_clip=0.5)([10.0, 20.0, 30.0])
    assert clipped == [-0.5, 0.0, 0.5]  # -1, 0, 1 before


def test_equal_scores_are_not_divided_by_nothing():
    assert scaler_of(use_score_scaling=True)([0.1] * 6) == [0.1] * 6
    assert scaler_of(use_score_scaling=True, use_score_norm=True)([0.1] * 6) == pytest.approx([0.0] * 6)
    assert scaler_of(use_score_scaling=True)([7.0]) == [7.0]


def test_scores_that_are_not_finite_pass_through_and_spoil_no_moment():
    scaler = scaler_of(use_score_scaling=True, score_clip=1.0)
    scaler([1.0, 3.0])
    before = scaler.state()
    assert scaler([float("inf"), 5.0]) == [float("inf"), 5.0]
    assert scaler.state() == before


def test_state_through_json_goes_on_exactly():
    first, second = (scaler_of(use_score_scaling=True, use_score_norm=True) for _ in range(2))
    *early, last = batches()
    for batch in early:
        first(batch)
    second.load_state(json.loads(json.dumps(first.state())))
    assert second(last) == first(last)
    assert second.state() == first.state()
