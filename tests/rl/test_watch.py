import numpy as np
import pytest

from yunque.rl.watch import (
    FALSE_FLAGS,
    Parting,
    find_parting,
    smoothing_window,
    step_noise,
    trailing_mean,
    watch_metrics,
    watched,
)

STEPS = np.arange(1, 61)
RUNS = 1000


def rising(top=6.0, steps=60):
    return np.linspace(0, top, steps)


def hacked(top=6.0):
    """Up with the reward to step 30, and down again."""
    return top / 2 - np.abs(rising(top) - top / 2)


def share_of_flags(reward, watch, runs=RUNS, seed=0):
    """Share of runs flagged when both curves carry noise of standard deviation 1 in every step."""
    rng = np.random.default_rng(seed)
    steps = np.arange(len(reward))
    flags = [
        find_parting(reward + rng.normal(size=len(steps)), watch + rng.normal(size=len(steps)), steps) is not None
        for _ in range(runs)
    ]
    return np.mean(flags)


# --- the rule ---


def test_curves_that_rise_together_do_not_part():
    assert find_parting(rising(), rising(3.0), STEPS) is None
    assert share_of_flags(rising(), rising()) < 0.01


def test_curves_that_part_are_flagged_after_the_turn():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 60)) / 10
    parting = find_parting(rising() + noise[0], hacked() + noise[1], STEPS)
    assert isinstance(parting, Parting)
    assert 25 <= parting.best_step <= 37  # the mean of 6 steps peaks 3 steps late
    assert parting.best_step < parting.step < 50
    assert parting.fall > 3 * parting.fall_error > 0
    assert parting.rise > parting.rise_error > 0
    assert f"at step {parting.step}" in str(parting)


def test_it_is_the_first_step_and_later_ones_change_nothing():
    noise = np.random.default_rng(1).normal(size=(2, 60)) / 10
    reward, watch = rising() + noise[0], hacked() + noise[1]
    late = find_parting(reward, watch, STEPS)
    changed = watch.copy()
    changed[late.step :] += rising(0.5, 60 - late.step)  # the flagged step is number late.step, counted from 1
    assert find_parting(reward, changed, STEPS).step == late.step


def test_steps_are_the_ones_logged():
    noise = np.random.default_rng(0).normal(size=(2, 60)) / 10
    plain = find_parting(rising() + noise[0], hacked() + noise[1], STEPS)
    later = find_parting(rising() + noise[0], hacked() + noise[1], STEPS + 100)
    assert (later.step, later.best_step) == (plain.step + 100, plain.best_step + 100)


def test_a_watch_that_falls_with_the_reward_is_no_hacking():
    assert find_parting(hacked(), hacked(), STEPS) is None
    assert find_parting(-rising(), -rising(), STEPS) is None
    assert share_of_flags(np.zeros(60), -rising(), runs=300) < FALSE_FLAGS  # a flat reward has not risen


def test_a_watch_that_only_lags_is_no_hacking():
    assert share_of_flags(rising(), np.minimum(rising(), 2.0)) < FALSE_FLAGS


@pytest.mark.parametrize("steps", [10, 12, 20, 60, 200])
def test_noise_alone_is_hardly_ever_flagged(steps):
    runs = RUNS if steps < 200 else 300
    assert share_of_flags(np.zeros(steps), np.zeros(steps), runs) < FALSE_FLAGS
    assert share_of_flags(rising(20, steps), np.zeros(steps), runs) < FALSE_FLAGS + 0.02  # noise under a real rise


@pytest.mark.parametrize(("top", "power"), [(10.0, 0.9), (6.0, 0.5)])
def test_a_real_parting_is_found_in_most_runs(top, power):
    """A watch that rises and falls by top / 2 standard deviations of one step."""
    assert share_of_flags(rising(top), hacked(top), runs=300) > power


@pytest.mark.parametrize("steps", [0, 1, 2, 9])
def test_a_run_too_short_to_tell_is_not_flagged(steps):
    assert find_parting(rising(9, steps), -rising(9, steps), np.arange(steps)) is None


# --- its parts ---


def test_trailing_means_and_window_worked_by_hand():
    assert trailing_mean(np.array([1.0, 2.0, 6.0, 4.0]), 2) == pytest.approx([1.5, 4.0, 5.0])
    assert trailing_mean(np.array([1.0]), 2).size == 0
    assert [smoothing_window(steps) for steps in (3, 50, 60, 200)] == [5, 5, 6, 20]


def test_noise_is_measured_around_a_trend():
    assert step_noise(rising()) == pytest.approx(0, abs=1e-12)
    noise = np.random.default_rng(0).normal(0, 0.7, 20_000)
    assert step_noise(noise) == pytest.approx(0.7, rel=0.02)
    assert step_noise(noise + rising(500, 20_000)) == pytest.approx(0.7, rel=0.02)


def test_only_watched_steps_count():
    records = [
        {"step": 1, "scores/raw_mean": 0.5},
        {"step": 2, "scores/raw_mean": 0.6, "watch/mean_scores": 1.5},
    ]
    assert [column.tolist() for column in watched(records)] == [[2], [0.6], [1.5]]


def test_metrics_name_the_step_or_null():
    before, after = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])
    metrics = watch_metrics(None, before, after, seed=0)
    assert metrics["watch_parted_at_step"] is None
    assert (metrics["watch_before"], metrics["watch_after"], metrics["watch_change"]["mean"]) == (2.0, 4.0, 2.0)
    assert watch_metrics(Parting(7, 3, 1, 1, 1, 1), before, after, seed=0)["watch_parted_at_step"] == 7
